"""One look at a network before training: does it take these images, and does it give one logit per class?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from conadv.config.schema import Config, micro_batch
from conadv.errors import ConadvError, printable
from conadv.nn.split_batchnorm import frozen_stats

NO_BATCH_NORM = (
    "no batch norm in this model: the routes share its normalisation and every weight, so that clean and extra images "
    "are told apart by their loss alone"
)


def looks(config: Config, image_size: int) -> Iterator[tuple[int, int]]:
    """(images, height and width) of the passes of a run that a network may refuse: its smallest view, probe, attack.

    Two images stand for more: batch norm over a map of one pixel needs them.
    """
    attacked = max(1, round(config.attack.share * micro_batch(config)))
    probed = config.probe.images if config.probe.every_epochs is not None else 2
    yield min(2, attacked, probed), image_size


def check_model(
    model: nn.Module, channels: int, image_size: int, num_classes: int, images: int = 2
) -> None:
    """ConadvError unless the model turns images N,C,H,W into logits N,K, in train and in eval mode.

    Costs two forward passes of ``images`` black images. Statistics and modes stay as they are. Draws of dropout come
    from the global generator.
    """
    x_NCHW = torch.zeros(images, channels, image_size, image_size)
    was_training = [(module, module.training) for module in model.modules()]
    try:
        for mode in ("train", "eval"):
            model.train(
                mode == "train"
            )  # before frozen_stats, which freezes what is in train mode when it begins
            with torch.no_grad(), frozen_stats(model):
                _check_output(_forward(model, x_NCHW), mode, (images, num_classes))
    finally:
        for module, mode_before in was_training:
            module.training = mode_before


def _forward(model: nn.Module, x_NCHW: torch.Tensor) -> Any:
    try:
        return model(x_NCHW)
    except Exception as error:  # a forward pass checks little and raises anything
        images, channels, size, _ = x_NCHW.shape
        why = printable(str(error) or type(error).__name__)[:1000]
        alone = " one at a time" if images == 1 else ""
        larger = "a larger micro_batch_size or attack.share, " if images == 1 else ""
        raise ConadvError(
            f"The {type(model).__name__} cannot take {channels} x {size} x {size} images{alone}: {why}. "
            f"Choose {larger}data.image_size, or build the model "
            "for this size (--model.args img_size=64 in timm, image_size=64 in torchvision)."
        ) from error


def _check_output(out: Any, mode: str, shape: tuple[int, int]) -> None:
    if not isinstance(out, torch.Tensor):
        raise ConadvError(
            f"The model returns a {type(out).__name__} in {mode} mode, where one tensor of logits is needed. Switch "
            "its other outputs off, or wrap it in a module that returns the logits alone."
        )
    if out.shape != shape:
        raise ConadvError(
            f"The model gives a tensor of shape {tuple(out.shape)} for {shape[0]} images, where {shape[0]} x "
            f"{shape[1]} logits are needed (num_classes is the number of class folders)."
        )
