"""Data sets of Hugging Face as local parquet files, read by the ``datasets`` library."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from conadv.data.source import Source, SourceSettings, check_classes, on_demand
from conadv.data.splits import PhotoSplit
from conadv.errors import ConadvError, install, printable

SPLITS = ("train", "test", "validation", "val", "valid")


def huggingface(settings: SourceSettings) -> Source:
    """Parquet files below ``dir``, told apart by the split's name at the beginning of theirs.

    One column of the type Image and one of the type ClassLabel are needed. The test rows are those
    of ``test``, or of ``validation`` where test has no labels (ImageNet's are all -1). ``datasets``
    converts the files once into its cache (HF_DATASETS_CACHE). Nothing is downloaded, and no code
    that lies beside the files is run.
    """
    settings.refuse("download")
    folder = settings.folder()
    tables = _load(folder)
    found = [_split(folder, split, table) for split, table in tables.items()]
    labelled = [part for part in found if int(part.labels.min()) >= 0]
    if len(labelled) < 2 or labelled[0].split != "train":
        raise ConadvError(
            f"{printable(folder)} needs rows with labels to train on and to test on (found: "
            f"{', '.join(part.split for part in found)}). Expected files such as "
            "train-00000-of-00001.parquet and test-00000-of-00001.parquet, anywhere below it."
        )
    train, test = labelled[:2]
    if train.class_names != test.class_names:
        raise ConadvError(f"train and {test.split} in {printable(folder)} have different classes.")
    for part in (train, test):
        check_classes(f"{part.split} of {folder}", part.labels, part.class_names)
    return on_demand(train, test, settings)


def _load(folder: Path) -> dict[str, Any]:
    """The tables by split, train first, with images as they are stored."""
    try:
        from datasets import Image, load_dataset
        from datasets.utils.logging import disable_progress_bar
    except ImportError as error:
        raise ConadvError(
            f"data.source huggingface needs the package datasets: {install('huggingface')}."
        ) from error
    disable_progress_bar()
    files: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        files.setdefault(path.stem.partition("-")[0].partition(".")[0], []).append(str(path))
    files = {split: files[split] for split in SPLITS if split in files}
    if not files:
        names = ", ".join(SPLITS)
        raise ConadvError(f"There is no parquet file of {names} below {printable(folder)}.")
    try:
        tables = load_dataset("parquet", data_files=files)
        for name, kind in tables[next(iter(files))].features.items():
            if isinstance(kind, Image):  # decoding would open a path in somebody else's table
                tables = tables.cast_column(name, Image(decode=False))
    except Exception as error:  # reading and converting raise anything
        raise ConadvError(
            f"Cannot read the parquet files below {printable(folder)}: {printable(error)[:500]}"
        ) from error
    return {split: tables[split] for split in files if len(tables[split])}


def _split(folder: Path, split: str, table: Any) -> PhotoSplit:
    kinds = {name: type(feature).__name__ for name, feature in table.features.items()}
    columns = []
    for kind in ("Image", "ClassLabel"):
        found = [name for name in kinds if kinds[name] == kind]
        if len(found) != 1:
            raise ConadvError(
                f"The parquet files below {printable(folder)} have {len(found)} columns of the "
                f"type {kind}, not one ({printable(kinds)}). Keep one, with Dataset.cast_column "
                "and Dataset.remove_columns of datasets."
            )
        columns += found
    image, label = columns
    labels = [-1 if value is None else int(value) for value in table[label]]
    store = Rows(table.select_columns([image]), image)
    names = tuple(map(str, table.features[label].names))
    return PhotoSplit(folder, split, np.arange(len(labels)), torch.tensor(labels), names, store)


@dataclass(frozen=True)
class Rows:
    """Images by the number of their row. ``table``: a ``datasets.Dataset``, mapped into memory."""

    table: Any
    column: str

    def open(self, key: int) -> IO[bytes]:
        content = self.table[int(key)][self.column]
        if not content or not content["bytes"]:
            raise ValueError("the row has no bytes")
        return BytesIO(content["bytes"])

    def tags(self, keys: NDArray[Any]) -> list[bytes]:
        """Numbers of bytes."""
        from pyarrow import compute  # type: ignore[import-untyped]

        content = compute.struct_field(self.table.data.column(self.column), "bytes")
        sizes = compute.fill_null(compute.binary_length(content), -1).to_numpy()
        return [b"%d\0" % size for size in sizes[keys].tolist()]
