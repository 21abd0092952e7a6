"""Which settings make two runs the same arm, and how an arm is named after what sets it apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conadv.config.schema import flatten
from conadv.methods import METHODS
from conadv.optim import OPTIMIZERS

Settings = dict[str, Any]

# The seed is what arms are averaged over; the others do not change a result.
IGNORED = ("seed", "recipe", "data.download", "checkpoint.", "probe.")
IN_METHOD_NAME = ("method", "staleness", "lookahead")
# Named only where nothing else tells two arms apart: they follow from other settings by default.
LAST = ("eval.", "attack.step_size", "micro_batch_size")
# None in these only says that the method or optimizer has no such setting.
OWNED = ("aug_", "attack.", *{name for row in METHODS.values() for name in row.settings})
FIRST = ("data.source", "model.name", "optim.name", "global_batch_size", "optim.lr", "attack.eps")
# How settings are named where the last part of their name is not enough or too much.
WORDS = {"data.source": "", "model.name": "", "optim.name": "", "precision": ""}
WORDS |= {"global_batch_size": "batch", "data.train_images": "images", "data.subset_seed": "subset"}


def effective(config: dict[str, Any], ranks: int = 1) -> Settings:
    """The flat settings that had an effect; None for those that the method does not have.

    Two runs are of one arm exactly if these are equal. The number of ranks counts: it changes
    times.
    """
    flat = {name: v for name, v in flatten(config).items() if not name.startswith(IGNORED)}
    flat.setdefault("data.subset_seed", 0)  # records older than the setting
    unused = [name for name in flat if not _used(name, str(flat.get("method")))]
    return {**flat, **dict.fromkeys(unused), "ranks": ranks}


def _used(name: str, method: str) -> bool:
    """Whether the method uses a setting; everything counts for a method that is unknown here."""
    row = METHODS.get(method)
    if row is None or name in row.settings:
        return True
    if name.startswith("attack."):
        known = {setting for other in METHODS.values() for setting in other.attack}
        short = name.removeprefix("attack.")
        return bool(row.attack) and (short in row.attack or short not in known)
    return not any(name in other.settings for other in METHODS.values())


def attacks(method: str) -> bool:
    """Whether the method makes its extra images with a gradient."""
    return method in METHODS and "norm" in METHODS[method].attack


def varying(arms: Sequence[Settings], *, chosen: bool = True) -> list[str]:
    """Settings that differ between ``arms``; ``chosen``: only where two arms have values."""

    def values(name: str) -> set[str]:
        found = {repr(arm.get(name)) for arm in arms}
        return found - {"None"} if chosen and name.startswith((*OWNED, "optim.")) else found

    names = dict.fromkeys(name for settings in arms for name in settings)
    return [name for name in names if len(values(name)) > 1]


def labels(arms: Sequence[Settings]) -> list[str]:
    """A name per arm, e.g. "conadv tau=1 + look-ahead, batch 898": the method and what differs."""
    names = [_label(arm, [n for n in varying(arms) if not n.startswith(LAST)]) for arm in arms]
    if len(set(names)) < len(names):
        names = [_label(arm, varying(arms, chosen=False)) for arm in arms]
    return names


def _label(settings: Settings, differing: Sequence[str]) -> str:
    names = [n for n in differing if n not in IN_METHOD_NAME and settings.get(n) is not None]
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    parts = [part(name, settings[name]) for name in names]
    if "optim.name" in names:
        row = OPTIMIZERS.get(str(settings.get("optim.name")))
        defaults = row.defaults if row else {}
        implied = {part(f"optim.{name}", value) for name, value in defaults.items()}
        parts = [text for text in parts if text not in implied]
    return ", ".join([method_name(settings), *parts])


def method_name(settings: Settings) -> str:
    """The method with its staleness and look-ahead, e.g. "conadv tau=1 + look-ahead"."""
    tau = settings.get("staleness")
    name = str(settings.get("method")) + (f" tau={tau}" if tau is not None else "")
    return name + (" + look-ahead" if settings.get("lookahead") else "")


def part(name: str, value: object) -> str:
    """One setting in words, e.g. "batch 898"."""
    return f"{WORDS.get(name, name.rpartition('.')[2])} {show(name, value)}".strip()


def show(name: str, value: object) -> str:
    """A setting's value for people: eps as a fraction of 255, a dash for None."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    text, pixels = f"{value:.6g}", value * 255
    if name.endswith(("eps", "step_size")) and len(text) > 5 and abs(pixels % 0.1 - 0.05) > 0.049:
        return f"{pixels:.1f}".removesuffix(".0") + "/255"
    return text
