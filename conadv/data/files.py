"""Image folders: which files there are, and their pixels."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from conadv import rng
from conadv.errors import ConadvError, printable

Progress = Callable[[str, int, int], None]
"""(what is being done, images done, images in all); called now and then from the calling thread."""

_CHUNK = 256
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""What is decoded, whatever a file is called. Formats that run other programs are not, such as EPS (Ghostscript)."""


class BadImage(ConadvError):
    """An image file that cannot be used. ``reason`` says why without the path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"Cannot read the image {printable(path)}: {reason}. Replace or remove the file; `conadv check` finds all "
            "such files, and data.on_bad_image skip trains without them."
        )
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[Any, ...]:  # it travels from worker processes
        return type(self), (self.path, self.reason)


class BadFile(NamedTuple):
    """A file that was left out: its path below the data folder, printable, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """The files of one split. ``names`` are relative to ``root``, as one array of bytes.

    An array and not a list: worker processes would copy the memory of a list of strings page by page, by counting
    references to them.
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
        return BadFile(
            f"{self.root.name}/{printable(os.fsdecode(self.names[index]))}", error.reason
        )

    def subset(self, indices: Tensor) -> Listing:
        return replace(self, names=self.names[indices.numpy()], labels=self.labels[indices])


def scan_folder(directory: Path) -> tuple[Listing, Listing]:
    """The listings of DIR/train and DIR/test (or DIR/val), which must hold the same classes, two or more.

    Of test and val the first counts that has class folders: ImageNet's own test folder has none, nor any labels.
    """
    layout = f"Expected {printable(directory)}/train/<class>/<image files>, and the same below test or val."
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
        only_train, only_test = (
            _some(set(a.class_names) - set(b.class_names))
            for a, b in ((train, test), (test, train))
        )
        raise ConadvError(
            f"{train.root} and {test.root} have different classes (only in {train.root.name}: {only_train}; "
            f"only in {test.root.name}: {only_test}). Give both the same class folders."
        )
    return train, test


def evaluation_folder(directory: Path) -> Path | None:
    """DIR/test or DIR/val: the first with class folders; val before test where neither has any; None without both."""
    there = [directory / name for name in ("test", "val") if (directory / name).is_dir()]
    return next(filter(_has_folders, there), there[-1] if there else None)


def _has_folders(root: Path) -> bool:
    with suppress(OSError):  # whoever reads the folder says so
        return any(entry.is_dir() for entry in root.iterdir())
    return False


def flat(root: Path) -> str | None:
    """What to do about a folder of images that are not sorted by class, None where there is no such image."""
    count = sum(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in os.scandir(root))
    if not count:
        return None
    return (
        f"{count:,} image files lie in it and no class folders. ImageNet's validation images come like that, their "
        "classes in a list of their own. Move each into a folder named by its class as in train (n01440764, ...): by "
        "a script such as valprep.sh, by LOC_val_solution.csv of Kaggle's copy, or let "
        "torchvision.datasets.ImageNet(DIR, 'val') unpack the original archives"
    )


def scan_split(root: Path) -> Listing:
    """Every image file below ``root``/<class>, sorted by class and path. Links to files and folders are followed.

    Raises ConadvError where a class has no image, a folder cannot be read, or a link leads back to its own folder.
    """
    classes = class_folders(root)
    if not classes and (unsorted := flat(root)):
        raise ConadvError(f"{root} is not sorted by class: {unsorted}.")
    if not classes:
        raise ConadvError(
            f"{root} is empty: it has no class folder. Put the images in {root}/<class>/."
        )
    if len(classes) == 1:
        raise ConadvError(
            f"{root} has only one class, {classes[0]!r}. Training needs two or more class folders."
        )
    files = [list(class_files(root / name)) for name in classes]
    for name, found in zip(classes, files, strict=True):
        if not found:
            raise ConadvError(
                f"The class folder {printable(root / name)} holds no image ({', '.join(IMG_EXTENSIONS)}). "
                "Add images or remove the folder."
            )
    labels = torch.tensor(
        [label for label, found in enumerate(files) for _ in found], dtype=torch.int64
    )
    names = np.array(
        [os.fsencode(os.path.relpath(path, root)) for found in files for path in found]
    )
    return Listing(root, names, labels, tuple(classes))


def class_folders(root: Path) -> list[str]:
    """The names of the folders in ``root``, sorted."""
    try:
        return sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except OSError as error:
        raise unreadable_folder(error) from error


def class_files(folder: Path) -> Iterator[str]:
    """The paths of all files below ``folder`` that are called like an image, folder by folder in order of name."""
    for directory, names in sorted(walk(folder)):
        yield from (
            os.path.join(directory, name)  # noqa: PTH118
            for name in sorted(names)
            if name.lower().endswith(IMG_EXTENSIONS)
        )


def walk(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """(folder, its file names) for ``folder`` and all below it, links included.

    Raises ConadvError for a folder that cannot be read and for a link to a folder that it lies in.
    """
    try:
        about = folder.stat()
        entries = list(os.scandir(folder))
        folders = [entry for entry in entries if is_folder(entry)]
    except OSError as error:
        raise unreadable_folder(error) from error
    here = (about.st_dev, about.st_ino)
    if here in above:
        raise ConadvError(
            f"{printable(folder)} is a link to a folder that it lies in. Remove the link."
        )
    yield str(folder), [entry.name for entry in entries if entry not in folders]
    for entry in folders:
        yield from walk(Path(entry.path), (*above, here))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link that leads nowhere or to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def unreadable_folder(error: OSError) -> ConadvError:
    return ConadvError(
        f"Cannot read the folder {printable(error.filename)}: {error.strerror}. Check its permissions."
    )


def _some(names: set[str], count: int = 3) -> str:
    shown = ", ".join(map(printable, sorted(names)[:count])) or "none"
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown


def read_rgb(path: Path) -> Image.Image:
    """The image as RGB: grey, palette and CMYK are converted, alpha is dropped, of several frames the first is taken.

    The orientation in EXIF data is not applied, as in torchvision's ImageFolder: pixels are taken as they are stored.
    Raises BadImage with the path where it cannot be decoded, has more than 8 bits per grey value, or more pixels than
    PIL.Image.MAX_IMAGE_PIXELS.
    """
    try:
        with _opened(path) as file:
            return decode_rgb(file)
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise BadImage(path, why(error)) from error


def decode_rgb(file: IO[bytes]) -> Image.Image:
    """The image in ``file`` as :func:`read_rgb` describes it. Raises whatever its decoder does."""
    with Image.open(file, formats=FORMATS) as image:
        check_pixels(image)
        # a palette with transparency reaches RGB over RGBA, or Pillow warns
        rgb: Image.Image = (
            image.convert("RGBA") if "transparency" in image.info else image
        ).convert("RGB")
        return rgb


def _opened(path: Path) -> BinaryIO:
    """A regular file, opened to read. A named pipe would wait for ever, a device would never end."""
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    about = os.fstat(descriptor)
    if stat.S_ISREG(about.st_mode) and about.st_size:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise ValueError("it is empty" if stat.S_ISREG(about.st_mode) else "it is not a regular file")


def check_pixels(image: Image.Image) -> None:
    """ValueError for what must not be decoded, told from the header alone."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than {limit:,} (a decompression bomb?)"
        )
    if image.mode.startswith(("I", "F")):  # Pillow would clip nearly all of it to white
        raise ValueError(f"mode {image.mode} has more than 8 bits per channel")


