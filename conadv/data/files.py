"""Image folders: which files there are, and their pixels."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from ..errors import ConadvError

Progress = Callable[[str, int, int], None]
"""(what is being done, images done, images in all); called now and then from the calling thread."""

_CHUNK = 256


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

    def subset(self, indices: Tensor) -> Listing:
        return replace(self, names=self.names[indices.numpy()], labels=self.labels[indices])


def scan_folder(directory: Path) -> tuple[Listing, Listing]:
    """The listings of DIR/train and DIR/test (or DIR/val), which must hold the same classes, two or more."""
    layout = f"Expected {directory}/train/<class>/<image files>, and the same below test or val."
    if not directory.is_dir():
        raise ConadvError(f"The data folder {directory} does not exist. {layout}")
    found = [directory / name for name in ("train", "test", "val") if (directory / name).is_dir()]
    if not found or found[0].name != "train":
        raise ConadvError(f"The data folder {directory} has no folder train. {layout}")
    if len(found) == 1:
        raise ConadvError(f"The data folder {directory} has neither a folder test nor val. {layout}")
    train, test = scan_split(found[0]), scan_split(found[1])
    if train.class_names != test.class_names:
        only_train, only_test = (
            _some(set(a.class_names) - set(b.class_names)) for a, b in ((train, test), (test, train))
        )
        raise ConadvError(
            f"{train.root} and {test.root} have different classes (only in {train.root.name}: {only_train}; "
            f"only in {test.root.name}: {only_test}). Give both the same class folders."
        )
    return train, test


def scan_split(root: Path) -> Listing:
    """Every image file below ``root``/<class>, sorted by class and path. ConadvError where a class has none."""
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not classes:
        raise ConadvError(f"{root} is empty: it has no class folder. Put the images in {root}/<class>/.")
    if len(classes) == 1:
        raise ConadvError(f"{root} has only one class, {classes[0]!r}. Training needs two or more class folders.")
    class_to_idx = {name: label for label, name in enumerate(classes)}
    samples = make_dataset(str(root), class_to_idx, extensions=IMG_EXTENSIONS, allow_empty=True)
    labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
    counts = torch.bincount(labels, minlength=len(classes))
    if not counts.all():
        empty = root / classes[int(counts.argmin())]
        raise ConadvError(
            f"The class folder {empty} holds no image ({', '.join(IMG_EXTENSIONS)}). Add images or remove the folder."
        )
    names = np.array([os.fsencode(os.path.relpath(path, root)) for path, _ in samples])
    return Listing(root, names, labels, tuple(classes))


def _some(names: set[str], count: int = 3) -> str:
    shown = ", ".join(sorted(names)[:count]) or "none"
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown


def read_rgb(path: Path) -> Image.Image:
    """The image as RGB: grey, palette and CMYK are converted, alpha is dropped.

    Raises ConadvError with the path where it cannot be decoded, or has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would clip nearly all of it to white
                raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
            # a palette with transparency reaches RGB over RGBA, or Pillow warns
            rgb: Image.Image = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
            return rgb
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise ConadvError(f"Cannot read the image {path}: {error}. Replace or remove the file.") from error


def decode(listing: Listing, image_size: int | None, progress: Progress | None = None) -> Tensor:
    """All images of ``listing`` as one uint8 tensor N,3,H,W with H = W.

    With ``image_size`` the centre square of each is resized to it (antialiased); without, all must be square and of one
    size. Large images are decoded by threads; the first error in the order of the listing is the one raised.
    """
    first = read_rgb(listing.path(0))
    if image_size is None and first.width != first.height:
        raise ConadvError(
            f"{listing.path(0)} is {first.width} x {first.height} pixels, not square. "
            "Give data.image_size to crop and resize."
        )
    size = image_size or first.width
    pixels = np.empty((len(listing), size, size, 3), np.uint8)
    starts = range(0, len(listing), _CHUNK)
    with ThreadPoolExecutor(_threads(first)) as pool:
        for done in pool.map(partial(_decode_chunk, listing, pixels, resize=image_size is not None), starts):
            if progress:
                progress(f"decode {listing.root.name}", done, len(listing))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _threads(first: Image.Image) -> int:
    """One below 128 pixels: there Python's own work, which holds the lock, outweighs decoding (two threads: 0.7x)."""
    if max(first.size) < 128:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode_chunk(listing: Listing, pixels: NDArray[np.uint8], start: int, *, resize: bool) -> int:
    stop = min(start + _CHUNK, len(listing))
    size = pixels.shape[1]
    for index in range(start, stop):
        image = read_rgb(listing.path(index))
        if image.size != (size, size):
            if not resize:
                raise ConadvError(
                    f"{listing.path(index)} is {image.width} x {image.height} pixels, but {listing.path(0)} is "
                    f"{size} x {size}. Give data.image_size to bring all images to one size."
                )
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        pixels[index] = np.asarray(image)
    return stop
