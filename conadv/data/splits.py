"""The two kinds of image store: decoded in memory, or decoded from files when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from conadv import rng
from conadv.data.augment import build_augment, build_photo_augment
from conadv.data.images import BadImage, Store, decode_rgb, why
from conadv.errors import ConadvError, printable


class Draw(NamedTuple):
    """One augmented view of a batch: the augmentation's name and the key of each sample."""

    augment: str
    keys_N: Tensor


Draws = Mapping[str, Draw]
Bad = list[BadImage] | None  # where images that cannot be read are noted; None: they are raised

# A split holds images 0..N-1 of a data set and their ``labels``, N int64. Sent to workers, so it
# must pickle.
#
# views(indices_N, draws, bad): uint8 N,C,H,W for every view in ``draws``, a pure function of its
# arguments. With ``bad``, another image of its class stands in for one that cannot be read.
# readable(indices_N, bad): (uint8 n,C,H,W without augmentation, as evaluation sees the images;
# their numbers). With ``bad``, an image that cannot be read is left out.
# subset(indices_N): the images with these numbers only.


@dataclass(frozen=True)
class MemorySplit:
    """Images held as one uint8 tensor N,C,H,W with H = W.

    flip: mirroring an image keeps its class.
    """

    images: Tensor
    labels: Tensor
    flip: bool = True

    def views(self, indices_N: Tensor, draws: Draws, bad: Bad = None) -> dict[str, Tensor]:
        images, size = self.images[indices_N], self.images.shape[-1]
        return {
            view: build_augment(draw.augment, size, flip=self.flip)(images, draw.keys_N)
            for view, draw in draws.items()
        }

    def readable(self, indices_N: Tensor, bad: Bad = None) -> tuple[Tensor, Tensor]:
        return self.images[indices_N], indices_N

    def subset(self, indices_N: Tensor) -> MemorySplit:
        return replace(self, images=self.images[indices_N], labels=self.labels[indices_N])


@dataclass(frozen=True)
class PhotoSplit:
    """Encoded images, each decoded when needed, once for all its views, one at a time.

    keys: N names of files in bytes below ``folder``/``split``, or numbers of rows. An array and not
    a list: counting references would make workers copy the memory of a list page by page.
    """

    folder: Path
    split: str
    keys: NDArray[Any]
    labels: Tensor
    class_names: tuple[str, ...]
    store: Store
    image_size: int = 224

    def name(self, index: int) -> str:
        """The path below ``folder``, printable."""
        key = self.keys[index]
        name = printable(os.fsdecode(key)) if isinstance(key, bytes) else f"row {key}"
        return f"{self.split}/{name}"

    def read(self, index: int) -> Image.Image:
        """The image as RGB; BadImage, which says why, where it cannot be decoded."""
        try:
            with self.store.open(self.keys[index]) as file:
                return decode_rgb(file)
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise BadImage(self.folder, self.name(index), why(error)) from error

    def _try(self, index: int, bad: Bad) -> Image.Image | None:
        """The image, or None once it is noted that it cannot be read."""
        try:
            return self.read(index)
        except BadImage as error:
            if bad is None:
                raise
            bad.append(error)
            return None

    def _or_stand_in(self, index: int, bad: Bad) -> Image.Image:
        for other in chain([index], stand_ins(self.labels, index)):
            if (found := self._try(other, bad)) is not None:
                return found
        assert bad
        raise no_stand_in(bad[-1])

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
        # decoded images have their channels last: rows are copied as they lie
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
        return replace(self, keys=self.keys[indices_N.numpy()], labels=self.labels[indices_N])


Split = MemorySplit | PhotoSplit


def stand_ins(labels_N: Tensor, index: int) -> Iterator[int]:
    """The images that may take the place of image ``index``, best first: all others of its class.

    A function of the labels and ``index`` alone, so every rank, worker and epoch takes the same
    one, and so does a resumed run: training is as if the file were a copy of the other image.
    """
    same = (labels_N == labels_N[index]).nonzero().flatten()
    begin = rng.derive(0, "stand-in", index) % len(same)
    yield from (other for other in same.roll(-begin).tolist() if other != index)


def no_stand_in(last: BadImage) -> ConadvError:
    return ConadvError(f"No image of its class can be read in place of another. {last}")


def choose(
    labels_N: Tensor,
    count: int | None,
    class_names: tuple[str, ...],
    seed: int,
    setting: str,
    leave: int = 0,
) -> Tensor:
    """Sorted indices of a stratified subset of ``count`` samples, by ``seed``; None: all of them.

    Every class keeps its share to within less than one sample: what rounding down leaves over goes
    to the classes with the largest remainders. Raises ConadvError, naming ``setting``, for more
    samples than there are, and for a class that gets none or keeps fewer than ``leave``.
    """
    total = len(labels_N)
    if count is None:
        return torch.arange(total)
    sizes = torch.bincount(labels_N, minlength=len(class_names))
    if (fewest := int(sizes.min())) <= leave:  # no number would help
        raise ConadvError(
            f"Class {printable(class_names[int(sizes.argmin())])!r} has {fewest} image(s), too few "
            f"for {setting}. Add images to the class or remove it, or leave {setting} out."
        )
    if count > total:
        raise ConadvError(
            f"{setting} {count} is larger than the training set of {total} images. "
            "Choose a smaller number, or leave it out."
        )
    taken = sizes * count // total
    remainder = sizes * count % total
    taken[torch.argsort(remainder, descending=True, stable=True)[: count - int(taken.sum())]] += 1
    if not taken.all():
        enough = -(-total // fewest)  # from here on the share of the smallest class is an image
        raise ConadvError(
            f"{setting} {count} takes no image of class "
            f"{printable(class_names[int(taken.argmin())])!r}. Choose at least {enough}."
        )
    if (left := sizes - taken).min() < leave:
        raise ConadvError(
            f"{setting} {count} leaves no image of class "
            f"{printable(class_names[int(left.argmin())])!r} to train on. Choose a smaller number."
        )
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[torch.argsort(labels_N[shuffled], stable=True)]
    place = torch.arange(total) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return by_class[place < torch.repeat_interleave(taken, sizes)].sort().values
