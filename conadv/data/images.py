"""One encoded image: its pixels, or why it has none, and which other image stands in for it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from conadv import rng
from conadv.errors import ConadvError, printable

# Decoded by content. EPS and other formats would start a program (Ghostscript).
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


class BadImage(ConadvError):
    """An image that cannot be used: ``name`` is its path below the data ``folder``, ``reason`` says why."""

    def __init__(self, folder: Path, name: str, reason: str) -> None:
        super().__init__(
            f"Cannot read the image {printable(folder / name)}: {reason}. Replace or remove the file; "
            "`conadv check` finds all such files, and data.on_bad_image skip trains without them."
        )
        self.folder, self.name, self.reason = folder, name, reason

    def __reduce__(self) -> tuple[Any, ...]:  # it travels from worker processes
        return type(self), (self.folder, self.name, self.reason)


class Store(Protocol):
    """Where encoded images lie. Sent to worker processes, so it must pickle."""

    def open(self, key: Any) -> IO[bytes]:
        """The image's bytes as an open file; raises anything where there are none."""

    def tags(self, keys: NDArray[Any]) -> list[bytes]:
        """What tells images apart without reading them, one per key: names, sizes."""


@dataclass(frozen=True)
class Photos:
    """The encoded images of one split below ``folder``: files, or rows of a table. Sent to worker processes.

    ``keys``: N names of files in bytes, or numbers of rows. An array and not a list: counting
    references would make worker processes copy the memory of a list page by page.
    """

    folder: Path
    split: str
    keys: NDArray[Any]
    labels: Tensor
    class_names: tuple[str, ...]
    store: Store

    def read(self, index: int) -> Image.Image:
        """As :func:`read_rgb`."""
        try:
            with self.store.open(self.keys[index]) as file:
                return decode_rgb(file)
        except Exception as error:  # decoders raise nearly anything on damaged files
            raise BadImage(self.folder, self.name(index), why(error)) from error

    def name(self, index: int) -> str:
        """The path below ``folder``, printable."""
        key = self.keys[index]
        name = printable(os.fsdecode(key)) if isinstance(key, bytes) else f"row {key}"
        return f"{self.split}/{name}"

    def subset(self, indices_N: Tensor) -> Photos:
        return replace(self, keys=self.keys[indices_N.numpy()], labels=self.labels[indices_N])


def read_rgb(path: Path) -> Image.Image:
    """The image as RGB, with pixels as they are stored: the EXIF orientation is not applied.

    Grey, palette and CMYK are converted, alpha is dropped, of several frames the first is taken. Raises BadImage where
    it cannot be decoded, has more than 8 bits per grey value, or more than PIL.Image.MAX_IMAGE_PIXELS pixels.
    """
    try:
        with open_file(path) as file:
            return decode_rgb(file)
    except Exception as error:
        raise BadImage(path.parent, path.name, why(error)) from error


def open_file(path: Path) -> IO[bytes]:
    """A regular file, opened to read. Opening a pipe would block, and a device never ends."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is not a regular file")
    if not about.st_size:
        raise ValueError("it is empty")
    return path.open("rb")


def decode_rgb(file: IO[bytes]) -> Image.Image:
    """The image in ``file`` as :func:`read_rgb` describes it. Raises whatever its decoder does."""
    with Image.open(file, formats=FORMATS) as image:
        pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
        if limit is not None and pixels > limit:  # up to twice as many Pillow only warns
            raise ValueError(f"{pixels:,} pixels are more than {limit:,} (a decompression bomb?)")
        if image.mode.startswith(("I", "F")):  # Pillow would clip nearly all of it to white
            raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
        # a palette with transparency reaches RGB over RGBA, or Pillow warns
        through = image.convert("RGBA") if "transparency" in image.info else image
        rgb: Image.Image = through.convert("RGB")
        return rgb


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
