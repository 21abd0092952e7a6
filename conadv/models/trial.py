"""One look at a network before training: does it take these images, and does it give one logit per class?"""

from __future__ import annotations

import torch
from torch import nn

from conadv.errors import ConadvError, printable
from conadv.nn.split_batchnorm import frozen_stats


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
        for training in (True, False):
            model.train(training)  # first: frozen_stats freezes what is in train mode as it begins
            with torch.no_grad(), frozen_stats(model):
                _check_pass(model, x_NCHW, num_classes, "train" if training else "eval")
    finally:
        for module, mode_before in was_training:
            module.training = mode_before


def _check_pass(model: nn.Module, x_NCHW: torch.Tensor, num_classes: int, mode: str) -> None:
    images, channels, size, _ = x_NCHW.shape
    try:
        out = model(x_NCHW)
    except Exception as error:  # a forward pass checks little and raises anything
        reason = printable(str(error) or type(error).__name__)[:1000]
        alone = " one at a time" if images == 1 else ""
        larger = "a larger micro_batch_size or attack.share, " if images == 1 else ""
        raise ConadvError(
            f"The {type(model).__name__} cannot take {channels} x {size} x {size} images{alone}: "
            f"{reason}. Choose {larger}data.image_size, or build the model for this size "
            "(--model.args img_size=64 in timm, image_size=64 in torchvision)."
        ) from error
    if not isinstance(out, torch.Tensor):
        raise ConadvError(
            f"The model returns a {type(out).__name__} in {mode} mode, where one tensor of logits is "
            "needed. Switch its other outputs off, or wrap it in a module that returns the logits alone."
        )
    if out.shape != (images, num_classes):
        raise ConadvError(
            f"The model gives a tensor of shape {tuple(out.shape)} for {images} images, where "
            f"{images} x {num_classes} logits are needed (num_classes is the number of class folders)."
        )
