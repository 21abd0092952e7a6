"""Recipes: plain functions that return a Config. The docstring is the command, the time and the
expected result.

Every recipe trains with every method; its learning rate was chosen for its optimizer and batch.
"""

from __future__ import annotations

from collections.abc import Callable

from conadv.config.recipes import imagenet
from conadv.config.recipes.small import cifar10, digits, fashion_mnist
from conadv.config.schema import Config
from conadv.errors import unknown

__all__ = ["RECIPES", "cifar10", "digits", "fashion_mnist", "get", "summary"]

RECIPES: dict[str, Callable[[], Config]] = {
    "digits": digits,
    "cifar10": cifar10,
    "fashion-mnist": fashion_mnist,
    "imagefolder": imagenet.imagefolder,
    "imagenet_resnet50_8k": imagenet.resnet50_8k,
    "imagenet_resnet50_32k": imagenet.resnet50_32k,
    "imagenet_resnet50_64k": imagenet.resnet50_64k,
    "imagenet_resnet50_96k": imagenet.resnet50_96k,
    "imagenet_efficientnet_b0_4k": imagenet.efficientnet_b0_4k,
    "imagenet_efficientnet_b0_32k": imagenet.efficientnet_b0_32k,
    "imagenet_vit_s_4k": imagenet.vit_s_4k,
    "imagenet_vit_s_32k": imagenet.vit_s_32k,
}


def get(name: str) -> Config:
    """The recipe's config, or ConadvError with the nearest name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()


def summary(name: str) -> str:
    """The first line of a recipe's docstring."""
    return (RECIPES[name].__doc__ or "").strip().partition("\n")[0]
