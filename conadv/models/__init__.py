"""Networks by name.

    resnet8 .. resnet56          small residual networks (small.py)
    resnet50                     any torchvision classifier
    torchvision:resnet50         the same, said in full
    timm:efficientnet_b0         any network of timm (the extra ``timm``)
    mynets:make                  a function of yours, once :func:`trust` has let it in (own.py)

No weights are ever downloaded: every network starts from its own initialisation.
"""

from __future__ import annotations

from torch import nn

from conadv.config.schema import ModelConfig
from conadv.errors import ConadvError
from conadv.models.own import build_own, is_own, trust
from conadv.models.small import SMALL, BasicBlock, SmallResNet, build_small
from conadv.models.trial import check_model
from conadv.models.zoo import TIMM, TORCHVISION, arguments, build_timm, build_torchvision

__all__ = ["SMALL", "BasicBlock", "SmallResNet", "build_model", "check_model", "trust"]


def build_model(config: ModelConfig, in_channels: int, num_classes: int) -> nn.Module:
    """The named network, freshly initialised from the global generator.

    Raises ConadvError for an unknown name, for ``width`` or ``args`` that the network does not take, where timm is
    missing, and for a function that nobody has trusted.
    """
    name, options = config.name, arguments(config.args)
    if config.width is not None and name not in SMALL:
        raise ConadvError(
            f"model.width has no effect on {name!r}; it belongs to {', '.join(SMALL)}."
        )
    if name in SMALL:
        if options:
            raise ConadvError(f"model.args has no effect on {name!r}, which has only model.width.")
        return build_small(name, config.width, in_channels, num_classes)
    if name.startswith(TIMM):
        return build_timm(name.removeprefix(TIMM), in_channels, num_classes, options)
    if is_own(name):
        return build_own(name, in_channels, num_classes, options)
    return build_torchvision(name.removeprefix(TORCHVISION), in_channels, num_classes, options)
