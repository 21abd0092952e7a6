"""The two kinds of image store: decoded in memory, or decoded from files when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from conadv.data.augment import build_augment, build_photo_augment
from conadv.data.images import BadImage, Photos, stand_ins
from conadv.errors import ConadvError


class Draw(NamedTuple):
    """One augmented view of a batch: the augmentation's name and the key of each sample."""

    augment: str
    keys_N: Tensor


Draws = Mapping[str, Draw]
Bad = list[BadImage] | None  # where images that cannot be read are noted; None: they are raised


class _Split(ABC):
    """Images 0..N-1 of a data set with ``labels``, N int64. Sent to worker processes, so it must pickle.

    ``views(indices_N, draws, bad)``: uint8 N,C,H,W for every view in ``draws``, a pure function of its arguments. With
    ``bad``, another image of its class stands in for one that cannot be read.
    ``readable(indices_N, bad)``: (uint8 n,C,H,W without augmentation, as evaluation sees the images; their numbers).
    With ``bad``, an image that cannot be read is left out.
    ``subset(indices_N)``: the images with these numbers only.
    """

    labels: Tensor

    @abstractmethod
    def _read(self, index: int) -> Any:
        """One image; BadImage where it cannot be read."""

    def _try(self, index: int, bad: Bad) -> Any:
        """What ``_read`` returns, or None once it is noted that it cannot."""
        try:
            return self._read(index)
        except BadImage as error:
            if bad is None:
                raise
            bad.append(error)
            return None

    def _or_stand_in(self, index: int, bad: Bad) -> Any:
        for other in chain([index], stand_ins(self.labels, index)):
            if (found := self._try(other, bad)) is not None:
                return found
        assert bad
        raise ConadvError(f"No image of its class can be read in place of another. {bad[-1]}")


@dataclass(frozen=True)
class MemorySplit(_Split):
    """Images held as one uint8 tensor N,C,H,W with H = W. ``flip``: mirroring an image keeps its class.

    ``unread``: why images have no pixels, by their numbers.
    """

    images: Tensor
    labels: Tensor
    flip: bool = True
    unread: Mapping[int, BadImage] = field(default_factory=dict)

    def _read(self, index: int) -> int:
        if index in self.unread:
            raise self.unread[index]
        return index

    def views(self, indices_N: Tensor, draws: Draws, bad: Bad = None) -> dict[str, Tensor]:
        if self.unread:
            indices_N = torch.tensor([self._or_stand_in(i, bad) for i in indices_N.tolist()])
        images, size = self.images[indices_N], self.images.shape[-1]
        return {
            view: build_augment(draw.augment, size, flip=self.flip)(images, draw.keys_N)
            for view, draw in draws.items()
        }

    def readable(self, indices_N: Tensor, bad: Bad = None) -> tuple[Tensor, Tensor]:
        if self.unread:
            kept = [i for i in indices_N.tolist() if self._try(i, bad) is not None]
            indices_N = torch.tensor(kept, dtype=torch.int64)
        return self.images[indices_N], indices_N

    def subset(self, indices_N: Tensor) -> MemorySplit:
        numbers = enumerate(indices_N.tolist())
        unread = {new: self.unread[old] for new, old in numbers if old in self.unread}
        return MemorySplit(self.images[indices_N], self.labels[indices_N], self.flip, unread)


@dataclass(frozen=True)
class PhotoSplit(_Split):
    """Encoded images, each decoded when needed, once for all its views. Memory: one decoded photograph at a time."""

    listing: Photos
    image_size: int

    @property
    def labels(self) -> Tensor:  # type: ignore[override]
        return self.listing.labels

    def _read(self, index: int) -> Image.Image:
        return self.listing.read(index)

    def views(self, indices_N: Tensor, draws: Draws, bad: Bad = None) -> dict[str, Tensor]:
        out = {view: self._empty(len(indices_N)) for view in draws}
        made = [
            (out[view], build_photo_augment(draw.augment, self.image_size), draw.keys_N.tolist())
            for view, draw in draws.items()
        ]
        with torch.random.fork_rng(devices=[]):
            for row, index in enumerate(indices_N.tolist()):
                image = self._or_stand_in(index, bad)
                for images, augment, keys in made:
                    images[row] = augment(image, keys[row])
        return out

    def _empty(self, count: int) -> Tensor:
        # decoded images have their channels last: so rows are copied as they lie, and the device rearranges them
        shape = (count, 3, self.image_size, self.image_size)
        return torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)

    def readable(self, indices_N: Tensor, bad: Bad = None) -> tuple[Tensor, Tensor]:
        resize = build_photo_augment("none", self.image_size)
        images = self._empty(len(indices_N))
        kept: list[int] = []
        with torch.random.fork_rng(devices=[]):
            for index in indices_N.tolist():
                if (image := self._try(index, bad)) is not None:
                    images[len(kept)] = resize(image, 0)  # draws nothing
                    kept.append(index)
        return images[: len(kept)], torch.tensor(kept, dtype=torch.int64)

    def subset(self, indices_N: Tensor) -> PhotoSplit:
        return PhotoSplit(self.listing.subset(indices_N), self.image_size)


Split = MemorySplit | PhotoSplit


def choose(
    labels_N: Tensor, count: int | None, class_names: tuple[str, ...], *, seed: int, setting: str
) -> Tensor:
    """Sorted indices of a stratified subset of ``count`` samples, chosen by ``seed``; all of them for None.

    Every class keeps its share to within less than one sample: what rounding down leaves over goes to the classes with
    the largest remainders. Raises ConadvError, naming ``setting``, for more samples than there are, and for a class
    left without any.
    """
    if count is None:
        return torch.arange(len(labels_N))
    if count > len(labels_N):
        raise ConadvError(
            f"{setting} {count} is larger than the training set of {len(labels_N)} images. "
            "Choose a smaller number, or leave it out."
        )
    sizes = torch.bincount(labels_N, minlength=len(class_names))
    taken = sizes * count // len(labels_N)
    remainder = sizes * count % len(labels_N)
    taken[torch.argsort(remainder, descending=True, stable=True)[: count - int(taken.sum())]] += 1
    if not taken.all():
        raise ConadvError(
            f"{setting} {count} leaves no image of class {class_names[int(taken.argmin())]!r}. "
            f"Take more: there are {len(class_names)} classes."
        )
    shuffled = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[torch.argsort(labels_N[shuffled], stable=True)]
    place = torch.arange(len(labels_N)) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return by_class[place < torch.repeat_interleave(taken, sizes)].sort().values
