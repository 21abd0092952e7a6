"""What a user's options on top of a recipe mean."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from pydantic import BaseModel

from conadv.config.files import REMOVED, removed_setting
from conadv.config.resolve import (
    EXTRA_VIEW_SETTINGS,
    METHOD_SETTINGS,
    OPTIM_SETTINGS,
    without_effect,
)
from conadv.config.schema import DEFAULTS, Config, replace
from conadv.errors import ConadvError
from conadv.methods import METHODS


def short_names(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, str]:
    """The short name of each option that has one (``alias`` in the schema) -> the setting's dotted
    name.
    """
    found: dict[str, str] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= short_names(field.annotation, f"{prefix}{name}.")
        for mark in field.metadata:
            found |= {short[2:]: prefix + name for short in getattr(mark, "aliases", None) or ()}
    return found


def given_settings(args: Sequence[str]) -> set[str]:
    """The dotted names of the settings that the options give, whatever their values.

    Raises ConadvError for an option that only version 0.1 had.
    """
    options = [arg[2:].partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")]
    short = short_names()
    names = {short.get(option, option.replace("-", "_")) for option in options}
    for name in sorted(names & REMOVED.keys()):
        raise removed_setting(f"--{name.replace('_', '-')}")
    # a flag is switched off by --no-NAME, in a section by --SECTION.no-NAME
    on = {
        ".".join((*head, tail.removeprefix("no_"))) for *head, tail in (n.split(".") for n in names)
    }
    return {short.get(name.replace("_", "-"), name) for name in names | on} & DEFAULTS.keys()


def override(base: Config, edited: Config, given: Collection[str]) -> Config:
    """``edited``, which is ``base`` (a recipe or a saved config) with a user's options, before
    ``resolve``.

    ``given``: the dotted names of the settings that the user gave. Those stand as they are, and one
    without effect is a ConadvError. Settings of the base that belong to a choice which the user
    replaced (another method, optimizer or model, steps for epochs, eps for step_size) fall back to
    their defaults.
    """
    stale: list[str] = []
    stale += ["epochs"] if "steps" in given else ["steps"] if "epochs" in given else []
    if edited.method != base.method:
        stale += [*METHOD_SETTINGS, *EXTRA_VIEW_SETTINGS]
    if edited.optim.name != base.optim.name:
        if "optim.lr" not in given:
            raise ConadvError(
                f"The learning rate {base.optim.lr:g} belongs to {base.optim.name}. "
                f"Give --lr for --optimizer {edited.optim.name}."
            )
        stale += [f"optim.{name}" for name in OPTIM_SETTINGS]
    if edited.model.name != base.model.name:
        stale += ["model.width", "model.args"]
    if base.micro_batch_size == base.global_batch_size:  # it was the global batch, not a choice
        stale += ["micro_batch_size"]
    if {"attack.eps", "attack.num_steps"} & set(given):
        stale += ["attack.step_size", "attack.name"]
    edited = _back_to_default(edited, (name for name in stale if name not in given))
    _check_attack_has_effect(edited, given)
    return edited


def _back_to_default(edited: Config, names: Iterable[str]) -> Config:
    reset: Config = replace(edited, **{n.replace(".", "__"): DEFAULTS[n] for n in names})
    return reset


def _check_attack_has_effect(edited: Config, given: Collection[str]) -> None:
    if edited.probe.every_epochs is not None:
        return  # the probe attacks, whatever the method does
    for name in given:
        if name.startswith("attack.") and name[7:] not in METHODS[edited.method].attack:
            raise without_effect(name, "method", edited.method)
