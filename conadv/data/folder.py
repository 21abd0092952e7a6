"""Image folders: which files there are, decoded when they are needed or all into memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from conadv.data.downloads import from_torchvision
from conadv.data.images import BadImage, Photos, open_file
from conadv.data.source import Source, SourceSettings, check_classes, on_demand
from conadv.data.splits import MemorySplit
from conadv.errors import ConadvError, printable


def folder(settings: SourceSettings) -> Source:
    """Any image folder, photographs of any size, decoded when they are needed."""
    settings.refuse("download")
    return on_demand(*scan_folder(settings.folder()), settings)


def cifar10(settings: SourceSettings) -> Source:
    """CIFAR-10, or any folder of small images, held in memory; with ``download`` torchvision's copy of CIFAR-10."""
    if settings.download:
        return from_torchvision(datasets.CIFAR10, settings)
    train, test = scan_folder(settings.folder())
    train = train.subset(settings.chosen(train.labels, train.class_names))
    ours, theirs = decode(train, settings), decode(test, settings)
    size, other = ours.images.shape[-1], theirs.images.shape[-1]
    if size != other:
        raise ConadvError(
            f"The images in train are {size} pixels wide and those in {test.split} {other}. "
            "Give data.image_size to bring all images to one size."
        )
    return Source(ours, theirs, train.class_names, channels=3, image_size=size)


def scan_folder(directory: Path) -> tuple[Photos, Photos]:
    """The files of DIR/train and DIR/test (or DIR/val), which must hold the same classes, two or more."""
    held = evaluation_folder(directory)
    problem, hint = None, ""
    if not directory.is_dir():
        problem = "does not exist"
    elif not (directory / "train").is_dir():
        problem = "has no folder train"
        inside = directory / "Data" / "CLS-LOC"  # as ImageNet's archive unpacks
        hint = f" Did you mean {printable(inside)}?" if (inside / "train").is_dir() else ""
    elif held is None:
        problem = "has neither a folder test nor val"
    if problem or held is None:
        raise ConadvError(
            f"The data folder {printable(directory)} {problem}. {layout_of(directory)}{hint}"
        )
    train, test = scan_split(directory / "train"), scan_split(held)
    if train.class_names != test.class_names:
        ours, theirs = set(train.class_names), set(test.class_names)
        raise ConadvError(
            f"{directory} has different classes in train and {held.name} (only in train: "
            f"{_some(ours - theirs)}; only in {held.name}: {_some(theirs - ours)}). "
            "Give both the same class folders."
        )
    return train, test


def layout_of(directory: Path) -> str:
    where = printable(directory)
    return f"Expected {where}/train/<class>/<image files>, and the same below test or val."


def _some(names: set[str]) -> str:
    shown = ", ".join(map(printable, sorted(names)[:3])) or "none"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def evaluation_folder(directory: Path) -> Path | None:
    """DIR/test or DIR/val: the first with class folders, as ImageNet's own test folder has none, nor any labels.

    Val before test where neither has any; None without both.
    """
    there = [directory / name for name in ("test", "val") if (directory / name).is_dir()]
    return next(filter(class_folders, there), there[-1] if there else None)


def class_folders(root: Path) -> list[str]:
    """The names of the folders in ``root``, sorted."""
    try:
        return sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> ConadvError:
    where = printable(error.filename)
    return ConadvError(
        f"The folder {where} cannot be read: {error.strerror}. Check its permissions."
    )


def scan_split(root: Path) -> Photos:
    """Every image file below ``root``/<class>, sorted by class and path as torchvision's ImageFolder does.

    Raises ConadvError where a class has no image, a folder cannot be read, or a link leads back to its own folder.
    """
    classes = class_folders(root)
    if not classes:
        raise ConadvError(f"{printable(root)} has no class folders. {without_classes(root)}")
    files = [class_files(root / name) for name in classes]
    labels_N = torch.repeat_interleave(torch.tensor([len(found) for found in files]))
    check_classes(str(root), labels_N, tuple(classes))
    keys = np.array([os.fsencode(os.path.relpath(path, root)) for path in chain(*files)])
    return Photos(root.parent, root.name, keys, labels_N, tuple(classes), Files(root))


