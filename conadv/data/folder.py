"""Image folders: which files there are, decoded when they are needed or all into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from conadv.data.downloads import from_torchvision
from conadv.data.images import BadImage, Files
from conadv.data.source import Source, SourceSettings, check_classes, on_demand
from conadv.data.splits import MemorySplit, PhotoSplit, no_stand_in, stand_ins
from conadv.errors import ConadvError, first_few, printable

CHUNK = 256  # images that a thread decodes at a time: small ones would only wait for each other


def folder(settings: SourceSettings) -> Source:
    """Any image folder, photographs of any size, decoded when they are needed."""
    settings.refuse("download")
    return on_demand(*scan_folder(settings.folder()), settings)


def cifar10(settings: SourceSettings) -> Source:
    """CIFAR-10, or any folder of small images, held in memory.

    With ``download`` it is torchvision's copy of CIFAR-10.
    """
    if settings.download:
        return from_torchvision(datasets.CIFAR10, settings)
    train, test = scan_folder(settings.folder())
    names = train.class_names
    ours, held = settings.divide(train.labels, names)
    trained, bad = decode(train.subset(ours), settings, stand_in=True)
    tested, more = decode(test, settings)
    validation = None
    if held is not None:
        validation, others = decode(train.subset(held), settings)
        more += others
    size, other_size = trained.images.shape[-1], tested.images.shape[-1]
    if size != other_size:
        raise ConadvError(
            f"The images in train are {size} pixels wide and those in {test.split} {other_size}. "
            "Give data.image_size to bring all images to one size."
        )
    return Source(trained, tested, names, 3, size, validation, bad=(*bad, *more))


def scan_folder(directory: Path) -> tuple[PhotoSplit, PhotoSplit]:
    """The files of DIR/train and DIR/test (or DIR/val), which must hold the same classes."""
    try:
        return _scan_folder(directory)
    except OSError as error:
        raise ConadvError(
            f"Cannot read the folder {printable(error.filename)}: {error.strerror}. "
            "Check its permissions."
        ) from error


def _scan_folder(directory: Path) -> tuple[PhotoSplit, PhotoSplit]:
    held, problem = evaluation_folder(directory), None
    if not directory.is_dir():
        problem = "does not exist"
    elif not (directory / "train").is_dir():
        problem = "has no folder train"
    elif held is None:
        problem = "has neither a folder test nor val"
    if problem or held is None:
        raise ConadvError(
            f"The data folder {printable(directory)} {problem}. --data DIR names another one, with "
            "DIR/train/<class>/<image files>, and the same below DIR/test or DIR/val."
        )
    train, test = scan_split(directory / "train"), scan_split(held)
    ours, theirs = set(train.class_names), set(test.class_names)
    if ours != theirs:
        raise ConadvError(
            f"{printable(directory)} has different classes in train and {held.name} (only in "
            f"train: {first_few(sorted(ours - theirs))}; only in {held.name}: "
            f"{first_few(sorted(theirs - ours))}). Give both the same class folders."
        )
    return train, test


def evaluation_folder(directory: Path) -> Path | None:
    """DIR/test or DIR/val: the first that has class folders, for ImageNet's own test has none."""
    there = [directory / name for name in ("test", "val") if (directory / name).is_dir()]
    return next(filter(class_folders, there), there[-1] if there else None)


def class_folders(root: Path) -> list[str]:
    """The names of the folders in ``root``, sorted."""
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not _is_litter(e.name))


def _is_litter(name: str) -> bool:
    """Whether another program made a file or folder: a notebook, macOS, a disk station."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")


def scan_split(root: Path) -> PhotoSplit:
    """Every image file below ``root``/CLASS, in the order of torchvision's ImageFolder.

    Raises ConadvError where a class has no image, a folder cannot be read, or a link leads back to
    its own folder.
    """
    classes = class_folders(root)
    if not classes:
        raise ConadvError(
            f"{printable(root)} has no class folders. Move each image into a folder named by its "
            "class; for ImageNet's validation images a script such as valprep.sh does it."
        )
    files = [class_files(root / name) for name in classes]
    labels_N = torch.repeat_interleave(torch.tensor([len(found) for found in files]))
    check_classes(str(root), labels_N, tuple(classes))
    skip = len(os.path.join(root, ""))  # noqa: PTH118
    keys = np.array([os.fsencode(path[skip:]) for path in chain(*files)])
    return PhotoSplit(root.parent, root.name, keys, labels_N, tuple(classes), Files(root))


def class_files(folder: Path) -> list[str]:
    """The paths of all image files below ``folder``, through links to folders too."""

    def stop(error: OSError) -> None:
        raise error

    found = []
    for where, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        folders[:] = [name for name in folders if not _is_litter(name)]  # do not descend
        parents = map(os.path.realpath, Path(where).parents)
        if os.path.islink(where) and os.path.realpath(where) in parents:  # noqa: PTH114
            raise ConadvError(
                f"{printable(where)} is a link to a folder that it lies in. Remove the link."
            )
        images = (name for name in names if name.lower().endswith(IMG_EXTENSIONS))
        found += [(where, name) for name in images if not _is_litter(name)]
    return [os.path.join(where, name) for where, name in sorted(found)]  # noqa: PTH118


def decode(
    photos: PhotoSplit, settings: SourceSettings, stand_in: bool = False
) -> tuple[MemorySplit, list[BadImage]]:
    """All images of ``photos`` in memory, and what cannot be read, with on_bad_image skip.

    With ``image_size`` the centre square of each is resized to it (antialiased); without, all must
    be square and of one size. stand_in: an unreadable image becomes a copy of another of its class,
    as it does in a split that is decoded on demand; otherwise it is left out.
    """
    size, count = settings.image_size, len(photos.labels)
    unread: dict[int, BadImage] = {}

    def load(index: int) -> NDArray[np.uint8] | None:
        try:
            image = photos.read(index)
        except BadImage as error:
            if settings.on_bad_image != "skip":
                raise
            unread[index] = error
            return None
        if size is not None and image.size != (size, size):
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        return np.asarray(image)

    def load_all() -> Iterator[NDArray[np.uint8] | None]:
        with ThreadPoolExecutor() as pool:
            parts = (range(n, min(n + CHUNK, count)) for n in range(0, count, CHUNK))
            for done, part in enumerate(pool.map(lambda part: list(map(load, part)), parts), 1):
                yield from part
                if settings.progress:
                    settings.progress(f"decode {photos.split}", min(done * CHUNK, count), count)

    pixels: NDArray[Any] | None = None
    for index, image in enumerate(load_all()):
        if image is None:
            continue
        if pixels is None:
            pixels = np.zeros((count, len(image), len(image), 3), np.uint8)
        if image.shape != pixels.shape[1:]:
            height, width, _ = image.shape
            raise ConadvError(
                f"{photos.name(index)} is {width} x {height} pixels, where all images must be "
                "square and of one size. Give data.image_size to crop and resize them."
            )
        pixels[index] = image
    if pixels is None:
        raise unread[0]
    for index in unread if stand_in else ():
        other = next((n for n in stand_ins(photos.labels, index) if n not in unread), None)
        if other is None:
            raise no_stand_in(unread[index])
        pixels[index] = pixels[other]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    split, bad = MemorySplit(images, photos.labels), list(unread.values())
    if bad and not stand_in:
        split = split.subset(torch.tensor([n for n in range(count) if n not in unread]))
    return split, bad
