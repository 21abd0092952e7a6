"""Image folders: which files there are, decoded when they are needed or all into memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from conadv.data.downloads import from_torchvision
from conadv.data.images import BadFile, BadImage, no_stand_in, read_rgb
from conadv.data.source import Progress, Source, SourceSettings, on_demand
from conadv.data.splits import MemorySplit
from conadv.errors import ConadvError, printable

Problem = Callable[[str, str, str], None]
"""Told of (kind, path, reason) of everything in a folder that is neither an image nor a folder of images."""
FATAL = ("unreadable folder", "looping link")
"""Kinds of problems that end a run; the others are passed over."""
_CHUNK = 256


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
    ours, theirs = _decoded(train, settings), _decoded(test, settings)
    size, other = ours.images.shape[-1], theirs.images.shape[-1]
    if size != other:
        raise ConadvError(
            f"The images in {train.root} are {size} pixels wide and those in {test.root} {other}. "
            "Give data.image_size to bring all images to one size."
        )
    return Source(ours, theirs, train.class_names, channels=3, image_size=size)


def _decoded(listing: Listing, settings: SourceSettings) -> MemorySplit:
    unread: dict[int, BadFile] = {}
    bad = unread if settings.on_bad_image == "skip" else None
    images = decode(listing, settings.image_size, settings.progress, bad)
    return MemorySplit(images, listing.labels, unread=unread)


@dataclass(frozen=True)
class Listing:
    """The files of one split. ``names`` are relative to ``root``, as one array of bytes.

    Worker processes would copy the memory of a list of strings page by page, by counting references to them.
    """

    root: Path
    names: NDArray[Any]
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.names[index])

    def read(self, index: int) -> Image.Image:
        """As :func:`read_rgb`."""
        return read_rgb(self.path(index))

    def bad(self, index: int, error: BadImage) -> BadFile:
        name = printable(os.fsdecode(self.names[index]))
        return BadFile(f"{self.root.name}/{name}", error.reason)

    def subset(self, indices: Tensor) -> Listing:
        return replace(self, names=self.names[indices.numpy()], labels=self.labels[indices])


def scan_folder(directory: Path) -> tuple[Listing, Listing]:
    """The listings of DIR/train and DIR/test (or DIR/val), which must hold the same classes, two or more."""
    layout = layout_of(directory)
    if not directory.is_dir():
        raise ConadvError(f"The data folder {printable(directory)} does not exist. {layout}")
    if not (directory / "train").is_dir():
        inside = directory / "Data" / "CLS-LOC"  # as ImageNet's archive unpacks
        hint = f" Did you mean {printable(inside)}?" if (inside / "train").is_dir() else ""
        raise ConadvError(
            f"The data folder {printable(directory)} has no folder train. {layout}{hint}"
        )
    held = evaluation_folder(directory)
    if held is None:
        raise ConadvError(
            f"The data folder {printable(directory)} has neither a folder test nor val. {layout}"
        )
    train, test = scan_split(directory / "train"), scan_split(held)
    if train.class_names != test.class_names:
        ours, theirs = set(train.class_names), set(test.class_names)
        raise ConadvError(
            f"{train.root} and {test.root} have different classes (only in train: "
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

    def sorted_by_class(root: Path) -> bool:
        with suppress(OSError):  # raised again where the folder is read
            return any(entry.is_dir() for entry in root.iterdir())
        return False

    there = [directory / name for name in ("test", "val") if (directory / name).is_dir()]
    return next(filter(sorted_by_class, there), there[-1] if there else None)


def unsorted_images(root: Path) -> str | None:
    """What to do about a folder of images that are not sorted by class, None where there is no such image."""
    count = sum(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in os.scandir(root))
    if not count:
        return None
    return (
        f"{count:,} image files lie in it and no class folders. ImageNet's validation images come "
        "like that, their classes in a list of their own. Move each into a folder named by its "
        "class as in train (n01440764, ...): by a script such as valprep.sh, by "
        "LOC_val_solution.csv of Kaggle's copy, or let torchvision.datasets.ImageNet(DIR, 'val') "
        "unpack the original archives"
    )


def scan_split(root: Path) -> Listing:
    """Every image file below ``root``/<class>, sorted by class and path as torchvision's ImageFolder does.

    Raises ConadvError where a class has no image, a folder cannot be read, or a link leads back to its own folder.
    """
    classes = class_folders(root)
    if len(classes) < 2:
        if classes:
            wrong = f"has only one class, {classes[0]!r}. Training needs two or more class folders."
        elif unsorted := unsorted_images(root):
            wrong = f"is not sorted by class: {unsorted}."
        else:
            wrong = "is empty: it has no class folder. Put the images in <class> folders below it."
        raise ConadvError(f"{root} {wrong}")
    names, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(walk(str(root / name), _stop))
        paths = [os.path.join(where, file) for where, files in found for file in sorted(files)]  # noqa: PTH118
        if not paths:
            raise ConadvError(
                f"The class folder {printable(root / name)} holds no image "
                f"({', '.join(IMG_EXTENSIONS)}). Add images or remove the folder."
            )
        names += [os.fsencode(os.path.relpath(path, root)) for path in paths]
        labels += [label] * len(paths)
    return Listing(root, np.array(names), torch.tensor(labels), tuple(classes))


def _stop(kind: str, path: str, reason: str) -> None:
    if kind in FATAL:
        raise ConadvError(f"{printable(path)} {reason}")


def class_folders(root: Path) -> list[str]:
    """The names of the folders in ``root``, sorted."""
    try:
        return sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except OSError as error:
        raise ConadvError(f"{printable(root)} {_unreadable(error)}") from error


def _unreadable(error: OSError) -> str:
    return f"cannot be read: {error.strerror}. Check the permissions of the folder."


def walk(
    folder: str, problem: Problem, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its image files) for ``folder`` and all below it, links to folders included."""
    try:
        about = os.stat(folder)  # noqa: PTH116
        entries = list(os.scandir(folder))
    except OSError as error:
        problem("unreadable folder", folder, _unreadable(error))
        return
    here = (about.st_dev, about.st_ino)
    if here in above:
        problem("looping link", folder, "is a link to a folder that it lies in. Remove the link.")
        return
    names = []
    for entry in entries:
        if _is_folder(entry):
            yield from walk(entry.path, problem, (*above, here))
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            names.append(entry.name)
        elif is_broken(entry.path):
            problem("broken link", entry.path, broken(entry.path))
        else:
            problem("ignored file", entry.path, "its name is not that of an image")
    yield folder, names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_broken(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)  # noqa: PTH110, PTH114  (Path.exists raises for a loop)


