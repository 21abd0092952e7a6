"""Data sets that torchvision downloads and reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import datasets

from conadv.data.source import Source, SourceSettings, in_memory
from conadv.errors import ConadvError, printable


def fashion_mnist(settings: SourceSettings) -> Source:
    """Fashion-MNIST: 28x28 grey images, 60,000 and 10,000."""
    return from_torchvision(datasets.FashionMNIST, settings)


def from_torchvision(factory: Any, settings: SourceSettings) -> Source:
    """A torchvision data set with its images in ``data``; ``download`` fetches it first."""
    settings.refuse("on_bad_image")
    folder = settings.folder()
    try:
        train, test = (
            factory(str(folder), train=train, download=settings.download) for train in (True, False)
        )
    except Exception as error:  # downloading, unpacking and reading raise anything
        name, where = settings.source, printable(folder)
        raise ConadvError(
            f"Cannot download {name} into {where}: {error}. Check the network and the folder."
            if settings.download
            else f"There is no {name} in {where}: {error}. Give data.download (--download)."
        ) from error
    return in_memory(_tensors(train), _tensors(test), tuple(train.classes), settings)


def _tensors(part: Any) -> tuple[Tensor, Tensor]:
    """(images_NCHW, labels_N) of N,H,W grey images or N,H,W,C coloured ones."""
    images = torch.as_tensor(part.data)
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(part.targets)
