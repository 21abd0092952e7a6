"""A data set as a run uses it, and how it is made by name."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from conadv.data import SOURCES
from conadv.data.images import BadImage
from conadv.data.splits import MemorySplit, PhotoSplit, Split, choose
from conadv.errors import ConadvError, first_few, unknown

# (what is being done, images done, images in all); called now and then from the calling thread
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """A data set ready for training: uint8 images, ``channels`` x ``image_size`` x ``image_size``.

    ``validation``: images held out of ``train`` to choose settings by, None without. ``name``: its
    row in SOURCES. ``bad``: files that could not be read when images were decoded into memory.
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    validation: Split | None = None
    name: str = ""
    bad: tuple[BadImage, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What a run asks of a data set. ``image_size`` None keeps the size of images in memory."""

    source: str
    dir: Path | None = None
    download: bool = False
    image_size: int | None = None
    train_images: int | None = None
    validation_images: int | None = None
    subset_seed: int = 0
    on_bad_image: str = "error"
    progress: Progress | None = None

    def refuse(self, *names: str) -> None:
        """ConadvError for a setting that was given although this data set has no use for it."""
        for field in fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                raise ConadvError(
                    f"data.{field.name} has no effect with data.source {self.source}. Leave it out."
                )

    def folder(self) -> Path:
        if self.dir is None:
            raise ConadvError(
                f"data.source {self.source} needs a folder. Give data.dir (--data DIR)."
            )
        return self.dir

    def divide(
        self, labels_N: Tensor, class_names: tuple[str, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Sorted indices of the images to train on, and of those held out of them (or None).

        Both have the same share of every class.
        """
        seed, held = self.subset_seed, self.validation_images
        ours = choose(labels_N, self.train_images, class_names, seed, "data.train_images")
        if held is None:
            return ours, None
        theirs = choose(labels_N[ours], held, class_names, seed, "data.validation_images", leave=1)
        kept = torch.ones(len(ours), dtype=torch.bool)
        kept[theirs] = False
        return ours[kept], ours[theirs]


def build_source(source: str, **settings: Any) -> Source:
    """The data set ``source`` of SOURCES. ``settings``: fields of :class:`SourceSettings`.

    Raises ConadvError for everything that is wrong with the folder or the settings.
    """
    if source not in SOURCES:
        raise unknown("data source", source, SOURCES)
    wanted = SourceSettings(source=source, **settings)
    found: Source = pkgutil.resolve_name(SOURCES[source])(wanted)
    return replace(found, name=source)


def check_classes(what: str, labels_N: Tensor, class_names: tuple[str, ...]) -> None:
    """ConadvError unless there are two classes or more, and each has an image."""
    sizes = torch.bincount(labels_N, minlength=len(class_names))
    if len(class_names) < 2:
        raise ConadvError(f"There is only one class in {what}. Training needs two or more.")
    if empty := [class_names[label] for label in (sizes == 0).nonzero().flatten().tolist()]:
        raise ConadvError(
            f"There is no image in {what} of these classes: {first_few(empty)}. Add images or "
            "remove the classes."
        )


def in_memory(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    class_names: tuple[str, ...],
    settings: SourceSettings,
    *,
    flip: bool = True,
) -> Source:
    """A source of (uint8 images_NCHW, labels_N): the subset is taken, then all are resized once."""
    size = settings.image_size or train[0].shape[-1]

    def split(images: Tensor, labels_N: Tensor) -> MemorySplit:
        return MemorySplit(F.resize(images, [size, size], antialias=True), labels_N, flip)

    ours, held = settings.divide(train[1], class_names)
    validation = None if held is None else split(train[0][held], train[1][held])
    images, labels_N = train[0][ours], train[1][ours]
    return Source(
        split(images, labels_N), split(*test), class_names, images.shape[1], size, validation
    )


def on_demand(train: PhotoSplit, test: PhotoSplit, settings: SourceSettings) -> Source:
    """A source of images that are decoded when needed; image_size is 224 unless given."""
    size, names = settings.image_size or 224, train.class_names
    train, test = (replace(split, image_size=size) for split in (train, test))
    ours, held = settings.divide(train.labels, names)
    validation = None if held is None else train.subset(held)
    return Source(train.subset(ours), test, names, 3, size, validation)
