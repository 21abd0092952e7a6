"""The same code on real files: CIFAR-10 as JPEG, and photographs of full size. Skipped where they are not present.

CONADV_TEST_DATA names a folder with cifar10/{train,test}/<class>/* and imagenet-sample/<class>/*; without it, the
archives in ../shared/data beside the checkout are unpacked into a temporary folder.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from conadv.config.schema import Config
from conadv.training.data import load_data

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("CONADV_TEST_DATA")
    if given:
        if not (Path(given) / "cifar10").is_dir():
            pytest.fail(f"CONADV_TEST_DATA={given} has no folder cifar10")
        return Path(given)
    if not (SHARED / "unpack").exists():
        pytest.skip("no real data: CONADV_TEST_DATA is not set and ../shared/data is not there")
    folder = tmp_path_factory.mktemp("real")
    subprocess.run(["sh", str(SHARED / "unpack"), str(folder)], check=True, capture_output=True)
    return folder


def test_cifar10_trains_from_memory(real: Path) -> None:
    # Red when: channels are stored in BGR order, or the images are not decoded in the order of their labels.
    data_config = {
        "source": "cifar10",
        "dir": real / "cifar10",
        "train_images": 2000,
        "augment": "basic",
    }
    values = {"epochs": 1, "global_batch_size": 500, "data": data_config}
    data = load_data(Config.model_validate(values))
    assert (data.train_size, data.test_size, data.num_classes) == (2000, 10_000, 10)
    assert (data.channels, data.image_size) == (3, 32)
    assert torch.bincount(data.source.train.labels).tolist() == [200] * 10
    images, labels = zip(*data.eval_batches("test", None, 1000), strict=True)
    pixels = torch.cat(images).double() / 255
    # the well-known channel means of CIFAR-10 are 0.491, 0.482, 0.447 (training set)
    assert torch.allclose(
        pixels.mean((0, 2, 3)), torch.tensor([0.494, 0.485, 0.450]).double(), atol=0.003
    )
    sky = [
        pixels[torch.cat(labels) == data.class_names.index(name)][:, 2].mean()
        for name in ("airplane", "frog")
    ]
    assert sky[0] > sky[1] + 0.15  # aeroplanes fly in blue, frogs sit in green
    (batch,) = data.train_batches(3, 4)
    assert batch.micro[0].views["clean"].shape == (500, 3, 32, 32)


def test_photographs_train_from_files_with_workers(real: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(real / "imagenet-sample")
    data_config = {
        "source": "folder",
        "dir": tmp_path,
        "augment": "autoaugment",
        "aug_view": "basic",
        "num_workers": 2,
    }
    values = {"epochs": 1, "global_batch_size": 32, "micro_batch_size": 16, "data": data_config}
    data = load_data(Config.model_validate(values))
    assert (data.train_size, data.num_classes, data.image_size) == (92, 92, 224)
    (batch,) = data.train_batches(2, 3, ("clean", "aug"))
    assert [tuple(view.shape) for micro in batch.micro for view in micro.views.values()] == [
        (16, 3, 224, 224)
    ] * 4
    images, labels = zip(*data.eval_batches("test", None, 50), strict=True)
    assert torch.cat(labels).tolist() == list(range(92))
    assert torch.cat(images).double().flatten(1).std(1).min() > 5