@dataclass(frozen=True)
class Files:
    """Image files by their names in bytes, below ``root``."""

    root: Path

    def open(self, key: bytes) -> IO[bytes]:
        return open_file(self.root / os.fsdecode(key))

    def tags(self, keys: NDArray[Any]) -> list[bytes]:
        """Names and sizes."""
        root, names = os.fsencode(self.root), keys.tolist()

        def size(name: bytes) -> int:
            try:
                return os.stat(b"%b/%b" % (root, name)).st_size  # noqa: PTH116
            except OSError:  # it went away since the folder was read
                return -1

        return [b"%b\0%d\0" % (name, size(name)) for name in names]


def class_files(folder: Path) -> list[str]:
    """The paths of all image files below ``folder``, links to folders included; ConadvError where there is none."""

    def stop(error: OSError) -> None:
        raise _unreadable(error) from error

    found = []
    for where, _, names in os.walk(folder, followlinks=True, onerror=stop):
        real = os.path.realpath(where)
        if os.path.islink(where) and real in map(os.path.realpath, Path(where).parents):  # noqa: PTH114
            raise ConadvError(
                f"{printable(where)} is a link to a folder that it lies in. Remove the link."
            )
        found += [(where, name) for name in names if name.lower().endswith(IMG_EXTENSIONS)]
    if not found:
        raise ConadvError(
            f"The class folder {printable(folder)} holds no image ({', '.join(IMG_EXTENSIONS)}). "
            "Add images or remove the folder."
        )
    return [os.path.join(where, name) for where, name in sorted(found)]  # noqa: PTH118


def without_classes(root: Path) -> str:
    """What to do about a split without class folders."""
    count = sum(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in os.scandir(root))
    if not count:
        return "Put the images into <class> folders below it."
    return (
        f"It is not sorted by class: {count:,} image files lie in it. ImageNet's validation images "
        "come like that, their classes in a list of their own. Move each into a folder named by "
        "its class as in train (n01440764, ...): by a script such as valprep.sh, by "
        "LOC_val_solution.csv of Kaggle's copy, or let torchvision.datasets.ImageNet(DIR, 'val') "
        "unpack the original archives."
    )


def decode(photos: Photos, settings: SourceSettings) -> MemorySplit:
    """All images of ``photos`` in memory.

    With ``image_size`` the centre square of each is resized to it (antialiased); without, all must be square and of one
    size. The first error in the order of the images is the one raised. With on_bad_image skip, files that cannot be
    read have pixels 0.
    """
    size = settings.image_size
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

    pixels: NDArray[Any] | None = None
    count = len(photos.labels)
    with ThreadPoolExecutor() as pool:
        each = map if _is_small(photos) else pool.map
        for done, image in enumerate(each(load, range(count)), 1):
            if image is not None:
                if pixels is None:
                    pixels = np.zeros((count, len(image), len(image), 3), np.uint8)
                if image.shape != pixels.shape[1:]:
                    height, width, _ = image.shape
                    raise ConadvError(
                        f"{photos.name(done - 1)} is {width} x {height} pixels, where all images must be "
                        "square and of one size. Give data.image_size to crop and resize them."
                    )
                pixels[done - 1] = image
            if settings.progress and (done % 256 == 0 or done == count):
                settings.progress(f"decode {photos.split}", done, count)
    if pixels is None:
        raise unread[0]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return MemorySplit(images, photos.labels, unread=unread)


def _is_small(photos: Photos) -> bool:
    """Below 128 pixels Python's own work, which holds the lock, outweighs decoding: two threads take 1.4x as long."""
    try:
        return max(photos.read(0).size) < 128
    except BadImage:
        return True
