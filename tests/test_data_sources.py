"""Sources: what is read, how it is split, and the error for everything that cannot be trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import datasets

from conadv.config.resolve import resolve
from conadv.config.schema import Config, DataConfig
from conadv.data.images import read_rgb
from conadv.data.splits import MemorySplit, PhotoSplit, Split, choose
from conadv.errors import ConadvError
from conadv.training.data import load_data, load_source

CLASSES = ("cat", "dog", "owl")


def build_source(data: Any, progress: Any = None) -> Any:
    return load_source(Config(epochs=1, data=data), progress)


def shade(split: str, label: int, number: int) -> int:
    """A grey value that tells which image it is."""
    return 20 + 60 * label + 5 * number + (30 if split != "train" else 0)


def make_folder(root: Path, sizes: dict[str, int], pixels: int = 8) -> Path:
    """root/<split>/<class>/<n>.png with ``sizes[split]`` images per class."""
    for split, count in sizes.items():
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                grey = np.full((pixels, pixels, 3), shade(split, label, n), np.uint8)
                Image.fromarray(grey).save(root / split / name / f"{n}.png")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data", {"train": 5, "test": 2})


def config(source: str, directory: Path | None = None, **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"source": source, "dir": directory, **changes})


# What is read


def test_digits_are_the_fixed_stratified_halves() -> None:
    # Red when: the scale is 255 / 15 or 16; flips are on; the split is not stratified.
    source = build_source(config("digits"))
    assert isinstance(source.train, MemorySplit)
    assert isinstance(source.test, MemorySplit)
    assert (len(source.train.labels), len(source.test.labels)) == (898, 899)
    assert (source.channels, source.image_size, source.class_names) == (1, 8, tuple("0123456789"))
    assert source.train.images.shape == (898, 1, 8, 8)
    assert source.train.images.dtype == torch.uint8
    assert set(source.train.images.unique().tolist()) == {round(v * 255 / 16) for v in range(17)}
    assert source.train.flip is False
    counts = torch.stack([torch.bincount(split.labels) for split in (source.train, source.test)])
    assert (counts[0] - counts[1]).abs().max() <= 1
    everything = torch.cat([source.train.images, source.test.images]).flatten(1).double()
    from sklearn.datasets import load_digits

    assert everything.sum() == torch.from_numpy(load_digits().data).mul(255 / 16).round().sum()


@pytest.mark.parametrize(("source", "kind"), [("cifar10", MemorySplit), ("folder", PhotoSplit)])
@pytest.mark.parametrize("test_name", ["test", "val"])
def test_a_folder_gives_each_file_with_its_label(
    tmp_path: Path, source: str, kind: type, test_name: str
) -> None:
    # Red when: labels or files are out of step; the test split is read from train.
    data = build_source(
        config(source, make_folder(tmp_path, {"train": 3, test_name: 2}), image_size=8)
    )
    assert isinstance(data.train, kind)
    assert (data.class_names, data.channels, data.image_size) == (CLASSES, 3, 8)
    for split, name, count in [(data.train, "train", 3), (data.test, test_name, 2)]:
        images = split.readable(torch.arange(3 * count))[0]
        expected = [(label, shade(name, label, n)) for label in range(3) for n in range(count)]
        assert (
            list(zip(split.labels.tolist(), images[:, 0, 4, 4].tolist(), strict=True)) == expected
        )
        assert images.shape[1:] == (3, 8, 8)


@pytest.mark.parametrize("pixels", [8, 128])  # 128 is decoded by threads
def test_decoding_more_than_one_chunk_reports_progress(tmp_path: Path, pixels: int) -> None:
    # Red when: a chunk writes to the wrong rows.
    folder = make_folder(tmp_path, {"train": 1, "test": 1}, pixels)
    for n in range(600):
        Image.fromarray(np.full((pixels, pixels), n % 200, np.uint8)).save(
            folder / "train" / "cat" / f"x{n:03}.bmp"
        )
    heard: list[tuple[str, int, int]] = []
    source = build_source(config("cifar10", folder), lambda *message: heard.append(message))
    values = source.train.readable(torch.arange(1, 601))[0][:, 0, 0, 0]
    assert values.tolist() == [n % 200 for n in range(600)]
    assert heard == [("decode train", done, 603) for done in (256, 512, 603)] + [
        ("decode test", 3, 3)
    ]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
@pytest.mark.filterwarnings("error")
def test_any_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 4, axis=1))
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    transparency = {"transparency": b"\x00\x80"} if mode == "P" else {}
    grey.convert(mode).save(path, **transparency)
    pixels = np.asarray(read_rgb(path)).astype(int)
    assert pixels.shape == (2, 4, 3)
    assert np.abs(pixels - np.array([0, 255])[:, None, None]).max() <= 3


def test_in_memory_images_are_resized_once_antialiased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: either resize takes the nearest pixel (then the chequers stay black and white).
    folder = make_folder(tmp_path, {"train": 2, "test": 2}, pixels=16)
    chequers = (np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(chequers).save(folder / "train" / "cat" / "0.png")
    source = build_source(config("cifar10", folder, image_size=4))
    assert source.image_size == 4
    assert (source.train.readable(torch.tensor([0]))[0].int() - 127).abs().max() <= 8
    assert build_source(config("digits", image_size=16)).train.readable(torch.arange(2))[
        0
    ].shape == (
        2,
        1,
        16,
        16,
    )
    monkeypatch.setattr(
        datasets, "CIFAR10", fake(np.tile(chequers[None, :, :, None], (20, 1, 1, 3)))
    )
    source = build_source(config("cifar10", tmp_path, download=True, image_size=4))
    assert (source.train.readable(torch.tensor([0]))[0].int() - 127).abs().max() <= 8


def test_images_of_any_shape_are_cropped_to_the_centre_with_image_size(root: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    Image.fromarray(wide).save(root / "train" / "cat" / "0.png")
    source = build_source(config("cifar10", root, image_size=8))
    assert (source.train.readable(torch.tensor([0]))[0] == 200).all()


# A subset of the training images


@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_a_subset_keeps_every_class_share(sizes: list[int], data: st.DataObject) -> None:
    # Red when: samples are taken without regard to the class; the remainders go to the smallest first.
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    count = data.draw(st.integers(1, len(labels)))
    names = tuple(map(str, range(len(sizes))))
    try:
        chosen = choose(labels, count, names)
    except ConadvError:
        assert count * min(sizes) < len(labels)  # only where a class's share is less than one image
        return
    assert len(chosen.unique()) == count
    share = torch.tensor(sizes) * count / len(labels)
    assert (torch.bincount(labels[chosen], minlength=len(sizes)) - share).abs().max() < 1


def test_a_subset_is_drawn_at_random_from_each_class() -> None:
    # Red when: the samples are not shuffled before the first of each class are taken.
    labels = torch.arange(1000) // 500
    chosen = choose(labels, 100, ("a", "b"))
    assert torch.equal(chosen, chosen.unique())
    assert 150 < chosen[:50].double().mean() < 350
    assert 650 < chosen[50:].double().mean() < 850


@pytest.mark.parametrize("source", ["digits", "cifar10", "folder"])
def test_the_subset_seed_chooses_the_images(root: Path, source: str) -> None:
    # Red when: the seed does not reach the choice of the subset, or that of the held-out images.
    directory, count = (None, 100) if source == "digits" else (root, 6)

    def images(subset_seed: int, **fields: int) -> list[Tensor]:
        data = build_source(
            config(source, directory, image_size=8, subset_seed=subset_seed, **fields)
        )
        return [
            split.readable(torch.arange(len(split.labels)))[0]
            for split in (data.train, data.validation)
            if split
        ]

    for fields, part in (({"train_images": count}, 0), ({"validation_images": count // 2}, 1)):
        first, again, other = (images(seed, **fields)[part] for seed in (0, 0, 5))
        assert torch.equal(first, again)
        assert first.shape == other.shape
        assert not torch.equal(first, other)


def test_the_subset_may_follow_the_seed() -> None:
    # Red when: the run's seed is not handed on, or is taken where a subset_seed is given.
    def labels(seed: int, subset_seed: int | None) -> Tensor:
        data = DataConfig(source="digits", train_images=100, subset_seed=subset_seed)
        return load_data(
            resolve(Config(epochs=1, seed=seed, global_batch_size=10, data=data))
        ).source.train.labels

    assert torch.equal(labels(7, None), labels(0, 7))
    assert not torch.equal(labels(7, None), labels(7, 0))
    with pytest.raises(ConadvError, match="no effect without"):
        resolve(Config(epochs=1, data=DataConfig(source="digits", subset_seed=1)))


@pytest.mark.parametrize("source", ["digits", "cifar10", "folder"])
def test_train_images_takes_a_stratified_subset_of_train_only(root: Path, source: str) -> None:
    directory, count = (None, 100) if source == "digits" else (root, 6)
    data = build_source(config(source, directory, train_images=count, image_size=8))
    whole = build_source(config(source, directory, image_size=8))
    # Red when: labels are taken and images are not.
    per_class = torch.bincount(data.train.labels)
    assert per_class.sum() == count
    assert per_class.max() - per_class.min() <= 1
    assert torch.equal(data.test.labels, whole.test.labels)
    assert pairs(data.train) < pairs(whole.train)


def pairs(split: Split) -> set[tuple[bytes, int]]:
    images = split.readable(torch.arange(len(split.labels)))[0]
    return {(x.numpy().tobytes(), int(y)) for x, y in zip(images, split.labels, strict=True)}


# torchvision's downloads, without the network


def fake(images: Any, **seen: Any) -> Any:
    """Stands for a torchvision data set with 20 images."""

    def factory(root: str, train: bool, download: bool) -> SimpleNamespace:
        seen.setdefault("calls", []).append((root, train, download))
        return SimpleNamespace(data=images, targets=[0, 1] * 10, classes=["a", "b"])

    factory.seen = seen  # type: ignore[attr-defined]
    return factory


def test_fashion_mnist_and_cifar10_come_from_torchvision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    grey = torch.arange(20, dtype=torch.uint8)[:, None, None].expand(20, 28, 28)
    monkeypatch.setattr(datasets, "FashionMNIST", fake(grey))
    source = build_source(config("fashion-mnist", tmp_path, download=True, train_images=10))
    assert (source.channels, source.image_size, source.class_names) == (1, 28, ("a", "b"))
    assert (len(source.train.labels), len(source.test.labels)) == (10, 20)
    assert source.test.readable(torch.tensor([7]))[0].unique().tolist() == [7]

    colour = np.zeros((20, 32, 32, 3), np.uint8)
    colour[:, :, 5, 1] = 9
    monkeypatch.setattr(datasets, "CIFAR10", fake(colour))
    source = build_source(config("cifar10", tmp_path, download=True))
    assert source.channels == 3
    assert source.train.readable(torch.tensor([0]))[0][0, 1, :, 5].unique().tolist() == [9]
    assert datasets.CIFAR10.seen["calls"] == [
        (str(tmp_path), train, True) for train in (True, False)
    ]


def test_a_failed_download_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(root: str, train: bool, download: bool) -> None:
        raise URLError("no route to host") if download else RuntimeError("Dataset not found")

    monkeypatch.setattr(datasets, "FashionMNIST", refuse)
    with pytest.raises(
        ConadvError, match=f"download of fashion-mnist into {tmp_path} failed.*no route"
    ):
        build_source(config("fashion-mnist", tmp_path, download=True))
    with pytest.raises(ConadvError, match=f"no fashion-mnist in {tmp_path}.*--download"):
        build_source(config("fashion-mnist", tmp_path))


# Errors


def no_folder(root: Path) -> str:
    shutil.rmtree(root)
    return f"{root} does not exist.*train/<class>"


def nothing_in_it(root: Path) -> str:
    shutil.rmtree(root)
    root.mkdir()
    return f"{root} has no folder train"


def no_train(root: Path) -> str:
    shutil.rmtree(root / "train")
    return f"{root} has no folder train"


def no_test(root: Path) -> str:
    shutil.rmtree(root / "test")
    return f"{root} has neither a folder test nor val"


def no_class_folders(root: Path) -> str:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    return f"{root / 'train'} is empty.*class"


def class_without_image(root: Path) -> str:
    for path in (root / "test" / "dog").iterdir():
        path.unlink()
    (root / "test" / "dog" / "notes.txt").write_text("no image")
    return f"{root / 'test' / 'dog'} holds no image"


def one_class(root: Path) -> str:
    for name in ("dog", "owl"):
        shutil.rmtree(root / "train" / name)
    return f"{root / 'train'} has only one class, 'cat'"


def other_classes(root: Path) -> str:
    (root / "test" / "dog").rename(root / "test" / "wolf")
    return "different classes.*only in train: dog; only in test: wolf"


def flatten(split: Path) -> None:
    """All images of a split directly in it, as ImageNet's validation and test images come."""
    for path in list(split.glob("*/*.png")):
        path.rename(split / f"{path.parent.name}-{path.name}")
    for folder in list(split.iterdir()):
        if folder.is_dir():
            folder.rmdir()


