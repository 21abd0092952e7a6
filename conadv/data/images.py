"""One image file: its pixels, or why it has none, and which other image stands in for it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from conadv import rng
from conadv.errors import ConadvError, printable

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""The formats that are decoded, by content. EPS and others would start a program (Ghostscript)."""


class BadImage(ConadvError):
    """An image file that cannot be used. ``reason`` says why without the path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"Cannot read the image {printable(path)}: {reason}. Replace or remove the file; "
            "`conadv check` finds all such files, and data.on_bad_image skip trains without them."
        )
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[Any, ...]:  # it travels from worker processes
        return type(self), (self.path, self.reason)


class BadFile(NamedTuple):
    """A file that was left out: its path below the data folder, printable, and why."""

    path: str
    reason: str


def read_rgb(path: Path) -> Image.Image:
    """The image as RGB, with pixels as they are stored: the EXIF orientation is not applied.

    Grey, palette and CMYK are converted, alpha is dropped, of several frames the first is taken. Raises BadImage where
    it cannot be decoded, has more than 8 bits per grey value, or more than PIL.Image.MAX_IMAGE_PIXELS pixels.
    """
    try:
        with _opened(path) as file:
            return decode_rgb(file)
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise BadImage(path, why(error)) from error


def decode_rgb(file: IO[bytes]) -> Image.Image:
    """The image in ``file`` as :func:`read_rgb` describes it. Raises whatever its decoder does."""
    with Image.open(file, formats=FORMATS) as image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:  # Pillow only warns
            raise ValueError(
                f"{image.width} x {image.height} pixels are more than {limit:,} (a decompression bomb?)"
            )
        if image.mode.startswith(("I", "F")):  # Pillow would clip nearly all of it to white
            raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
        # a palette with transparency reaches RGB over RGBA, or Pillow warns
        through = image.convert("RGBA") if "transparency" in image.info else image
        rgb: Image.Image = through.convert("RGB")
        return rgb


def _opened(path: Path) -> BinaryIO:
    """A regular file, opened to read. Opening a pipe would block, and a device never ends."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    about = os.fstat(descriptor)
    if stat.S_ISREG(about.st_mode) and about.st_size:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise ValueError("it is empty" if stat.S_ISREG(about.st_mode) else "it is not a regular file")


def why(error: BaseException) -> str:
    """One line without the path: what is wrong with an image file."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image in a known format"
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return printable(text).rstrip(".")


def stand_ins(labels_N: Tensor, index: int) -> Iterator[int]:
    """The images that may take the place of image ``index``, best first: all others of its class.

    A function of the labels and ``index`` alone, so every rank, worker and epoch takes the same one, and so does a
    resumed run: training is as if the file were a copy of the other image.
    """
    same = (labels_N == labels_N[index]).nonzero().flatten()
    begin = rng.derive(0, "stand-in", index) % len(same)
    yield from (other for other in same.roll(-begin).tolist() if other != index)


def no_stand_in(name: str) -> ConadvError:
    return ConadvError(
        f"No image of class {printable(name)} can be read. Repair the data: `conadv check` lists it."
    )
