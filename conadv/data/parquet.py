"""Data sets of Hugging Face as local parquet files: which rows there are, and their pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from conadv.data.files import BadFile, BadImage, decode_rgb, why
from conadv.errors import ConadvError, install, printable

SPLITS = ("train", "test", "validation", "val", "valid")
_LAYOUT = "Expected files such as train-00000-of-00001.parquet and test-00000-of-00001.parquet, anywhere below it."


@dataclass(frozen=True)
class Rows:
    """The rows of one split: ``table`` is a ``datasets.Dataset``, mapped into memory and not read before it is needed.

    ``numbers``: which of its rows, N int64. A row's image must hold its own bytes: a path in somebody else's table is
    not followed.
    """

    root: Path
    split: str
    table: Any
    image: str
    numbers: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, index: int) -> Path:
        """What a message calls the image."""
        return self.root / self.split / f"row {int(self.numbers[index])}"

    def read(self, index: int) -> Image.Image:
        """As :func:`conadv.data.files.read_rgb`."""
        try:
            content = self.table[int(self.numbers[index])][self.image]
            if not content or not content["bytes"]:
                raise ValueError("the row has no bytes")
            return decode_rgb(BytesIO(content["bytes"]))
        except Exception as error:  # decoders raise nearly anything on damaged images
            raise BadImage(self.where(index), why(error)) from error

    def bad(self, index: int, error: BadImage) -> BadFile:
        return BadFile(f"{self.split}/row {int(self.numbers[index])}", error.reason)

    def subset(self, indices: Tensor) -> Rows:
        return replace(self, numbers=self.numbers[indices], labels=self.labels[indices])


def scan_parquet(directory: Path) -> tuple[Rows, Rows]:
    """(train, test) of the parquet files below DIR, by the split's name at the beginning of theirs.

    The test rows are those of ``test``, or of ``validation`` where test has no labels (ImageNet's are all -1). One
    column of the type Image and one of the type ClassLabel are needed. The ``datasets`` library converts the files
    once into its cache (HF_DATASETS_CACHE), about as large as they are. Nothing is downloaded, and no code that lies
    beside the files is run. Raises ConadvError for everything that is missing.
    """
    files = _files(directory)
    tables = _load(directory, files)
    image, label = _columns(directory, tables["train"].features)
    train = _rows(directory, "train", tables["train"], image, label)
    tests = [
        _rows(directory, name, tables[name], image, label) for name in files if name != "train"
    ]
    test = next((rows for rows in tests if len(rows) and int(rows.labels.min()) >= 0), None)
    if test is None:
        raise ConadvError(
            f"No rows below {printable(directory)} but those of train have labels. {_LAYOUT}"
        )
    for rows in (train, test):
        _check(rows, train.class_names)
    return train, test


def _files(directory: Path) -> dict[str, list[str]]:
    if not directory.is_dir():
        raise ConadvError(f"The data folder {printable(directory)} does not exist. {_LAYOUT}")
    paths = sorted(directory.rglob("*.parquet"))
    found = {split: [str(path) for path in paths if _split(path) == split] for split in SPLITS}
    found = {split: names for split, names in found.items() if names}
    if "train" not in found or len(found) == 1:
        seen = ", ".join(printable(path.name) for path in paths[:3]) or "no parquet file"
        raise ConadvError(
            f"{printable(directory)} holds no training or no test rows (found {seen}). {_LAYOUT}"
        )
    return found


def _split(path: Path) -> str:
    return path.stem.partition("-")[0].partition(".")[0]


def _load(directory: Path, files: Mapping[str, list[str]]) -> Any:
    try:
        from datasets import Image as ImageColumn
        from datasets import load_dataset
        from datasets.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ConadvError(
            f"data.source huggingface needs the package datasets. Install it: {install('huggingface')}."
        ) from error
    disable_progress_bar()
    try:
        tables = load_dataset("parquet", data_files=dict(files))
        images = {
            name
            for table in tables.values()
            for name, kind in table.features.items()
            if isinstance(kind, ImageColumn)
        }
        for name in images:
            tables = tables.cast_column(name, ImageColumn(decode=False))
        return tables
    except Exception as error:  # whatever reading and converting raise
        raise ConadvError(
            f"Cannot read the parquet files below {printable(directory)}: {printable(str(error))[:500]}"
        ) from error


def _columns(directory: Path, features: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the image and of the label."""
    names = []
    for kind in ("Image", "ClassLabel"):
        found = [name for name, feature in features.items() if type(feature).__name__ == kind]
        if len(found) != 1:
            columns = ", ".join(
                f"{printable(name)}: {type(value).__name__}" for name, value in features.items()
            )
            raise ConadvError(
                f"The parquet files below {printable(directory)} have {len(found)} columns of the type {kind}, "
                "wanted one "
                f"({columns}). Keep one, with Dataset.cast_column and Dataset.remove_columns of datasets."
            )
        names.append(found[0])
    return names[0], names[1]


def _rows(directory: Path, split: str, table: Any, image: str, label: str) -> Rows:
    labels = torch.tensor(
        [-1 if value is None else int(value) for value in table[label]], dtype=torch.int64
    )
    classes = tuple(map(str, table.features[label].names))
    return Rows(
        directory,
        split,
        table.select_columns([image]),
        image,
        torch.arange(len(labels)),
        labels,
        classes,
    )


def _check(rows: Rows, classes: tuple[str, ...]) -> None:
    if rows.class_names != classes:
        raise ConadvError(
            f"The classes of {rows.split} below {rows.root} are not those of train. Give both the same."
        )
    if len(classes) < 2:
        raise ConadvError(f"{rows.root} has only {len(classes)} class. Training needs two or more.")
    sizes = torch.bincount(rows.labels.clamp(min=0), minlength=len(classes))
    if int(rows.labels.min()) < 0 or int(rows.labels.max()) >= len(classes):
        raise ConadvError(
            f"Some rows of {rows.split} below {rows.root} have no label of the {len(classes)} classes."
        )
    if not sizes.all():
        raise ConadvError(
            f"{rows.split} below {rows.root} has no image of class {printable(classes[int(sizes.argmin())])}. "
            "Add images or remove the class."
        )
