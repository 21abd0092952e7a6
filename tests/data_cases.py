"""One row per data source: how to make a small one of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from conadv.config.schema import Config

CLASSES = ("cat", "dog", "owl")


def picture(number: int, width: int = 16, height: int = 16) -> Image.Image:
    noise = np.random.default_rng(number)
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def image_folder(root: Path, train: int = 8, test: int = 4, held: str = "test") -> Path:
    """root/{train,test}/{cat,dog,owl}/<n>.png."""
    for s, (split, count) in enumerate({"train": train, held: test}.items()):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                picture(1000 * s + 100 * label + n).save(root / split / name / f"{n}.png")
    return root


def parquet(folder: Path, name: str, labels: list[int], **changes: Any) -> None:
    """A file of Hugging Face; ``changes``: a column, or a row's number and its image."""
    hub = pytest.importorskip("datasets", reason="the extra huggingface is not installed")
    kinds = {"pixels": hub.Image(), "kind": hub.ClassLabel(names=list(CLASSES))}
    images: list[Any] = []
    for n in range(len(labels)):
        picture(n).save(file := io.BytesIO(), "PNG")
        images.append(changes.get(f"row{n}", {"bytes": file.getvalue(), "path": None}))
    content = {"pixels": images, "kind": labels}
    kept = {key: value for key, value in content.items() if key != changes.get("without")}
    features = hub.Features({key: kinds[key] for key in kept})
    folder.mkdir(parents=True, exist_ok=True)
    hub.Dataset.from_dict(kept, features=features).to_parquet(str(folder / name))


def _table(root: Path) -> dict[str, Any]:
    parquet(root, "train-00000-of-00002.parquet", [0, 1, 2] * 4)
    parquet(root, "train-00001-of-00002.parquet", [0, 1, 2] * 4)
    parquet(root, "test-00000-of-00001.parquet", [-1, -1])
    parquet(root, "validation-00000-of-00001.parquet", [0, 1, 2] * 4)
    return {"source": "huggingface", "dir": root, "image_size": 8}


def _torchvision(factory: str, shape: tuple[int, ...]) -> Callable[[Path], dict[str, Any]]:
    """A stand-in for a download, with as many images as the folder of the others."""

    def make(root: str, train: bool, download: bool) -> SimpleNamespace:
        count = 24 if train else 12
        images = np.random.default_rng(train).integers(0, 256, (count, *shape), dtype=np.uint8)
        return SimpleNamespace(data=images, targets=[0, 1, 2] * (count // 3), classes=list(CLASSES))

    def case(root: Path) -> dict[str, Any]:
        mock.patch.object(datasets, factory, make).start()
        name = {"CIFAR10": "cifar10", "FashionMNIST": "fashion-mnist"}[factory]
        return {"source": name, "dir": root, "download": True}

    return case


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "digits": lambda root: {"source": "digits", "train_images": 240},
    "cifar10": lambda root: {"source": "cifar10", "dir": image_folder(root)},
    "cifar10 by torchvision": _torchvision("CIFAR10", (16, 16, 3)),
    "fashion-mnist": _torchvision("FashionMNIST", (16, 16)),
    "folder": lambda root: {"source": "folder", "dir": image_folder(root), "image_size": 8},
    "huggingface": _table,
}


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("datasets", reason="the extra huggingface is not installed")
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """The settings of one source after another."""
    if request.param == "huggingface":
        request.getfixturevalue("hub_cache")
    yield CASES[request.param](tmp_path / "data")
    mock.patch.stopall()


def pixels(split: Any) -> torch.Tensor:
    """All images of a split as evaluation sees them."""
    images: torch.Tensor = split.readable(torch.arange(len(split.labels)))[0]
    return images


def config(batch: int, micro: int | None = None, seed: int = 0, **data: Any) -> Config:
    sizes = {"global_batch_size": batch, "micro_batch_size": micro, "seed": seed, "epochs": 1}
    return Config.model_validate({**sizes, "data": data})
