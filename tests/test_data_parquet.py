"""Data sets of Hugging Face as local parquet files."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conadv.config.schema import Config, DataConfig
from conadv.data.splits import Draw
from conadv.errors import ConadvError
from conadv.training.data import load_source

datasets = pytest.importorskip("datasets", reason="the extra huggingface is not installed")


def build_source(data: Any, progress: Any = None) -> Any:
    return load_source(Config(epochs=1, data=data), progress)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def photo(number: int, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


def rows(labels: list[int], first: int = 0, *, path: str | None = None) -> dict[str, list[Any]]:
    images = [
        {"bytes": photo(first + n, "L" if n == 1 else "RGB"), "path": path}
        for n in range(len(labels))
    ]
    return {"pixels": images, "kind": labels, "note": ["x"] * len(labels)}


def write(
    folder: Path,
    name: str,
    content: dict[str, list[Any]],
    classes: tuple[str, ...] = ("cat", "dog"),
) -> None:
    features = datasets.Features(
        {
            "pixels": datasets.Image(),
            "kind": datasets.ClassLabel(names=list(classes)),
            "note": datasets.Value("string"),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(content, features=features).to_parquet(str(folder / name))


def config(folder: Path, **changes: Any) -> DataConfig:
    return DataConfig(
        source="huggingface", dir=folder, image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3, **changes
    )


def test_rows_are_the_images_that_were_written(tmp_path: Path) -> None:
    """Red when: rows are read in another order, or a subset keeps the numbers of the whole."""
    folder = tmp_path / "d" / "data"
    write(folder, "train-00000-of-00002.parquet", rows([0, 1, 0]))
    write(folder, "train-00001-of-00002.parquet", rows([1, 1], first=3))
    write(folder, "test-00000-of-00001.parquet", rows([1, 0], first=10))
    source = build_source(config(tmp_path / "d"))
    assert source.class_names == ("cat", "dog")
    assert source.train.labels.tolist() == [0, 1, 0, 1, 1]
    assert source.test.labels.tolist() == [1, 0]
    split: Any = source.train
    wanted = np.asarray(Image.open(io.BytesIO(photo(3))))
    np.testing.assert_array_equal(np.asarray(split.listing.read(3)), wanted)
    part = split.subset(torch.tensor([4]))
    assert torch.equal(part.readable(torch.tensor([0]))[0], split.readable(torch.tensor([4]))[0])
    assert split.readable(torch.arange(5))[0].shape == (5, 3, 16, 16)


def test_views_are_those_of_the_same_images_in_a_folder(tmp_path: Path) -> None:
    """Red when: keys or the order of rows differ."""
    write(tmp_path / "t", "train.parquet", rows([0, 0, 1, 1]))
    write(tmp_path / "t", "test.parquet", rows([0, 1]))
    for split, labels in (("train", [0, 0, 1, 1]), ("test", [0, 1])):
        for number, label in enumerate(labels):
            file = tmp_path / "f" / split / ("cat", "dog")[label] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(photo(number, "L" if number == 1 else "RGB"))
    table = build_source(config(tmp_path / "t")).train
    files = build_source(config(tmp_path / "f").model_copy(update={"source": "folder"})).train
    draws = {"clean": Draw("basic", torch.tensor([5, 6, 7, 8]))}
    numbers = torch.arange(4)
    assert torch.equal(table.views(numbers, draws)["clean"], files.views(numbers, draws)["clean"])
    again = pickle.loads(pickle.dumps(table))  # as it goes to a worker process
    assert torch.equal(again.readable(numbers)[0], table.readable(numbers)[0])


def test_validation_stands_in_for_a_test_set_without_labels(tmp_path: Path) -> None:
    write(tmp_path, "train.parquet", rows([0, 1]))
    write(tmp_path, "test.parquet", rows([-1, -1]))
    write(tmp_path, "validation.parquet", rows([1, 0]))
    assert build_source(config(tmp_path)).test.labels.tolist() == [1, 0]


def test_a_damaged_row_is_named_or_left_out(tmp_path: Path) -> None:
    content = rows([0, 0, 1])
    content["pixels"][1]["bytes"] = b"no image"
    write(tmp_path, "train.parquet", content)
    write(tmp_path, "test.parquet", rows([0, 1]))
    train = build_source(config(tmp_path)).train
    with pytest.raises(ConadvError, match=r"train/row 1: it is not an image"):
        train.readable(torch.arange(3))[0]
    bad: list[Any] = []
    draws = {"clean": Draw("none", torch.zeros(3, dtype=torch.int64))}
    views = train.views(torch.arange(3), draws, bad)["clean"]
    assert torch.equal(views[1], views[0])
    assert [file.path for file in bad] == ["train/row 1"]


def test_a_path_in_a_table_is_not_followed(tmp_path: Path) -> None:
    """Red when: images are decoded by datasets, which opens the path."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(photo(0))
    content = rows([0, 1])
    content["pixels"][0] = {"bytes": None, "path": str(secret)}
    write(tmp_path / "d", "train.parquet", content)
    write(tmp_path / "d", "test.parquet", rows([0, 1]))
    with pytest.raises(ConadvError, match=r"no bytes"):
        build_source(config(tmp_path / "d")).train.readable(torch.tensor([0]))[0]


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConadvError, match="does not exist"):
        build_source(config(tmp_path / "nowhere"))
    write(tmp_path / "a", "train.parquet", rows([0, 1]))
    with pytest.raises(ConadvError, match=r"no training or no test rows \(found train.parquet\)"):
        build_source(config(tmp_path / "a"))
    write(tmp_path / "a", "test.parquet", rows([-1, -1]))
    with pytest.raises(ConadvError, match="have labels"):
        build_source(config(tmp_path / "a"))
    write(tmp_path / "b", "train.parquet", rows([0, 0]))
    write(tmp_path / "b", "test.parquet", rows([0, 1]))
    with pytest.raises(ConadvError, match="no image of class dog"):
        build_source(config(tmp_path / "b"))
    (tmp_path / "b" / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConadvError, match="Cannot read the parquet files"):
        build_source(config(tmp_path / "b"))
    table = {"kind": [0, 1], "note": ["a", "b"]}
    for split in ("train", "test"):
        (tmp_path / "c").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(table).to_parquet(str(tmp_path / "c" / f"{split}.parquet"))
    with pytest.raises(ConadvError, match="0 columns of the type Image"):
        build_source(config(tmp_path / "c"))
