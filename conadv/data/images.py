"""One encoded image: its pixels, or why it has none."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Protocol

from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from conadv.errors import ConadvError, printable

# Decoded by content. EPS and other formats would start a program (Ghostscript).
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


class BadImage(ConadvError):
    """An image that cannot be used. ``name``: its path below the data ``folder``."""

    def __init__(self, folder: Path, name: str, reason: str) -> None:
        super().__init__(
            f"Cannot read the image {printable(folder / name)}: {reason}. Replace or remove the "
            "file; `conadv check` finds all such files, and data.on_bad_image skip trains without "
            "them."
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
class Files:
    """Image files by their names in bytes, below ``root``."""

    root: Path

    def open(self, key: bytes) -> IO[bytes]:
        """Regular files alone: opening a pipe would block, and a device never ends."""
        path = self.root / os.fsdecode(key)
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is not a regular file")
        if not about.st_size:
            raise ValueError("it is empty")
        return path.open("rb")

    def tags(self, keys: NDArray[Any]) -> list[bytes]:
        """Names and sizes. Threads, because on a network file system each size is a round trip."""
        root, names = os.fsencode(self.root), keys.tolist()

        def tag(name: bytes) -> bytes:
            try:
                size = os.stat(b"%b/%b" % (root, name)).st_size  # noqa: PTH116
            except OSError:  # it went away since the folder was read
                size = -1
            return b"%b\0%d\0" % (name, size)

        with ThreadPoolExecutor(32) as pool:
            parts = (names[n : n + 1024] for n in range(0, len(names), 1024))
            return list(chain.from_iterable(pool.map(lambda part: list(map(tag, part)), parts)))


def decode_rgb(file: IO[bytes]) -> Image.Image:
    """The image as RGB, with pixels as they are stored: the EXIF orientation is not applied.

    Grey, palette and CMYK are converted, alpha is dropped, of several frames the first is taken.
    Raises anything for damaged files, and ValueError for more than 8 bits per grey value or more
    than PIL.Image.MAX_IMAGE_PIXELS pixels.
    """
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
