"""Which settings make two runs the same arm, and how an arm is called after what sets it apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conadv.config.schema import ProbeConfig, flatten
from conadv.methods import METHODS
from conadv.optim import OPTIMIZERS

Settings = dict[str, Any]

# The seed is what arms are averaged over; the others change no number of a result.
IGNORED = frozenset({"seed", "recipe", "data.download"}) | {
    f"checkpoint.{name}" for name in ("every_epochs", "keep", "keep_best", "background")
}
IGNORED |= {
    f"probe.{name}" for name in ProbeConfig.model_fields
}  # measures, and leaves training alone
# Null in these only says that the method or optimizer chosen has no such setting.
_OWNED = (
    "staleness",
    "lookahead",
    "predictor",
    "pending_dtype",
    "adv_",
    "sam_",
    "aug_weight",
    "attack.",
    "optim.",
)
_IN_METHOD_NAME = frozenset({"method", "staleness", "lookahead", "predictor"})
_FIRST = ("data.source", "model.name", "optim.name", "global_batch_size", "optim.lr", "attack.eps")
_WORDS = {
    "data.source": "{}",
    "model.name": "{}",
    "optim.name": "{}",
    "precision": "{}",
    "global_batch_size": "batch {}",
    "micro_batch_size": "micro-batch {}",
    "optim.lr": "lr {}",
    "attack.eps": "eps {}",
    "data.augment": "augment {}",
    "data.aug_view": "aug view {}",
    "data.train_images": "{} training images",
    "data.subset_seed": "subset {}",
    "model.width": "width {}",
    "epochs": "{} epochs",
    "steps": "{} steps",
    "ranks": "{} rank(s)",
}


def effective(config: dict[str, Any], ranks: int = 1) -> Settings:
    """The flat settings that had an effect: None where a default or another choice decides the value.

    Two runs are of one arm exactly if these are equal. The number of ranks is one of them, since it changes times.
    """
    flat = {name: value for name, value in flatten(config).items() if name not in IGNORED}
    method = flat.get("method")
    if flat.get("micro_batch_size") == flat.get("global_batch_size"):
        flat["micro_batch_size"] = None
    if flat.get("attack.step_size") == _default_step_size(flat):
        flat["attack.step_size"] = None
    flat["data.subset_seed"] = _subset_seed(flat)
    without_effect = [
        name for name in flat if _belongs_to_methods(name) and not _has_effect(name, method)
    ]
    return {**flat, **dict.fromkeys(without_effect), "ranks": ranks}


def _subset_seed(flat: Settings) -> int | str | None:
    """0 in records that are older than the setting; null follows the seed, which is no value missing."""
    if flat.get("data.train_images") is None and flat.get("data.validation_images") is None:
        return None
    seed = flat.get("data.subset_seed", 0)
    return "of each seed" if seed is None else int(str(seed))


def _belongs_to_methods(name: str) -> bool:
    return name.startswith("attack.") or any(name in row.settings for row in METHODS.values())


def _has_effect(name: str, method: object) -> bool:
    """Whether the method uses the setting; of a method that this version does not know, everything is taken."""
    row = METHODS.get(str(method))
    if row is None or name in row.settings:
        return True
    attack, _, short = name.rpartition(".")
    known = {setting for other in METHODS.values() for setting in other.attack}
    return attack == "attack" and bool(row.attack) and (short in row.attack or short not in known)


def _default_step_size(flat: Settings) -> float | None:
    """The same rule as in :func:`conadv.config.schema.resolve`."""
    eps, num_steps = flat.get("attack.eps"), flat.get("attack.num_steps")
    if not isinstance(eps, float) or not isinstance(num_steps, int):
        return None
    return eps if num_steps == 1 else 2.5 * eps / num_steps


def varying(arms: Sequence[Settings]) -> list[str]:
    """Names of the settings that differ between ``arms``, in the order of the configuration."""
    names = dict.fromkeys(name for settings in arms for name in settings)
    return [name for name in names if len({_key(settings.get(name)) for settings in arms}) > 1]


def _key(value: object) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def choices(arms: Sequence[Settings]) -> list[str]:
    """Those of :func:`varying` that somebody chose: not the ones that only some arms' method or optimizer has."""
    return [name for name in varying(arms) if _is_choice(name, arms)]


def labels(arms: Sequence[Settings]) -> list[str]:
    """One distinct name per arm: its method, then what sets it apart, e.g. "conadv tau=1 + look-ahead, batch 898"."""
    differ = [name for name in choices(arms) if name not in _IN_METHOD_NAME]
    differ.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    main = [name for name in differ if not name.startswith("eval.")]
    names = [_label(settings, main, arms) for settings in arms]
    if len(set(names)) < len(names):
        # Only the evaluation, or only a setting that belongs to another choice, tells them apart.
        names = [
            _label(settings, [n for n in varying(arms) if n not in _IN_METHOD_NAME], arms)
            for settings in arms
        ]
    return names


def _is_choice(name: str, arms: Sequence[Settings]) -> bool:
    values = {_key(settings.get(name)) for settings in arms}
    if name.startswith(_OWNED):
        values.discard(_key(None))
    return len(values) > 1


def _label(settings: Settings, names: Sequence[str], arms: Sequence[Settings]) -> str:
    parts = [part(name, settings[name]) for name in names if settings.get(name) is not None]
    if "optim.name" in names:
        row = OPTIMIZERS.get(str(settings.get("optim.name")))
        defaults = row.defaults if row else {}
        implied = {part(f"optim.{name}", value) for name, value in defaults.items()}
        parts = [text for text in parts if text not in implied]
    return ", ".join([method_name(settings), *parts])


def method_name(settings: Settings) -> str:
    """The method with its staleness and look-ahead, e.g. "conadv tau=1 + look-ahead"."""
    name = str(settings.get("method"))
    if settings.get("staleness") is not None:
        name += f" tau={settings['staleness']}"
    predictor = settings.get("predictor") or "momentum"
    how = "" if predictor == "momentum" else f" ({predictor})"
    return name + (f" + look-ahead{how}" if settings.get("lookahead") else "")


def part(name: str, value: object) -> str:
    """One setting in words, e.g. "batch 898"."""
    template = _WORDS.get(name, name.rpartition(".")[2] + " {}")
    text = show(name, value)
    return template.format(text.upper() if name == "optim.name" else text)


def show(name: str, value: object) -> str:
    """A setting's value for people: fractions of 255 for eps, no needless digits, a dash for "none"."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(show(name, item) for item in value)
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.6g}"
    pixels = value * 255
    if (
        name.endswith(("eps", "step_size"))
        and len(text) > 5
        and pixels > 0.1
        and abs(pixels - round(pixels, 1)) < 1e-3
    ):
        return f"{round(pixels, 1):g}/255"
    return text
