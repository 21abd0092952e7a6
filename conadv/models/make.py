"""A network by its name and the arguments of its constructor."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from contextlib import suppress

from torch import nn

from conadv.errors import ConadvError, printable
from conadv.models import FAMILIES, SMALL, family

Options = dict[str, bool | int | float | str]

# What conadv sets itself, and what would read weights: a config must not make a run load a file.
_TAKEN = frozenset(
    "num_classes in_channels in_chans weights pretrained pretrained_cfg pretrained_cfg_overlay "
    "checkpoint_path cache_dir features_only scriptable exportable progress aux_logits".split()
)


def build_model(
    name: str,
    in_channels: int,
    num_classes: int,
    *,
    width: int | None = None,
    args: Sequence[str] = (),
) -> nn.Module:
    """The named network, freshly initialised from the global generator.

    width: channels of the first stage of the small networks; args: NAME=VALUE for the others.
    Raises ConadvError for an unknown name, for ``width`` or ``args`` that the network does not
    take, where timm is missing, and for a function of the user's own that
    :func:`conadv.models.own.trust` has not let in.
    """
    options = arguments(args)
    if name in SMALL and options:
        raise ConadvError(f"model.args has no effect on {name!r}, which has only model.width.")
    if width is not None:
        if name not in SMALL:
            raise ConadvError(
                f"model.width has no effect on {name!r}; it belongs to {', '.join(SMALL)}."
            )
        options["width"] = width
    build = pkgutil.resolve_name(FAMILIES[family(name)])
    model: nn.Module = build(name, in_channels, num_classes, options)
    return model


def arguments(args: Sequence[str]) -> Options:
    """``("drop_rate=0.1", "img_size=64")`` as keyword arguments: numbers, true and false, or text.

    Raises ConadvError for another form, and for a name that is taken or given twice.
    """
    options: Options = {}
    for arg in args:
        name, sign, text = arg.partition("=")
        if not sign or not name.isidentifier():
            shown = printable(arg)[:80]
            raise ConadvError(f"model.args {shown!r} is not NAME=VALUE, such as drop_rate=0.1.")
        if name in options:
            raise ConadvError(f"model.args: {name[:80]} is given twice. Leave one out.")
        if name in _TAKEN:
            raise ConadvError(
                f"model.args: {name} is set by conadv, which loads no weights. Leave it out."
            )
        options[name] = _value(text)
    return options


def _value(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