def flat_val(root: Path) -> str:
    flatten(root / "test")
    shutil.copytree(root / "test", root / "val")
    return rf"{root / 'val'} is not sorted by class: 6 image files.*valprep\.sh.*LOC_val_solution.*datasets\.ImageNet"


def archive_around_it(root: Path) -> str:
    shutil.copytree(root, root / "Data" / "CLS-LOC")
    shutil.rmtree(root / "train")
    return f"{root} has no folder train.*Did you mean {root / 'Data' / 'CLS-LOC'}"


SPOILT = [
    no_folder,
    nothing_in_it,
    no_train,
    no_test,
    no_class_folders,
    class_without_image,
    one_class,
    other_classes,
]


@pytest.mark.parametrize("source", ["cifar10", "folder"])
@pytest.mark.parametrize("spoil", [*SPOILT, flat_val, archive_around_it])
def test_a_folder_that_cannot_be_trained_on_is_an_error(
    root: Path, source: str, spoil: Any
) -> None:
    message = spoil(root)
    with pytest.raises(ConadvError, match=message):
        build_source(config(source, root))


@pytest.mark.parametrize("test_folder", ["flat", "empty"])
def test_a_test_folder_without_classes_leaves_the_evaluation_to_val(
    root: Path, test_folder: str
) -> None:
    # Red when: test is taken because it is there (ImageNet's has neither class folders nor labels).
    (root / "test").rename(root / "val")
    (root / "test").mkdir()
    if test_folder == "flat":
        shutil.copytree(root / "val", root / "test", dirs_exist_ok=True)
        flatten(root / "test")
    source = build_source(config("folder", root))
    assert isinstance(source.test, PhotoSplit)
    assert (source.test.listing.root, len(source.test.labels)) == (root / "val", 6)


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-60])


