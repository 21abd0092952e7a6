"""Every image of a folder that a training run would stumble over (``conadv check``)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from conadv.data.folder import scan_folder
from conadv.data.images import BadImage
from conadv.data.source import Progress
from conadv.data.splits import PhotoSplit


@dataclass(frozen=True)
class Finding:
    """An image that would stop a run or be left out. ``path``: below the folder, printable."""

    path: str
    reason: str


def check_folder(
    folder: Path, workers: int | None = None, progress: Progress | None = None
) -> tuple[int, list[Finding]]:
    """(number of images, those that cannot be read) below ``folder``; ``workers`` threads read.

    Raises the ConadvError of a run for a folder without the right splits, classes or files.
    """

    def problem(image: tuple[PhotoSplit, int]) -> Finding | None:
        split, index = image
        try:
            split.read(index)
        except BadImage as error:
            return Finding(error.name, error.reason)
        return None

    images = [(split, n) for split in scan_folder(folder) for n in range(len(split.keys))]
    found = []
    with ThreadPoolExecutor(workers) as pool:
        for done, finding in enumerate(pool.map(problem, images), 1):
            found += [finding] if finding else []
            if progress and (done % 100 == 0 or done == len(images)):
                progress("check", done, len(images))
    return len(images), found
