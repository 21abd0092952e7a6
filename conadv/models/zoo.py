"""torchvision's and timm's networks by their own names, without pretrained weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from conadv.errors import ConadvError, install, printable, unknown
from conadv.models import SMALL
from conadv.models.make import Options


def build_torchvision(name: str, in_channels: int, num_classes: int, options: Options) -> nn.Module:
    """torchvision's classifier ``name``, with or without the prefix "torchvision:"."""
    import torchvision.models as zoo

    name, names = name.removeprefix("torchvision:"), zoo.list_models(module=zoo)
    if name not in names:
        if name in _timm_models():
            raise ConadvError(f"Unknown model {name!r}. Did you mean 'timm:{name}'?")
        raise unknown("model", name, [*SMALL, *names])
    if in_channels != 3:
        raise ConadvError(
            f"torchvision's {name} takes 3 channels, the data has {in_channels}. "
            f"Use {', '.join(SMALL)}, or timm:NAME."
        )
    if name in ("inception_v3", "googlenet"):
        # auxiliary logits in train mode have no place in a view's loss
        options = {"init_weights": True, **options, "aux_logits": False}
    return _make(
        f"torchvision:{name}", zoo.get_model, name, weights=None, num_classes=num_classes, **options
    )


def build_timm(name: str, in_channels: int, num_classes: int, options: Options) -> nn.Module:
    """The network "timm:NAME": an architecture without a tag of weights such as ``.a1_in1k``."""
    names, bare = _timm_models(), name.removeprefix("timm:")
    if not names:
        raise ConadvError(f"The model {name} needs timm, which is missing: {install('timm')}")
    if bare not in names:  # more than a thousand: a few to hint at
        near = difflib.get_close_matches(bare.partition(".")[0], names, n=5, cutoff=0.0)
        raise unknown("timm model", bare, near)
    import timm

    sizes = {"num_classes": num_classes, "in_chans": in_channels}
    return _make(name, timm.create_model, bare, pretrained=False, **sizes, **options)


def _timm_models() -> list[str]:
    """The names of timm's networks; none where timm is not installed."""
    try:
        import timm
    except ImportError:
        return []
    names: list[str] = timm.list_models()
    return names


def _make(title: str, factory: Callable[..., nn.Module], name: str, **options: Any) -> nn.Module:
    try:
        return factory(name, **options)
    except Exception as error:  # constructors check little and raise anything
        raise ConadvError(
            f"The model {title} cannot be built with {printable(options)[:500]}: "
            f"{printable(str(error) or type(error).__name__)[:1000]}. "
            "Look at its own documentation for what model.args may hold."
        ) from error