def broken(path: str) -> str:
    return f"a link to {printable(os.readlink(path))}, which cannot be reached"  # noqa: PTH115


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decode(
    listing: Listing,
    image_size: int | None,
    progress: Progress | None = None,
    bad: dict[int, BadFile] | None = None,
) -> Tensor:
    """All images of ``listing`` as one uint8 tensor N,3,H,W with H = W.

    With ``image_size`` the centre square of each is resized to it (antialiased); without, all must be square and of one
    size. The first error in the order of the listing is the one raised. With ``bad``, files that cannot be read are
    noted there by their number, and their pixels are 0.
    """
    start, first = _first_readable(listing, bad)
    if image_size is None and first.width != first.height:
        raise ConadvError(
            f"{printable(listing.path(start))} is {first.width} x {first.height} pixels, not square. "
            "Give data.image_size to crop and resize."
        )
    size = image_size or first.width
    pixels = np.zeros((len(listing), size, size, 3), np.uint8)

    def square(index: int) -> Image.Image:
        image = listing.read(index)
        if image.size == (size, size):
            return image
        if image_size is not None:
            return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        raise ConadvError(
            f"{printable(listing.path(index))} is {image.width} x {image.height} pixels, but "
            f"{printable(listing.path(start))} is {size} x {size}. "
            "Give data.image_size to bring all images to one size."
        )

    def load(begin: int) -> int:
        end = min(begin + _CHUNK, len(listing))
        for index in range(begin, end):
            try:
                pixels[index] = np.asarray(square(index))
            except BadImage as error:
                if bad is None:
                    raise
                bad[index] = listing.bad(index, error)
        return end

    # below 128 pixels Python's own work, which holds the lock, outweighs decoding: two threads take 1.4x as long
    with ThreadPoolExecutor(1 if max(first.size) < 128 else cores()) as pool:
        for done in pool.map(load, range(0, len(listing), _CHUNK)):
            if progress:
                progress(f"decode {listing.root.name}", done, len(listing))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _first_readable(listing: Listing, bad: dict[int, BadFile] | None) -> tuple[int, Image.Image]:
    for index in range(len(listing)):
        try:
            return index, listing.read(index)
        except BadImage:
            if bad is None:
                raise
    raise no_stand_in(" or ".join(listing.class_names[:3]))
