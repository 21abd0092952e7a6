"""Networks by name, each from its own initialisation: no weights are ever downloaded.

    resnet8 .. resnet56          small residual networks (small.py)
    resnet50                     any torchvision classifier
    torchvision:resnet50         the same, said in full
    timm:efficientnet_b0         any network of timm (the extra ``timm``)
    mynets:make                  a function of yours that :func:`conadv.models.own.trust` let in

Nothing here imports torch.
"""

from __future__ import annotations

FAMILIES: dict[str, str] = {
    "small": "conadv.models.small:build_small",
    "torchvision": "conadv.models.zoo:build_torchvision",
    "timm": "conadv.models.zoo:build_timm",
    "own": "conadv.models.own:build_own",
}
"""Family -> "module:function", which takes name, in_channels, num_classes, options."""

SMALL = tuple(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56))


def family(name: str) -> str:
    """Where a network of this name comes from, a key of FAMILIES."""
    prefix, colon, _ = name.partition(":")
    if not colon:
        return "small" if name in SMALL else "torchvision"
    return prefix if prefix in ("torchvision", "timm") else "own"