def not_an_image(path: Path) -> None:
    path.write_text("this is text")


def zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def sixteen_bit(path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)


@pytest.mark.parametrize("damage", [truncated, not_an_image, zero_bytes, sixteen_bit])
def test_an_unreadable_image_is_named(root: Path, damage: Any) -> None:
    # Red when: read_rgb lets the decoder's error through.
    path = root / "train" / "dog" / "3.png"
    damage(path)
    with pytest.raises(ConadvError, match=rf"Cannot read the image {path}.*Replace"):
        build_source(config("cifar10", root))
    photos = build_source(config("folder", root))
    with pytest.raises(ConadvError, match=rf"Cannot read the image {path}"):
        photos.train.readable(torch.arange(15))[0]


def test_images_of_differing_size_need_image_size(root: Path) -> None:
    path = root / "train" / "owl" / "1.png"
    Image.fromarray(np.zeros((9, 10, 3), np.uint8)).save(path)
    with pytest.raises(
        ConadvError, match=rf"{path} is 10 x 9 pixels, but .*cat/0.png is 8 x 8.*image_size"
    ):
        build_source(config("cifar10", root))
    first = root / "train" / "cat" / "0.png"
    Image.fromarray(np.zeros((9, 10, 3), np.uint8)).save(first)
    with pytest.raises(ConadvError, match=rf"{first} is 10 x 9 pixels, not square.*image_size"):
        build_source(config("cifar10", root))


