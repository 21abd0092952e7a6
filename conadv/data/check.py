"""Everything about an image folder that a training run would stumble over, found beforehand (``conadv check``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from conadv.data.folder import (
    broken,
    class_folders,
    cores,
    evaluation_folder,
    is_broken,
    layout_of,
    unsorted_images,
    walk,
)
from conadv.data.images import FORMATS, BadImage, read_rgb, why
from conadv.data.source import Progress
from conadv.errors import ConadvError, printable

_ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""
_KINDS = {  # words of a reason -> a few words to count by
    "it is empty": "empty file",
    "regular file": "not a file",
    "not an image": "not an image",
    "bits per channel": "too many bits",
    "bomb": "too many pixels",
    "truncated": "truncated",
}


@dataclass(frozen=True)
class Finding:
    """One thing about one path. ``kind``: a few words to count by; ``bad``: training would stop, or leave it out."""

    path: str
    kind: str
    reason: str
    bad: bool = True


@dataclass(frozen=True)
class Report:
    """What a check found. Paths are below ``folder`` and printable."""

    folder: str
    images: int
    findings: tuple[Finding, ...]

    @property
    def bad(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.bad]


class _Notes(list[Finding]):
    """Findings about paths below ``folder``."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def add(self, kind: str, path: str | Path, reason: str) -> None:
        below = printable(os.path.relpath(path, self.folder))
        self.append(Finding(below, kind, reason, kind != "ignored file"))


def check_folder(
    folder: Path, workers: int | None = None, progress: Progress | None = None
) -> Report:
    """Read every image below ``folder`` in ``workers`` threads. Raises ConadvError if there is nothing to check."""
    held = evaluation_folder(folder)
    splits = [split for split in (folder / "train", held) if split and split.is_dir()]
    if not splits:
        raise ConadvError(f"{printable(folder)} is not an image folder. {layout_of(folder)}")
    notes = _Notes(folder)
    if len(splits) < 2:
        notes.add("missing split", folder, "it needs a folder train, and test or val")
    classes = {split: names for split in splits if (names := _classes(split, notes)) is not None}
    files = [file for split, names in classes.items() for file in _class_files(split, names, notes)]
    for split, names in classes.items():
        for other, theirs in classes.items():
            for name in sorted(set(names) - set(theirs)):
                reason = f"{other.name} has no folder of this name"
                notes.add("class in one split", split / name, reason)
    with ThreadPoolExecutor(workers or cores()) as pool:
        for done, found in enumerate(pool.map(lambda path: list(examine(path)), files), 1):
            for kind, reason, bad in found:
                path = printable(os.path.relpath(files[done - 1], folder))
                notes.append(Finding(path, kind, reason, bad))
            if progress and (done % 100 == 0 or done == len(files)):
                progress("check", done, len(files))
    ordered = sorted(notes, key=lambda f: (not f.bad, f.path, f.kind))
    return Report(printable(folder), len(files), tuple(ordered))


def _classes(split: Path, notes: _Notes) -> list[str] | None:
    """The class folders of a split; None where there is nothing to compare with another split's."""
    try:
        names = class_folders(split)
        unsorted = None if names else unsorted_images(split)
    except (ConadvError, OSError) as error:
        notes.add("unreadable folder", split, str(error))
        return None
    if unsorted:
        notes.add("not sorted by class", split, unsorted)
        return None
    if len(names) < 2:
        notes.add("too few classes", split, "training needs two or more class folders")
    for entry in os.scandir(split):
        if is_broken(entry.path):
            notes.add("broken link", entry.path, broken(entry.path))
    return names


def _class_files(split: Path, names: list[str], notes: _Notes) -> Iterator[Path]:
    for name in names:
        found = [
            Path(where, file)
            for where, files in walk(str(split / name), notes.add)
            for file in files
        ]
        if not found:
            notes.add("empty class", split / name, f"no image ({', '.join(IMG_EXTENSIONS)})")
        yield from found


def examine(path: Path) -> Iterator[tuple[str, str, bool]]:
    """(kind, reason, whether it is bad) of everything to be said about one image file."""
    if str(path) != printable(path):
        yield "odd name", "its name holds control characters or is not UTF-8", False
    try:
        read_rgb(path)
    except BadImage as error:
        yield _kind(path, error), error.reason, True
        return
    try:
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            frames = getattr(image, "n_frames", 1)
            rotated = image.getexif().get(_ORIENTATION, 1)
            if image.mode != "RGB":
                yield f"mode {image.mode}", "it is converted to RGB", False
    except Exception as error:  # read a moment ago: only what comes behind the pixels is damaged
        yield "damaged extras", why(error), False
        return
    if frames > 1:
        yield "several frames", f"of {frames} frames the first is taken", False
    if rotated not in (0, 1):
        yield "EXIF orientation", f"orientation {rotated} is not applied", False


def _kind(path: Path, error: BadImage) -> str:
    if is_broken(str(path)):
        return "broken link"
    if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
        return "unreadable file"
    return next((kind for words, kind in _KINDS.items() if words in error.reason), "damaged")
