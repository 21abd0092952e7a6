"""The pixel space: eps balls and the box of valid images, seen through the model's normalisation.

Models take (pixel - mean) / std. An eps in [0, 1] pixels is eps / std there, another one for every
channel, and the valid images are the box [(0 - mean) / std, (1 - mean) / std]. Clipping normalised
images to a fixed interval instead, as the released ConAdv code does, moves nearly half of all
values by more than eps (docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from conadv.attacks.fraction import read_fraction
from conadv.errors import ConadvError

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class PixelSpace:
    """Normalisation by mean and std in [0, 1] pixels, per channel or one for all.

    The default is no normalisation: model space is [0, 1] pixels.

    >>> space = PixelSpace(mean=(0.5,), std=(0.25,))
    >>> space.normalize(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    tensor([[[[-2.,  2.]]]])
    """

    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        # Tuples, so that the space can be a key of the cache below.
        object.__setattr__(self, "mean", tuple(map(float, self.mean)))
        object.__setattr__(self, "std", tuple(map(float, self.std)))
        if len(self.mean) != len(self.std) or not self.mean:
            raise ConadvError(
                f"PixelSpace: mean {self.mean} and std {self.std} need one value per channel each."
            )
        if min(self.std) <= 0 or max(map(abs, (*self.mean, *self.std))) > 2:
            raise ConadvError(
                f"PixelSpace: mean {self.mean} and std {self.std} are in [0, 1] pixel units with "
                "std > 0. Divide values meant for 0..255 pixels by 255."
            )

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels (N, C, H, W), uint8 or floats in [0, 1], -> model space in floats."""
        x = pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels
        mean, std, _, _ = self._constants(x)
        return (x - mean).div_(std)

    def to_pixels(self, x: Tensor) -> Tensor:
        """Model space -> floats in [0, 1]."""
        mean, std, _, _ = self._constants(x)
        return x * std + mean

    def clip(self, x: Tensor) -> Tensor:
        """The nearest valid images, elementwise. Changes ``x`` in place and returns it."""
        _, _, low, high = self._constants(x)
        return x.clamp_(low, high)

    def checked(self, x: Tensor) -> Tensor:
        """``x`` detached, after a look at it: what an attack starts with. Raises ConadvError."""
        if not x.is_floating_point():
            raise ConadvError(
                f"The images are {x.dtype}; attacks take what the model takes, floats in its "
                "normalisation. For uint8 pixels that is space.normalize(pixels)."
            )
        if x.device.type == "cpu":
            # Elsewhere it would wait for the device: there the engine checks the first batch only.
            self.check(x)
        return x.detach()

    def check(self, x: Tensor) -> None:
        """ConadvError if ``x`` cannot be in this space: wrong mean or std. Sync point."""
        _, _, low, high = self._constants(x)
        # With room for the rounding of whoever normalised the images.
        if bool(((x < low - 1e-3) | (x > high + 1e-3)).any()):
            raise ConadvError(
                f"Images range from {x.min():.3g} to {x.max():.3g}, outside of {self}, so eps and "
                "clipping would be wrong. Give the normalisation that the images had: "
                "space=PixelSpace(mean, std)."
            )

    def ascend(self, x: Tensor, gradient: Tensor, step_size: float, norm: Norm) -> Tensor:
        """One steepest-ascent step of ``step_size`` pixels; a zero gradient moves nothing.

        linf: x + step_size * sign(g). l2: x + step_size * g / |g|, with g and the length taken in
        pixel units.
        """
        std = self._constants(x)[1]
        if norm == "linf":
            return x + gradient.sign().mul_(step_size / std)
        pixel_gradient = gradient / std  # chain rule: d loss / d pixel = (d loss / d x) / std
        # The bound keeps a zero gradient from becoming NaN: 0 / tiny is 0.
        length = pixel_gradient.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
        return x + pixel_gradient.mul_(_per_image(step_size / length, x)).div_(std)

    def project(self, x: Tensor, origin: Tensor, eps: float, norm: Norm) -> Tensor:
        """Into the eps ball around ``origin``, then into the box, which only brings x nearer."""
        std = self._constants(x)[1]
        delta = x - origin
        if norm == "linf":
            delta = torch.clamp(delta, -eps / std, eps / std)
        else:
            length = (delta * std).flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
            delta *= _per_image((eps / length).clamp_max(1), x)
        return self.clip(origin + delta)

    def random_start(self, x: Tensor, eps: float, norm: Norm, generator: torch.Generator) -> Tensor:
        """A random valid point of each image's eps ball, uniform in it."""
        std = self._constants(x)[1]
        if norm == "linf":
            draw = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            return self.clip(x + (2 * draw - 1).mul_(eps / std))
        # A normal direction is uniform on the sphere; the root makes radii uniform in the volume.
        direction = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        draw = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
        radius = draw ** (1 / x[0].numel())
        length = direction.flatten(1).norm(dim=1)
        return self.clip(x + direction.mul_(_per_image(eps * radius / length, x)).div_(std))

    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if x.dim() < 2:
            raise ConadvError(f"Images are (N, C, ...), not of shape {tuple(x.shape)}.")
        if len(self.mean) not in (1, x.shape[1]):
            raise ConadvError(
                f"PixelSpace has {len(self.mean)} channels, the images have {x.shape[1]}."
            )
        return _constants(self, x.dtype, x.device, x.dim())


@lru_cache(maxsize=64)
def _constants(
    space: PixelSpace, dtype: torch.dtype, device: torch.device, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, std, low and high as (1, C, 1, ...), made once per kind of images."""
    shape = (1, -1, *[1] * (dim - 2))
    mean = torch.tensor(space.mean, dtype=dtype, device=device).view(shape)
    std = torch.tensor(space.std, dtype=dtype, device=device).view(shape)
    # the same arithmetic as normalize, so that black and white stay exactly on the edge of the box
    return mean, std, (0 - mean) / std, (1 - mean) / std


def _per_image(value_N: Tensor, x: Tensor) -> Tensor:
    return value_N.view(-1, *[1] * (x.dim() - 1))


def pixel_size(name: str, value: float | str, norm: Norm) -> float:
    """``value``, a number or text such as "4/255", as a size in [0, 1] pixel units.

    Raises ConadvError for one that cannot be meant, and for an unknown norm.
    """
    if norm not in ("linf", "l2"):
        raise ConadvError(f"norm {norm!r} is not known. Use 'linf' or 'l2'.")
    if isinstance(value, str):
        try:
            size = read_fraction(value)
        except ValueError as error:
            raise ConadvError(f"{name}: {error}.") from error
    else:
        size = as_number(name, value)
    if not size >= 0:
        raise ConadvError(f"{name} = {size} must be 0 or more.")
    if norm == "linf" and size >= 1:
        raise ConadvError(f"{name} = {size:g} is in [0, 1] pixel units. Did you mean {size:g}/255?")
    return size


def as_number(name: str, value: object) -> float:
    """``value`` as a float. ConadvError for what is not a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConadvError(f"{name} = {value!r} is not a number.")
    return float(value)