def why(error: BaseException) -> str:
    """One line without the path: what is wrong with an image file."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image in a known format"
    text = (
        (error.strerror if isinstance(error, OSError) else None)
        or str(error)
        or type(error).__name__
    )
    return printable(text).rstrip(".")


def stand_ins(labels_N: Tensor, index: int) -> Iterator[int]:
    """The images that may take the place of image ``index``, best first: all others of its class.

    A function of the labels and ``index`` alone. So every rank, worker and epoch takes the same one, whatever was read
    before, and a resumed run too: training is as it would be if the file were a copy of the other image.
    """
    same = (labels_N == labels_N[index]).nonzero().flatten()
    begin = rng.derive(0, "stand-in", index) % len(same)
    yield from (other for other in same.roll(-begin).tolist() if other != index)


def no_stand_in(name: str) -> ConadvError:
    return ConadvError(
        f"No image of class {printable(name)} can be read. Repair the data: `conadv check` lists it."
    )


def decode(
    listing: Listing,
    image_size: int | None,
    progress: Progress | None = None,
    bad: dict[int, BadFile] | None = None,
) -> Tensor:
    """All images of ``listing`` as one uint8 tensor N,3,H,W with H = W.

    With ``image_size`` the centre square of each is resized to it (antialiased); without, all must be square and of one
    size. Large images are decoded by threads; the first error in the order of the listing is the one raised. With
    ``bad``, files that cannot be read are noted there by their number, and their pixels are 0.
    """
    start, first = _first_readable(listing, bad)
    if image_size is None and first.width != first.height:
        raise ConadvError(
            f"{printable(listing.path(start))} is {first.width} x {first.height} pixels, not square. "
            "Give data.image_size to crop and resize."
        )
    size = image_size or first.width
    pixels = np.zeros((len(listing), size, size, 3), np.uint8)
    work = _Decode(listing, pixels, start, resize=image_size is not None, bad=bad)
    with ThreadPoolExecutor(_threads(first)) as pool:
        for done in pool.map(work, range(0, len(listing), _CHUNK)):
            if progress:
                progress(f"decode {listing.root.name}", done, len(listing))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _first_readable(listing: Listing, bad: dict[int, BadFile] | None) -> tuple[int, Image.Image]:
    for index in range(len(listing)):
        try:
            return index, read_rgb(listing.path(index))
        except BadImage:
            if bad is None:
                raise
    raise no_stand_in(" or ".join(listing.class_names[:3]))


def _threads(first: Image.Image) -> int:
    """One below 128 pixels: there Python's own work, which holds the lock, outweighs decoding (two threads: 0.7x)."""
    return 1 if max(first.size) < 128 else cores()


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class _Decode:
    """Decodes one chunk of files into ``pixels``; called by several threads, each with its own chunk."""

    listing: Listing
    pixels: NDArray[np.uint8]
    first: int
    resize: bool
    bad: dict[int, BadFile] | None

    def __call__(self, start: int) -> int:
        stop = min(start + _CHUNK, len(self.listing))
        for index in range(start, stop):
            try:
                self.pixels[index] = np.asarray(self._image(index))
            except BadImage as error:
                if self.bad is None:
                    raise
                self.bad[index] = self.listing.bad(index, error)
        return stop

    def _image(self, index: int) -> Image.Image:
        size = self.pixels.shape[1]
        image = read_rgb(self.listing.path(index))
        if image.size == (size, size):
            return image
        if self.resize:
            return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        raise ConadvError(
            f"{printable(self.listing.path(index))} is {image.width} x {image.height} pixels, but "
            f"{printable(self.listing.path(self.first))} is {size} x {size}. "
            "Give data.image_size to bring all images to one size."
        )
