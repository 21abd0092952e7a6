"""Augmentation as a pure function of (seed, epoch, view, sample index).

Every sample has a 64-bit key, and all that is drawn for it comes from that key alone. So an image
looks the same in any batch, order, worker or process, a resumed run needs no generator state, and a
second view is another name in the key.

Two kinds: a :data:`BatchAugment` takes uint8 images of one size, already in memory; a
:data:`PhotoAugment` takes one decoded photograph of any size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from conadv import rng
from conadv.data import AUGMENTATIONS
from conadv.errors import unknown

# (images_NCHW uint8, keys_N int64) -> new images_NCHW uint8 of the same size
BatchAugment = Callable[[Tensor, Tensor], Tensor]

# (RGB image, key) -> image_CHW uint8, always image_size x image_size
PhotoAugment = Callable[[Image.Image, int], Tensor]

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable ... generators, 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def sample_keys(seed: int, epoch: int, view: str, indices_N: Tensor) -> Tensor:
    """int64 keys, one per sample: splitmix64 counters of the stream seed/augment/epoch/view."""
    base = np.uint64(rng.derive(seed, "augment", epoch, view))
    counters = indices_N.numpy().astype(np.uint64) * np.uint64(_GAMMA) + base
    return torch.from_numpy(_mix(counters).view(np.int64))


def draw_integers(keys_N: Tensor, slot: int, high: int) -> Tensor:
    """int64 draws from 0..high-1, one per key, independent for each ``slot``."""
    offset = np.uint64((slot + 1) * _GAMMA & _MASK)
    bits = _mix(keys_N.numpy().view(np.uint64) + offset) >> np.uint64(33)
    return torch.from_numpy((bits * np.uint64(high) >> np.uint64(31)).astype(np.int64))


def crop_flip(images_NCHW: Tensor, keys_N: Tensor, padding: int, flip: bool = True) -> Tensor:
    """Shift by up to ``padding`` pixels each way (zeros come in), and mirror half of the images.

    The random crop with padding of He et al. (2016, section 4.2), for the whole batch at once.
    """
    height, width = images_NCHW.shape[-2:]
    top_N, left_N = (draw_integers(keys_N, slot, 2 * padding + 1) for slot in (0, 1))
    padded = torch.nn.functional.pad(images_NCHW, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    out = windows[torch.arange(len(padded)), :, top_N, left_N]
    if not flip:
        return out
    mirrored_N = draw_integers(keys_N, 2, 2).bool()
    return torch.where(mirrored_N[:, None, None, None], out.flip(-1), out)


def _seed(key: int) -> None:
    # torch.manual_seed would also reset CUDA's generators, which a fork does not restore
    torch.default_generator.manual_seed(key)


@cache
def build_augment(name: str, image_size: int, *, flip: bool = True) -> BatchAugment:
    """The augmentation ``name`` for uint8 images in memory.

    basic: crop with padding image_size / 8 (4 pixels at 32), plus mirroring where ``flip`` (it must
    keep the class).
    autoaugment (the CIFAR-10 policy), randaugment, trivialaugment: torchvision's, after basic.
    """
    policy = build_policy(name, v2.AutoAugmentPolicy.CIFAR10)
    padding = max(1, image_size // 8)

    def augment(images_NCHW: Tensor, keys_N: Tensor) -> Tensor:
        if name == "none":
            return images_NCHW
        images_NCHW = crop_flip(images_NCHW, keys_N, padding, flip)
        if policy is None:
            return images_NCHW
        out = torch.empty_like(images_NCHW)
        with torch.random.fork_rng(devices=[]):
            for row, key in enumerate(keys_N.tolist()):
                _seed(key)
                # PIL images are as fast as tensors here, and a tensor's mean (for contrast) may
                # depend on the number of threads
                out[row] = F.pil_to_tensor(policy(F.to_pil_image(images_NCHW[row])))
        return out

    return augment


@cache
def build_photo_augment(name: str, image_size: int) -> PhotoAugment:
    """The augmentation ``name`` for photographs of any size; the result is image_size x image_size.

    none: short side to image_size * 256/224, then the centre, as in evaluation.
    basic: RandomResizedCrop and mirroring.
    autoaugment (the ImageNet policy), randaugment, trivialaugment: torchvision's, after basic.

    It moves torch's generator: the caller forks that, once for many images.
    """
    policy = build_policy(name, v2.AutoAugmentPolicy.IMAGENET)
    if name == "none":
        steps = [v2.Resize(round(image_size * 256 / 224)), v2.CenterCrop(image_size)]
    else:
        steps = [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()]
    transform = v2.Compose([*steps, policy] if policy else steps)

    def augment(image: Image.Image, key: int) -> Tensor:
        _seed(key)
        out: Tensor = F.pil_to_tensor(transform(image))
        return out

    return augment


def build_policy(name: str, autoaugment: v2.AutoAugmentPolicy) -> Any | None:
    """torchvision's policy ``name`` for one PIL image; None for "none" and "basic"."""
    if name not in AUGMENTATIONS:
        raise unknown("augmentation", name, AUGMENTATIONS)
    policies = {
        "autoaugment": partial(v2.AutoAugment, autoaugment),
        "randaugment": v2.RandAugment,
        "trivialaugment": v2.TrivialAugmentWide,
    }
    return policies[name]() if name in policies else None
