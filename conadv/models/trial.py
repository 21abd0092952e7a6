"""One look at a network before training: does it take the images, and give a logit per class?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conadv.errors import ConadvError, printable
from conadv.nn.buffers import state_left_alone


def check_model(
    model: nn.Module, channels: int, image_size: int, num_classes: int, images: int = 2
) -> None:
    """ConadvError unless the model turns images N,C,H,W into logits N,K, in train and eval mode.

    Costs two forward passes of ``images`` black images. Statistics and modes stay as they are.
    Draws of dropout come from the global generator.
    """
    x_NCHW = torch.zeros(images, channels, image_size, image_size)
    was_training = [(module, module.training) for module in model.modules()]
    try:
        for training in (True, False):
            model.train(training)  # first: state_left_alone looks at modes once
            with torch.no_grad(), state_left_alone(model):
                _check_pass(model, x_NCHW, num_classes, "train" if training else "eval")
    finally:
        for module, mode_before in was_training:
            module.training = mode_before


def _check_pass(model: nn.Module, x_NCHW: Tensor, num_classes: int, mode: str) -> None:
    images, channels, size, _ = x_NCHW.shape
    try:
        out = model(x_NCHW)
    except Exception as error:  # a forward pass checks little and raises anything
        reason = printable(str(error) or type(error).__name__)[:1000]
        alone = " one at a time" if images == 1 else ""
        raise ConadvError(
            f"The {type(model).__name__} cannot take {channels} x {size} x {size} images{alone}: "
            f"{reason}. {_advice(model, x_NCHW)}"
        ) from error
    if not isinstance(out, Tensor):
        raise ConadvError(
            f"The model returns a {type(out).__name__} in {mode} mode, where one tensor of logits "
            "is needed. Switch its other outputs off, or wrap it in a module that returns the "
            "logits alone."
        )
    if out.shape != (images, num_classes):
        raise ConadvError(
            f"The model gives a tensor of shape {tuple(out.shape)} for {images} images, where "
            f"{images} x {num_classes} logits are needed (num_classes is the number of class "
            "folders)."
        )


def _advice(model: nn.Module, x_NCHW: Tensor) -> str:
    """What to change, found by changing the images: which ones would the model take?"""
    images, channels = x_NCHW.shape[:2]
    weights = next((p for p in model.parameters() if p.is_floating_point()), x_NCHW)
    other = 3 if channels == 1 else 1
    x = x_NCHW.to(weights.dtype)
    wide = x[:, :1].expand(-1, other, -1, -1)
    if images == 1 and _takes(model, torch.cat([x, x])):
        return "It needs several at a time: choose a larger micro_batch_size or attack.share."
    remedies = []
    if weights.dtype != x_NCHW.dtype:
        remedies.append(
            f"Its weights are {weights.dtype}: leave them float32, and use --precision for others."
        )
    if not _takes(model, x) and _takes(model, wide):
        remedies.append(
            f"It takes {other} channel(s), the data has {channels}: build it for {channels}, by an "
            "argument in_channels or in_chans of its function."
        )
    elif not _takes(model, x):
        remedies.append(
            "If that is about the size: choose data.image_size, or build the model for this size "
            "(--model.args img_size=64 in timm, image_size=64 in torchvision)."
        )
    return " ".join(remedies)


def _takes(model: nn.Module, x_NCHW: Tensor) -> bool:
    try:
        model(x_NCHW)
    except Exception:  # as above
        return False
    return True
