"""The two kinds of image store: decoded in memory, or decoded from files when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from conadv.data.augment import build_augment, build_photo_augment
from conadv.data.images import BadFile, BadImage, no_stand_in, stand_ins
from conadv.errors import ConadvError


class Draw(NamedTuple):
    """One augmented view of a batch: the augmentation's name and the key of each sample."""

    augment: str
    keys_N: Tensor


class Split(Protocol):
    """One split of a data set: images 0..N-1 with labels, N int64. Sent to worker processes, so it must pickle."""

    @property
    def labels(self) -> Tensor: ...

    def views(
        self, indices_N: Tensor, draws: Mapping[str, Draw], bad: list[BadFile] | None = None
    ) -> dict[str, Tensor]:
        """uint8 N,C,H,W for every view in ``draws``: a pure function of its arguments.

        An image that cannot be read is a ConadvError; with ``bad`` it is noted there, and another of its class stands
        in for it (:func:`conadv.data.images.stand_ins`).
        """
        ...

    def readable(
        self, indices_N: Tensor, bad: list[BadFile] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(uint8 n,C,H,W without augmentation, as evaluation sees the images; their numbers).

        An image that cannot be read is a ConadvError; with ``bad`` it is noted there and left out.
        """
        ...

    def subset(self, indices_N: Tensor) -> Split:
        """The images with these numbers only."""
        ...


@dataclass(frozen=True)
class MemorySplit:
    """Images held as one uint8 tensor N,C,H,W with H = W. ``flip``: mirroring an image keeps its class.

    ``unread``: numbers of images whose files could not be read.
    """

    images: Tensor
    labels: Tensor
    flip: bool = True
    unread: Mapping[int, BadFile] = field(default_factory=dict)

    def views(
        self, indices_N: Tensor, draws: Mapping[str, Draw], bad: list[BadFile] | None = None
    ) -> dict[str, Tensor]:
        if self.unread:
            assert bad is not None  # they are only there where images may be left out
            bad += [self.unread[i] for i in indices_N.tolist() if i in self.unread]
            indices_N = torch.tensor([self._stand_in(i) for i in indices_N.tolist()])
        images, size = self.images[indices_N], self.images.shape[-1]
        return {
            view: build_augment(draw.augment, size, flip=self.flip)(images, draw.keys_N)
            for view, draw in draws.items()
        }

    def _stand_in(self, index: int) -> int:
        if index not in self.unread:
            return index
        other = next((i for i in stand_ins(self.labels, index) if i not in self.unread), None)
        if other is None:
            raise no_stand_in(f"number {int(self.labels[index])}")
        return other

    def readable(
        self, indices_N: Tensor, bad: list[BadFile] | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.unread:
            assert bad is not None
            bad += [self.unread[i] for i in indices_N.tolist() if i in self.unread]
            kept = [i for i in indices_N.tolist() if i not in self.unread]
            indices_N = torch.tensor(kept, dtype=torch.int64)
        return self.images[indices_N], indices_N

    def subset(self, indices_N: Tensor) -> MemorySplit:
        numbers = enumerate(indices_N.tolist())
        unread = {new: self.unread[old] for new, old in numbers if old in self.unread}
        return MemorySplit(self.images[indices_N], self.labels[indices_N], self.flip, unread)


class Photos(Protocol):
    """Encoded images with labels, N int64: files of a folder, or rows of a table. It must pickle."""

    @property
    def labels(self) -> Tensor: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def read(self, index: int) -> Image.Image:
        """RGB. Raises BadImage where it cannot be decoded."""
        ...

    def bad(self, index: int, error: BadImage) -> BadFile: ...

    def subset(self, indices: Tensor) -> Photos: ...


@dataclass(frozen=True)
class PhotoSplit:
    """Encoded images, each decoded when needed, once for all its views. Memory: one decoded photograph at a time."""

    listing: Photos
    image_size: int

    @property
    def labels(self) -> Tensor:
        return self.listing.labels

    def views(
        self, indices_N: Tensor, draws: Mapping[str, Draw], bad: list[BadFile] | None = None
    ) -> dict[str, Tensor]:
        out = {view: self._empty(len(indices_N)) for view in draws}
        made = [
            (out[view], build_photo_augment(draw.augment, self.image_size), draw.keys_N.tolist())
            for view, draw in draws.items()
        ]
        with torch.random.fork_rng(devices=[]):
            for row, index in enumerate(indices_N.tolist()):
                image = self._read(index, bad)
                if image is None:
                    image = self._stand_in(index, bad)
                for images, augment, keys in made:
                    images[row] = augment(image, keys[row])
        return out

    def _empty(self, count: int) -> Tensor:
        # decoded images have their channels last: so rows are copied as they lie, and the device rearranges them
        shape = (count, 3, self.image_size, self.image_size)
        return torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)

    def _read(self, index: int, bad: list[BadFile] | None) -> Image.Image | None:
        """The image, or None once it is noted in ``bad`` that it cannot be read."""
        try:
            return self.listing.read(index)
        except BadImage as error:
            if bad is None:
                raise
            bad.append(self.listing.bad(index, error))
            return None

    def _stand_in(self, index: int, bad: list[BadFile] | None) -> Image.Image:
        for other in stand_ins(self.labels, index):
            if (image := self._read(other, bad)) is not None:
                return image
        raise no_stand_in(self.listing.class_names[int(self.labels[index])])

    def readable(
        self, indices_N: Tensor, bad: list[BadFile] | None = None
    ) -> tuple[Tensor, Tensor]:
        resize = build_photo_augment("none", self.image_size)
        images = self._empty(len(indices_N))
        kept: list[int] = []
        with torch.random.fork_rng(devices=[]):
            for index in indices_N.tolist():
                if (image := self._read(index, bad)) is not None:
                    images[len(kept)] = resize(image, 0)  # draws nothing
                    kept.append(index)
        return images[: len(kept)], torch.tensor(kept, dtype=torch.int64)

    def subset(self, indices_N: Tensor) -> PhotoSplit:
        return PhotoSplit(self.listing.subset(indices_N), self.image_size)


def choose(
    labels_N: Tensor,
    count: int | None,
    class_names: tuple[str, ...],
    *,
    seed: int = 0,
    setting: str = "data.train_images",
) -> Tensor:
    """Sorted indices of a stratified subset of ``count`` samples, chosen by ``seed``; all of them for None.

    Every class keeps its share to within less than one sample: what rounding down leaves over goes to the classes with
    the largest remainders. Raises ConadvError for more samples than there are, and for a class left without any.
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
