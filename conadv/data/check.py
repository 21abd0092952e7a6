"""Everything about an image folder that a training run would stumble over, found beforehand (``conadv check``)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from conadv.data.folder import (
    class_files,
    class_folders,
    evaluation_folder,
    layout_of,
    without_classes,
)
from conadv.data.images import FORMATS, BadImage, read_rgb, why
from conadv.data.source import Progress
from conadv.errors import ConadvError, printable

ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held


@dataclass(frozen=True)
class Finding:
    """One thing about a path below the folder, printable. ``kind``: a few words to count by.

    ``bad``: training would stop, or leave it out.
    """

    path: str
    kind: str
    reason: str
    bad: bool = True


def check_folder(
    folder: Path, workers: int | None = None, progress: Progress | None = None
) -> tuple[int, list[Finding]]:
    """(number of images, findings, bad ones first) of all below ``folder``, which ``workers`` threads read.

    Raises ConadvError if there is nothing to check.
    """
    found: list[Finding] = []

    def note(kind: str, path: str | Path, reason: str, bad: bool = True) -> None:
        found.append(Finding(printable(os.path.relpath(path, folder)), kind, reason, bad))

    held = evaluation_folder(folder)
    splits = [split for split in (folder / "train", held) if split and split.is_dir()]
    if not splits:
        raise ConadvError(f"{printable(folder)} is not an image folder. {layout_of(folder)}")
    if len(splits) < 2:
        note("missing split", folder, "it needs a folder train, and test or val")
    classes = {split: class_folders(split) for split in splits}
    files: list[str] = []
    for split, names in classes.items():
        if len(names) < 2:
            advice = "training needs two" if names else without_classes(split)
            note("too few classes", split, advice)
        for name in names:
            try:
                files += class_files(split / name)
            except ConadvError as error:
                note("unusable class folder", split / name, str(error))
            for other, theirs in classes.items():
                if theirs and name not in theirs:
                    note("class in one split", split / name, f"{other.name} has no such folder")
    with ThreadPoolExecutor(workers) as pool:
        for done, notes in enumerate(pool.map(lambda path: list(examine(Path(path))), files), 1):
            for kind, reason, bad in notes:
                note(kind, files[done - 1], reason, bad)
            if progress and (done % 100 == 0 or done == len(files)):
                progress("check", done, len(files))
    found.sort(key=lambda finding: (not finding.bad, finding.path, finding.kind))
    return len(files), found


def examine(path: Path) -> Iterator[tuple[str, str, bool]]:
    """(kind, reason, whether it is bad) of everything to be said about one image file."""
    if str(path) != printable(path):
        yield "odd name", "its name holds control characters or is not UTF-8", False
    try:
        read_rgb(path)
    except BadImage as error:
        yield "unreadable image", error.reason, True
        return
    try:
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            mode, frames = image.mode, getattr(image, "n_frames", 1)
            rotated = image.getexif().get(ORIENTATION, 1)
    except Exception as error:  # read a moment ago: only what comes behind the pixels is damaged
        yield "damaged extras", why(error), False
        return
    if mode != "RGB":
        yield f"mode {mode}", "it is converted to RGB", False
    if frames > 1:
        yield "several frames", f"of {frames} frames the first is taken", False
    if rotated not in (0, 1):
        yield "EXIF orientation", f"orientation {rotated} is not applied", False
