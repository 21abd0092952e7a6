"""Configs as YAML: saved with every run, read back, and those of earlier versions understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from conadv.config.schema import DEFAULTS, Config
from conadv.errors import ConadvError, printable, unknown
from conadv.safe_io import read_yaml

REMOVED: dict[str, tuple[Any, ...]] = {
    "predictor": ("momentum",),
    "sam_every": (1, None),
    "attack.every": (1,),
    "attack.resolution": (1.0,),
    "attack.eps_schedule": ("constant",),
    "attack.until": (1.0,),
    "probe.predictors": (["momentum", "last-update", "momentum-gradient"], ["momentum"]),
}
"""Settings of version 0.1 that no study supported, with the values that mean what is done without
them."""


def removed_setting(name: str) -> ConadvError:
    """What to say of a setting that only version 0.1 had."""
    return ConadvError(
        f"{name} is a setting of conadv 0.1 that this version does not have (docs/experiments.md "
        "says why). Leave it out, or use version 0.1 for this run."
    )


def dump_yaml(config: Config) -> str:
    """The config as YAML text that :func:`load_yaml` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def load_yaml(path: Path) -> Config:
    """Read a saved config; an unknown key or a bad value is a ConadvError that names it."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConadvError(f"The config {printable(path)} is not a mapping of settings.")
    return parse(values, str(path))


def parse(values: dict[str, Any], where: str) -> Config:
    """A Config from plain values, with errors that a user can act on. ``where``: what they come
    from, for the message.
    """
    try:
        return Config.model_validate(_without_removed(values, where))
    except ValidationError as error:
        raise explain(error, where) from error


def _without_removed(values: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """``values`` without settings of version 0.1 that had their default; ConadvError where they had
    not.
    """
    kept: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in REMOVED:
            if value not in REMOVED[name]:
                raise ConadvError(
                    f"{where}: {removed_setting(f'{name} = {printable(value)[:80]}')}"
                )
        elif isinstance(value, dict) and not prefix:
            kept[key] = _without_removed(value, where, f"{name}.")
        else:
            kept[key] = value
    return kept


def home(path: Path) -> Path:
    """``path`` with a leading ``~`` or ``~name`` as that user's folder. ConadvError where there is
    no such user.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConadvError(
            f"{printable(path)[:200]}: {error}. Write the folder out, or ./~name for one here."
        ) from error


def explain(error: ValidationError, where: str) -> ConadvError:
    """The first of pydantic's errors as one line, with the nearest name for an unknown key."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ConadvError(f"{where}: {unknown('setting', path, DEFAULTS)}")
    given = repr(first.get("input"))
    given = given if len(given) <= 80 else f"{given[:80]}..."
    return ConadvError(f"{where}: {printable(path)[:200]} = {given}: {first['msg'][:500]}.")
