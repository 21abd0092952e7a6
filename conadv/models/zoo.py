"""torchvision's and timm's networks by their own names, without pretrained weights."""

from __future__ import annotations

import difflib
import keyword
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from torch import nn

from conadv.errors import ConadvError, install, printable, unknown
from conadv.models.small import SMALL
from conadv.safe_io import parse_yaml

TORCHVISION, TIMM = "torchvision:", "timm:"

Options = dict[str, bool | int | float | str]

# What conadv gives itself, and what would fetch or read weights: a config must not make a run load a file.
_TAKEN = frozenset(
    "num_classes in_channels in_chans weights pretrained pretrained_cfg pretrained_cfg_overlay checkpoint_path "
    "cache_dir features_only scriptable exportable progress aux_logits".split()
)


_MANY_DIGITS = re.compile(r"[-+]?(0[xb])?[0-9a-f_]{20,}")
"""A whole number that is not even read."""


def arguments(args: Sequence[str]) -> Options:
    """``("drop_rate=0.1", "img_size=64")`` as keyword arguments: numbers, true and false, or text.

    Raises ConadvError for what has another form, for a name that is taken or given twice, and for a number that is not
    finite or has no place in 64 bits.
    """
    options: Options = {}
    for arg in args:
        name, sign, text = arg.partition("=")
        if not sign or not name.isidentifier() or keyword.iskeyword(name):
            raise ConadvError(
                f"model.args {_shown(arg)!r} is not NAME=VALUE, such as drop_rate=0.1."
            )
        if name in _TAKEN or name in options:
            why = (
                "is given twice" if name in options else "is set by conadv, which loads no weights"
            )
            raise ConadvError(f"model.args: {_shown(name)} {why}. Leave it out.")
        options[name] = _value(name, text)
    return options


def _value(name: str, text: str) -> bool | int | float | str:
    """What stands behind NAME=: the number or truth value that YAML sees there, or the text itself."""
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:  # a lone bracket is text as well
        value = math.inf if _MANY_DIGITS.fullmatch(text) else text
    if not isinstance(value, (bool, int, float)):
        return text
    if not (math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63):
        raise ConadvError(
            f"model.args: {_shown(name)}={_shown(text)} is not finite, or beyond 64 bits. Choose another."
        )
    return value


def _shown(text: str) -> str:
    return printable(text)[:80]


def build_torchvision(name: str, in_channels: int, num_classes: int, options: Options) -> nn.Module:
    """torchvision's classifier ``name``."""
    import torchvision.models as zoo

    names = zoo.list_models(module=zoo)
    if name not in names:
        raise _unknown_name(name, names)
    if in_channels != 3:
        raise ConadvError(
            f"torchvision's {name} takes 3 channels, the data has {in_channels}. Use {', '.join(SMALL)}, or timm:NAME."
        )
    if name in ("inception_v3", "googlenet"):
        # auxiliary logits in train mode have no place in a view's loss
        options = {"init_weights": True, **options, "aux_logits": False}
    return _make(
        f"torchvision:{name}", zoo.get_model, name, weights=None, num_classes=num_classes, **options
    )


def build_timm(name: str, in_channels: int, num_classes: int, options: Options) -> nn.Module:
    """timm's network ``name``, an architecture without a tag of weights such as ``.a1_in1k``."""
    try:
        import timm as zoo
    except ImportError as error:
        raise ConadvError(
            f"The model timm:{name} needs timm, which is missing: {install('timm')}"
        ) from error
    if name not in (names := zoo.list_models()):
        raise unknown("timm model", name, _near(name.partition(".")[0], names))
    return _make(
        f"timm:{name}",
        zoo.create_model,
        name,
        pretrained=False,
        num_classes=num_classes,
        in_chans=in_channels,
        **options,
    )


def _make(title: str, factory: Callable[..., nn.Module], name: str, **options: Any) -> nn.Module:
    try:
        return factory(name, **options)
    except Exception as error:  # constructors check little and raise anything
        raise ConadvError(
            f"The model {title} cannot be built with {printable(options)[:500]}: "
            f"{printable(str(error) or type(error).__name__)[:1000]}. "
            "Look at its own documentation for what model.args may hold."
        ) from error


def _unknown_name(name: str, names: Sequence[str]) -> ConadvError:
    """With the nearest name; timm's where that is the exact one."""
    try:
        import timm as zoo

        if name in zoo.list_models():
            return ConadvError(f"Unknown model {name!r}. Did you mean 'timm:{name}'?")
    except ImportError:
        pass
    return unknown("model", name, [*SMALL, *names])


def _near(name: str, names: Sequence[str]) -> list[str]:
    """A few names to hint at: timm has more than a thousand."""
    return difflib.get_close_matches(name, names, n=5, cutoff=0.0)
