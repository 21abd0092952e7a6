"""What a data set's fingerprint sees, and what it says of a change."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conadv.data.fingerprint import changes, fingerprint
from conadv.data.source import build_source

from .data_cases import CLASSES, case, hub_cache, image_folder, parquet, picture

__all__ = ["case", "hub_cache"]


def test_the_same_data_have_the_same_fingerprint_anywhere(case: dict[str, Any]) -> None:
    # Red when: it depends on the folder's place, on a file's time, or cannot be written as JSON.
    before = fingerprint(build_source(**case))
    if "dir" in case and case["dir"].exists():
        case["dir"] = case["dir"].rename(case["dir"].with_name("moved"))
        for path in case["dir"].rglob("*.*"):
            os.utime(path, (1, 1))
    after = fingerprint(build_source(**case))
    assert changes(json.loads(json.dumps(before)), after) == []
    assert [sum(split["counts"]) for split in before["splits"].values()] == (
        [240, 899] if case["source"] == "digits" else [24, 12]
    )


def add_four(root: Path) -> None:
    for number in range(4):
        picture(number).save(root / "train" / "dog" / f"x{number}.png")


def rename_class(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "wolf")


def swap_classes(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / "x")
        (root / split / "owl").rename(root / split / "cat")
        (root / split / "x").rename(root / split / "owl")


EDITS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "images more": (
        add_four,
        [
            "train: 24 images before, 28 now.",
            "train: more or fewer images in dog (8 before, 12 now).",
        ],
    ),
    "an image less to test on": (
        lambda root: (root / "test" / "owl" / "0.png").unlink(),
        [
            "test: 12 images before, 11 now.",
            "test: more or fewer images in owl (4 before, 3 now).",
        ],
    ),
    "an image of another size": (
        lambda root: Image.new("RGB", (16, 16)).save(root / "train/owl/7.png"),
        ["train: other images, names or sizes in owl."],
    ),
    "another name": (
        lambda root: (root / "train/cat/1.png").rename(root / "train/cat/9.png"),
        ["train: other images, names or sizes in cat."],
    ),
    "a class's name": (
        rename_class,
        ["Classes that are missing: dog.", "Classes that are new: wolf."],
    ),
    "two classes' names": (
        swap_classes,
        [
            "train: other images, names or sizes in cat, owl.",
            "test: other images, names or sizes in cat, owl.",
        ],
    ),
    "no test of a class any more": (
        lambda root: [shutil.rmtree(root / split / "owl") for split in ("train", "test")],
        [
            "Classes that are missing: owl.",
            "train: 24 images before, 16 now.",
            "test: 12 images before, 8 now.",
        ],
    ),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("source", ["folder", "cifar10"])
def test_every_change_of_a_folder_is_named(edit: str, source: str, tmp_path: Path) -> None:
    # Red when: a file's tag leaves out the size or the name; no image's content is hashed (two
    # classes' names: all files are of one size here); the hash is over a whole split.
    root = image_folder(tmp_path / "data")
    before = fingerprint(build_source(source, dir=root))
    change, said = EDITS[edit]
    change(root)
    found = changes(before, fingerprint(build_source(source, dir=root)))
    assert found == said


def test_other_images_in_a_table_are_a_change(tmp_path: Path, hub_cache: None) -> None:
    # Red when: rows are told apart by their numbers alone.
    def of(labels: list[int], **changed: Any) -> Any:
        parquet(tmp_path / "d", "train.parquet", labels, **changed)
        parquet(tmp_path / "d", "test.parquet", [0, 1, 2])
        return fingerprint(build_source("huggingface", dir=tmp_path / "d"))

    before = of([0, 1, 2, 0, 1, 2])
    picture(9, 20).save(tmp_path / "x.png")
    other = {"bytes": (tmp_path / "x.png").read_bytes(), "path": None}
    named = f"other images, names or sizes in {CLASSES[1]}."
    assert changes(before, of([0, 1, 2, 0, 1, 2])) == []
    assert changes(before, of([0, 1, 2, 0, 1, 2], row4=other)) == [f"train: {named}"]


def test_images_held_out_and_other_orders_are_changes() -> None:
    # Red when: validation is left out; a class's images are hashed as a set.
    whole = build_source("digits", train_images=100)
    before = fingerprint(whole)
    held = fingerprint(build_source("digits", train_images=100, validation_images=30))
    assert "validation: 30 images that are new." in changes(before, held)
    assert "validation: 30 images that are missing." in changes(held, before)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    mixed = type(whole)(**{**vars(whole), "train": whole.train.subset(order)})
    assert changes(before, fingerprint(mixed)) == [
        "train: other images, names or sizes in 0, 1, 2, 3, 4 and 5 more."
    ]
    by_class = whole.train.subset(torch.argsort(whole.train.labels, stable=True))
    sorted_ = type(whole)(**{**vars(whole), "train": by_class})
    assert changes(before, fingerprint(sorted_)) == ["train: the images are in another order."]
    names = tuple(reversed(whole.class_names))
    renamed = type(whole)(**{**vars(whole), "class_names": names})
    assert changes(before, fingerprint(renamed))[0] == (
        "The classes are in another order: 0, 1, 2, 3, 4 and 5 more before, "
        "9, 8, 7, 6, 5 and 5 more now."
    )