def test_train_and_test_of_differing_size_need_image_size(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": 1}, pixels=8)
    make_folder(tmp_path, {"test": 1}, pixels=12)
    with pytest.raises(ConadvError, match=r"train are 8 pixels wide.*test 12.*image_size"):
        build_source(config("cifar10", tmp_path))
    assert build_source(config("cifar10", tmp_path, image_size=8)).image_size == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "folder"}, "folder needs a folder.*--data DIR"),
        ({"source": "cifar10"}, "cifar10 needs a folder"),
        ({"source": "fashion-mnist", "download": True}, "fashion-mnist needs a folder"),
        ({"source": "digits", "dir": "x"}, "no effect with data.source digits"),
        ({"source": "digits", "download": True}, "no effect with data.source digits"),
        ({"source": "folder", "dir": "x", "download": True}, "data.download has no effect"),
        (
            {"source": "digits", "train_images": 899},
            "train_images 899 is larger than .* 898 images",
        ),
        (
            {"source": "digits", "train_images": 9},
            "train_images 9 leaves no image of class.*10 classes",
        ),
        ({"source": "digits", "mean": (0.1, 0.2, 0.3)}, "data.mean has 3 values, but digits has 1"),
        ({"source": "digits", "std": (0.1, 0.2)}, "data.std has 2 values"),
        ({"source": "digits", "std": (0.0,)}, "must be positive"),
    ],
)
def test_settings_that_do_not_fit_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConadvError, match=message):
        build_source(DataConfig.model_validate(changes))


