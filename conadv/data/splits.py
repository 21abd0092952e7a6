"""The two kinds of image store: decoded in memory, or decoded from files when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from conadv.config.schema import AugmentName
from conadv.data.augment import build_augment, build_photo_augment, sample_keys
from conadv.data.files import BadFile, BadImage, no_stand_in, stand_ins
from conadv.errors import ConadvError


class Draw(NamedTuple):
    """One augmented view of a batch: the augmentation's name and the key of each sample."""

    augment: AugmentName
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
        in for it (:func:`conadv.data.files.stand_ins`).
        """
        ...

    def plain(self, indices_N: Tensor) -> Tensor:
        """uint8 N,C,H,W without augmentation, as evaluation sees the images."""
        ...

    def readable(self, indices_N: Tensor, bad: list[BadFile]) -> tuple[Tensor, Tensor]:
        """(``plain`` images, their numbers) of those that can be read; the others are noted in ``bad``."""
        ...

    def subset(self, indices_N: Tensor) -> Split:
        """The images with these numbers only."""
        ...


@dataclass(frozen=True)
class MemorySplit:
    """Images held as one uint8 tensor N,C,H,W with H = W. ``flip``: mirroring an image keeps its class.

    ``bad``: numbers of images whose files could not be read.
    """

    images: Tensor
    labels: Tensor
    flip: bool = True
    bad: Mapping[int, BadFile] = field(default_factory=dict)

    def views(
        self, indices_N: Tensor, draws: Mapping[str, Draw], bad: list[BadFile] | None = None
    ) -> dict[str, Tensor]:
        if self.bad:
            indices_N = torch.tensor([self._usable(i, bad) for i in indices_N.tolist()])
        images, size = self.images[indices_N], self.images.shape[-1]
        return {
            v: build_augment(d.augment, size, flip=self.flip)(images, d.keys_N)
            for v, d in draws.items()
        }

    def _usable(self, index: int, bad: list[BadFile] | None) -> int:
        if index not in self.bad:
            return index
        if bad is not None:
            bad.append(self.bad[index])
        for other in stand_ins(self.labels, index):
            if other not in self.bad:
                return other
        raise no_stand_in(f"number {int(self.labels[index])}")

    def plain(self, indices_N: Tensor) -> Tensor:
        return self.images[indices_N]

    def readable(self, indices_N: Tensor, bad: list[BadFile]) -> tuple[Tensor, Tensor]:
        bad += [self.bad[i] for i in indices_N.tolist() if i in self.bad]
        kept_N = indices_N[
            torch.tensor([i not in self.bad for i in indices_N.tolist()], dtype=torch.bool)
        ]
        return self.plain(kept_N), kept_N

    def subset(self, indices_N: Tensor) -> MemorySplit:
        bad = {new: self.bad[old] for new, old in enumerate(indices_N.tolist()) if old in self.bad}
        return MemorySplit(self.images[indices_N], self.labels[indices_N], self.flip, bad)


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
        shape = (len(indices_N), 3, self.image_size, self.image_size)
        # decoded images have their channels last: so rows are copied as they lie, and the device rearranges them
        out = {
            view: torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
            for view in draws
        }
        made = [
            (out[view], build_photo_augment(draw.augment, self.image_size), draw.keys_N.tolist())
            for view, draw in draws.items()
        ]
        with torch.random.fork_rng(devices=[]):
            for row, index in enumerate(indices_N.tolist()):
                image = self.listing.read(index) if bad is None else self._image(index, bad)
                for images, augment, keys in made:
                    images[row] = augment(image, keys[row])
        return out

    def _image(self, index: int, bad: list[BadFile]) -> Image.Image:
        """The image, or the first that can stand in for it."""
        image = self._try(index, bad)
        others = stand_ins(self.labels, index)
        while image is None:
            other = next(others, None)
            if other is None:
                raise no_stand_in(self.listing.class_names[int(self.labels[index])])
            image = self._try(other, bad)
        return image

    def _try(self, index: int, bad: list[BadFile]) -> Image.Image | None:
        try:
            return self.listing.read(index)
        except BadImage as error:
            bad.append(self.listing.bad(index, error))
            return None

    def plain(self, indices_N: Tensor) -> Tensor:
        keys_N = sample_keys(0, 0, "plain", indices_N)  # "none" draws nothing from them
        return self.views(indices_N, {"plain": Draw("none", keys_N)})["plain"]

    def readable(self, indices_N: Tensor, bad: list[BadFile]) -> tuple[Tensor, Tensor]:
        resize = build_photo_augment("none", self.image_size)
        with torch.random.fork_rng(devices=[]):
            found = [
                (i, resize(image, 0))
                for i in indices_N.tolist()
                if (image := self._try(i, bad)) is not None
            ]
        images = [image for _, image in found] or [torch.empty(0, dtype=torch.uint8)]
        return torch.stack(images), torch.tensor([i for i, _ in found], dtype=torch.int64)

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
            f"{setting} {count} is larger than the training set of {len(labels_N)} images. Choose a smaller number, "
            "or leave it out."
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


def hold_out(
    train: Split, count: int, class_names: tuple[str, ...], *, seed: int = 0
) -> tuple[Split, Split]:
    """(what is left to train on, ``count`` validation images): a stratified choice by ``seed``.

    Raises ConadvError where either side would be left without a class.
    """
    chosen = choose(train.labels, count, class_names, seed=seed, setting="data.validation_images")
    kept = torch.ones(len(train.labels), dtype=torch.bool)
    kept[chosen] = False
    rest = kept.nonzero().flatten()
    sizes = torch.bincount(train.labels[rest], minlength=len(class_names))
    if not sizes.all():
        raise ConadvError(
            f"data.validation_images {count} leaves no image of class {class_names[int(sizes.argmin())]!r} to train "
            f"on: there are {len(train.labels)} images. Hold out fewer."
        )
    return train.subset(rest), train.subset(chosen)
