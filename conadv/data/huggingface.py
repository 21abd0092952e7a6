"""Data sets of Hugging Face as local parquet files, read by the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from conadv.data.images import BadFile, BadImage, decode_rgb, why
from conadv.data.source import Source, SourceSettings, on_demand
from conadv.errors import ConadvError, install, printable

SPLITS = ("train", "test", "validation", "val", "valid")
_LAYOUT = (
    "Expected files such as train-00000-of-00001.parquet and test-00000-of-00001.parquet, "
    "anywhere below it."
)


def huggingface(settings: SourceSettings) -> Source:
    """Parquet files below ``dir``, told apart by the split's name at the beginning of theirs.

    One column of the type Image and one of the type ClassLabel are needed. The test rows are those of ``test``, or of
    ``validation`` where test has no labels (ImageNet's are all -1). ``datasets`` converts the files once into its cache
    (HF_DATASETS_CACHE). Nothing is downloaded, and no code that lies beside the files is run.
    """
    settings.refuse("download")
    directory = settings.folder()
    tables = _load(directory)
    image, label = (_column(directory, tables["train"], kind) for kind in ("Image", "ClassLabel"))
    train, *others = (_rows(directory, name, tables[name], image, label) for name in tables)
    test = next((rows for rows in others if len(rows) and int(rows.labels.min()) >= 0), None)
    if test is None:
        raise ConadvError(
            f"No rows below {printable(directory)} but those of train have labels. {_LAYOUT}"
        )
    for rows in (train, test):
        _check(rows, train.class_names)
    return on_demand(train, test, settings)


@dataclass(frozen=True)
class Rows:
    """The rows of one split: ``table`` is a ``datasets.Dataset``, mapped into memory.

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

    def read(self, index: int) -> Image.Image:
        """As :func:`conadv.data.images.read_rgb`."""
        row = int(self.numbers[index])
        try:
            content = self.table[row][self.image]
            if not content or not content["bytes"]:
                raise ValueError("the row has no bytes")
            return decode_rgb(BytesIO(content["bytes"]))
        except Exception as error:  # decoders raise nearly anything on damaged images
            raise BadImage(self.root / self.split / f"row {row}", why(error)) from error

    def bad(self, index: int, error: BadImage) -> BadFile:
        return BadFile(f"{self.split}/row {int(self.numbers[index])}", error.reason)

    def subset(self, indices: Tensor) -> Rows:
        return replace(self, numbers=self.numbers[indices], labels=self.labels[indices])


def _load(directory: Path) -> dict[str, Any]:
    """The tables by split, train first, with images as they are stored."""
    files = _files(directory)
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
        tables = load_dataset("parquet", data_files=files)
        for table in list(tables.values()):
            for name, kind in table.features.items():
                if isinstance(kind, ImageColumn):  # decoding would open a path in the table
                    tables = tables.cast_column(name, ImageColumn(decode=False))
    except Exception as error:  # reading and converting raise anything
        raise ConadvError(
            f"Cannot read the parquet files below {printable(directory)}: {printable(error)[:500]}"
        ) from error
    return {split: tables[split] for split in files}


def _files(directory: Path) -> dict[str, list[str]]:
    if not directory.is_dir():
        raise ConadvError(f"The data folder {printable(directory)} does not exist. {_LAYOUT}")
    paths = sorted(directory.rglob("*.parquet"))
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    for path in paths:
        split = path.stem.partition("-")[0].partition(".")[0]
        found.get(split, []).append(str(path))
    if not found["train"] or not any(found[split] for split in SPLITS[1:]):
        seen = ", ".join(printable(path.name) for path in paths[:3]) or "no parquet file"
        raise ConadvError(
            f"{printable(directory)} holds no training or no test rows (found {seen}). {_LAYOUT}"
        )
    return {split: names for split, names in found.items() if names}


def _column(directory: Path, table: Any, kind: str) -> str:
    """The name of the only column of this type."""
    features: Mapping[str, Any] = table.features
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    found = [name for name, its_kind in kinds.items() if its_kind == kind]
    if len(found) != 1:
        columns = ", ".join(f"{printable(name)}: {its_kind}" for name, its_kind in kinds.items())
        raise ConadvError(
            f"The parquet files below {printable(directory)} have {len(found)} columns of the type "
            f"{kind}, wanted one ({columns}). Keep one, with Dataset.cast_column and "
            "Dataset.remove_columns of datasets."
        )
    return found[0]


def _rows(directory: Path, split: str, table: Any, image: str, label: str) -> Rows:
    labels = torch.tensor([-1 if value is None else int(value) for value in table[label]])
    classes = tuple(map(str, table.features[label].names))
    numbers = torch.arange(len(labels))
    return Rows(
        directory, split, table.select_columns([image]), image, numbers, labels.long(), classes
    )


def _check(rows: Rows, classes: tuple[str, ...]) -> None:
    if rows.class_names != classes or len(classes) < 2:
        raise ConadvError(
            f"The rows below {rows.root} need two or more classes, the same in train and "
            f"{rows.split}: they have {len(classes)} and {len(rows.class_names)}."
        )
    sizes = torch.bincount(rows.labels.clamp(min=0), minlength=len(classes))
    if int(rows.labels.min()) < 0 or len(sizes) > len(classes):
        raise ConadvError(
            f"Some rows of {rows.split} below {rows.root} have no label of the {len(classes)} classes."
        )
    if not sizes.all():
        raise ConadvError(
            f"{rows.split} below {rows.root} has no image of class "
            f"{printable(classes[int(sizes.argmin())])}. Add images or remove the class."
        )