def test_three_values_of_mean_fit_three_channels_and_two_do_not(root: Path) -> None:
    build_source(config("folder", root, mean=(0.1, 0.2, 0.3), std=(1.0,)))
    with pytest.raises(ConadvError, match="Give 1 or 3"):
        build_source(config("folder", root, mean=(0.1, 0.2)))


def test_an_unknown_source_is_an_error() -> None:
    with pytest.raises(ConadvError, match="Did you mean 'cifar10'"):
        build_source(DataConfig().model_copy(update={"source": "cifar"}))


# ----------------------------------------------------------------------------------------------------------------------
# Validation images


@pytest.mark.parametrize("source", ["digits", "cifar10", "folder"])
def test_validation_images_leave_training_and_nothing_else_changes(root: Path, source: str) -> None:
    # Red when: the held-out images stay in training; other images are held out than are left out; test is cut.
    directory, taken, held = (None, 200, 50) if source == "digits" else (root, 6, 3)
    settings = {"train_images": taken, "image_size": 8}
    data = build_source(config(source, directory, validation_images=held, **settings))
    whole = build_source(config(source, directory, **settings))
    assert data.validation is not None
    assert whole.validation is None
    parts = [
        split.readable(torch.arange(len(split.labels)))[0]
        for split in (data.train, data.validation)
    ]
    together = sorted(image.numpy().tobytes() for image in torch.cat(parts))
    assert together == sorted(
        image.numpy().tobytes() for image in whole.train.readable(torch.arange(taken))[0]
    )
    assert len(data.validation.labels) == held
    per_class = torch.bincount(data.validation.labels)
    assert per_class.max() - per_class.min() <= 1
    assert torch.equal(data.test.labels, whole.test.labels)


def test_validation_images_that_empty_a_class_are_an_error() -> None:
    with pytest.raises(
        ConadvError, match=r"data\.validation_images 195 leaves no image of class .* to train on"
    ):
        build_source(config("digits", None, train_images=200, validation_images=195))
