"""``conadv check DIR``: everything about an image folder that a training run would stumble over, found beforehand."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from conadv.data.files import (
    FORMATS,
    BadImage,
    Progress,
    class_folders,
    cores,
    evaluation_folder,
    flat,
    is_folder,
    read_rgb,
    unreadable_folder,
    why,
)
from conadv.errors import ConadvError, printable
from conadv.training.record import write_atomic

ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""


@dataclass
class CheckArgs:
    """Read every image of DIR/{train,test or val}/<class>/, in parallel, and list what is wrong with it.

    Exit code 0: nothing is wrong; 1: something is listed; 2: DIR cannot be checked. Notes (images that are read, but
    perhaps not as expected) do not count.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Image folder."""
    workers: int | None = None
    """Threads that decode (default: one per processor)."""
    show: int = 20
    """So many findings are shown; --json has them all."""
    json: Path | None = None
    """Write all findings into this file."""
    quiet: bool = False
    """No progress."""


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

    def to_json(self) -> dict[str, Any]:
        kinds = Counter(finding.kind for finding in self.findings)
        return {
            "folder": self.folder,
            "images": self.images,
            "bad": len(self.bad),
            "kinds": dict(sorted(kinds.items())),
            "findings": [asdict(finding) for finding in self.findings],
        }


def check_folder(
    folder: Path, workers: int | None = None, progress: Progress | None = None
) -> Report:
    """Read every image below ``folder`` in ``workers`` threads. Raises ConadvError if there is nothing to check."""
    splits = _splits(folder)
    if not splits:
        raise ConadvError(
            f"{printable(folder)} is no image folder. Expected {printable(folder)}/train/<class>/<image files>, and "
            "the same below test or val."
        )
    findings, files = _structure(folder, splits)
    with ThreadPoolExecutor(workers or cores()) as pool:
        for done, found in enumerate(pool.map(lambda path: list(examine(path)), files), 1):
            findings += found
            if progress and (done % 100 == 0 or done == len(files)):
                progress("check", done, len(files))
    below = [Finding(_below(folder, f.path), f.kind, f.reason, f.bad) for f in findings]
    return Report(
        printable(folder),
        len(files),
        tuple(sorted(below, key=lambda f: (not f.bad, f.path, f.kind))),
    )


def _splits(folder: Path) -> list[Path]:
    """The folders that training would read, and those only."""
    train = [folder / "train"] if (folder / "train").is_dir() else []
    held = evaluation_folder(folder)
    return train if held is None else [*train, held]


def _below(folder: Path, path: str) -> str:
    return printable(os.path.relpath(path, folder))


def _structure(folder: Path, splits: Sequence[Path]) -> tuple[list[Finding], list[Path]]:
    """What is wrong with folders and links, and all image files."""
    findings: list[Finding] = []
    files: list[Path] = []
    classes = {}
    if splits[0].name != "train" or len(splits) == 1:
        findings.append(
            Finding(str(folder), "missing split", "it needs a folder train, and test or val")
        )
    for split in splits:
        try:
            classes[split.name] = set(class_folders(split))
        except ConadvError as error:
            findings.append(Finding(str(split), "unreadable folder", str(error)))
            continue
        if not classes[split.name] and (unsorted := flat(split)):
            findings.append(Finding(str(split), "not sorted by class", unsorted))
            del classes[
                split.name
            ]  # or every class of the other one would be listed as missing here
            continue
        if len(classes[split.name]) < 2:
            findings.append(
                Finding(str(split), "too few classes", "training needs two or more class folders")
            )
        findings += [
            Finding(e.path, "broken link", _broken(e.path))
            for e in os.scandir(split)
            if _is_broken(e)
        ]
        for name in sorted(classes[split.name]):
            found = list(_files(split / name, findings))
            files += found
            if not found:
                findings.append(
                    Finding(
                        str(split / name), "empty class", f"no image ({', '.join(IMG_EXTENSIONS)})"
                    )
                )
    findings += _unequal(folder, classes)
    return findings, files


def _unequal(folder: Path, classes: dict[str, set[str]]) -> Iterator[Finding]:
    for one, theirs in classes.items():
        for other, ours in classes.items():
            for name in sorted(theirs - ours):
                yield Finding(
                    str(folder / one / name),
                    "class in one split",
                    f"{other} has no folder of this name",
                )


def _files(
    folder: Path, findings: list[Finding], above: tuple[tuple[int, int], ...] = ()
) -> Iterator[Path]:
    """The image files below ``folder``; unlike training, goes on after what is wrong with a folder."""
    try:
        about = folder.stat()
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        findings.append(Finding(str(folder), "unreadable folder", str(unreadable_folder(error))))
        return
    here = (about.st_dev, about.st_ino)
    if here in above:
        findings.append(Finding(str(folder), "looping link", "a link to a folder that it lies in"))
        return
    for entry in entries:
        if is_folder(entry):
            yield from _files(Path(entry.path), findings, (*above, here))
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            yield Path(entry.path)
        elif _is_broken(entry):
            findings.append(Finding(entry.path, "broken link", _broken(entry.path)))
        else:
            findings.append(
                Finding(entry.path, "ignored file", "it is not called like an image", bad=False)
            )


def _is_broken(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110  (Path.exists raises for a loop)


def _broken(path: str) -> str:
    return f"a link to {printable(Path(path).readlink())}, which cannot be reached"


def examine(path: Path) -> Iterator[Finding]:
    """What is to be said about one image file."""
    name = str(path)
    if name != printable(name):
        yield Finding(
            name, "odd name", "its name holds control characters or is not UTF-8", bad=False
        )
    try:
        read_rgb(path)
    except BadImage as error:
        yield Finding(name, _kind(path, error), error.reason)
        return
    yield from _notes(path)


def _kind(path: Path, error: BadImage) -> str:
    """A few words for the reason."""
    if path.is_symlink() and not os.path.exists(path):  # noqa: PTH110
        return "broken link"
    if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
        return "unreadable file"
    for words, kind in _KINDS.items():
        if words in error.reason:
            return kind
    return "damaged"


_KINDS = {
    "it is empty": "empty file",
    "regular file": "not a file",
    "no image": "not an image",
    "bits per channel": "too many bits",
    "bomb": "too many pixels",
    "truncated": "truncated",
}


def _notes(path: Path) -> Iterator[Finding]:
    """Things that the header of a readable image tells."""
    name = str(path)
    try:
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            mode, frames, rotated = (
                image.mode,
                getattr(image, "n_frames", 1),
                image.getexif().get(ORIENTATION, 1),
            )
    except Exception as error:  # read a moment ago: only what comes behind the pixels is damaged
        yield Finding(name, "damaged extras", why(error), bad=False)
        return
    if mode != "RGB":
        yield Finding(name, f"mode {mode}", "it is converted to RGB", bad=False)
    if frames > 1:
        yield Finding(name, "several frames", f"of {frames} frames the first is taken", bad=False)
    if rotated not in (0, 1):
        yield Finding(name, "EXIF orientation", f"orientation {rotated} is not applied", bad=False)


def command(args: CheckArgs) -> bool:
    """Check, show, write; returns whether nothing is wrong."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    if args.workers is not None and args.workers < 1:
        raise ConadvError(f"--workers {args.workers} must be 1 or more.")
    columns = (TextColumn("check"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console()
    with Progress(
        *columns, transient=True, disable=args.quiet or not console.is_terminal, console=console
    ) as bar:
        task = bar.add_task("check", total=None)
        report = check_folder(
            args.folder,
            args.workers,
            lambda _, done, total: bar.update(task, completed=done, total=total),
        )
    _show(report, args.show, console)
    if args.json is not None:
        _write(args.json, report)
    return not report.bad


def _write(path: Path, report: Report) -> None:
    try:
        write_atomic(path, json.dumps(report.to_json(), indent=1) + "\n")
    except OSError as error:
        raise ConadvError(
            f"Cannot write {printable(path)}: {error.strerror}. Choose another file."
        ) from error


def _show(report: Report, count: int, console: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    bad = report.bad
    if bad and count > 0:
        table = Table("path", "what", "why")
        for finding in bad[:count]:
            table.add_row(
                Text(finding.path, overflow="fold"), Text(finding.kind), Text(finding.reason)
            )
        console.print(table)
    if len(bad) > count:
        console.print(f"and {len(bad) - count} more: --json FILE writes them all", highlight=False)
    for kind, number in sorted(Counter(f.kind for f in report.findings if not f.bad).items()):
        console.print(Text(f"note: {number} x {kind}"))
    verdict = f"{len(bad)} thing(s) would stop a run or be left out" if bad else "nothing wrong"
    console.print(Text(f"{report.images} images in {report.folder}: {verdict}"), highlight=False)
