"""Sources: contracts over the table of them, and errors for what cannot be trained on."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from conadv.data import SOURCES
from conadv.data.source import build_source
from conadv.data.splits import Draw, choose
from conadv.errors import ConadvError
from conadv.training.data import load_data, load_source

from .data_cases import CASES, CLASSES, case, hub_cache, image_folder, parquet, picture, pixels

__all__ = ["case", "hub_cache"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "data")


# ---- what holds for every source


def test_every_source_has_a_case() -> None:
    assert {name.partition(" ")[0] for name in CASES} == set(SOURCES)


def test_a_split_is_a_pure_function_of_numbers_and_keys(case: dict[str, Any]) -> None:
    # Red when: a subset takes labels and not images, or the test set is cut; a draw depends on the
    # batch.
    found = build_source(**case)
    for split in (found.train, found.test):
        images = pixels(split)
        shape = (len(split.labels), found.channels, found.image_size, found.image_size)
        assert (images.dtype, tuple(images.shape)) == (torch.uint8, shape)
        assert len(torch.bincount(split.labels)) == len(found.class_names)
        assert images.flatten(1).float().std(1).min() > 1
        again = pickle.loads(pickle.dumps(split))  # as it goes to a worker process
        assert torch.equal(pixels(again), images)
        part = split.subset(torch.tensor([5, 2]))
        assert torch.equal(pixels(part), images[[5, 2]])
        assert torch.equal(part.labels, split.labels[[5, 2]])
    rows, split = torch.tensor([7, 0, 3]), found.train
    draws = {"a": Draw("basic", torch.arange(9)), "b": Draw("randaugment", torch.arange(9) + 50)}
    whole = split.views(torch.arange(9), draws)
    some = split.views(rows, {k: Draw(d.augment, d.keys_N[rows]) for k, d in draws.items()})
    for view, images in whole.items():
        assert torch.equal(some[view], images[rows]), view
        assert not torch.equal(images, pixels(split)[:9])


def images_and_labels(split: Any) -> list[tuple[bytes, int]]:
    return [(x.numpy().tobytes(), int(y)) for x, y in zip(pixels(split), split.labels, strict=True)]


def test_validation_images_leave_training_and_nothing_else_changes(case: dict[str, Any]) -> None:
    # Red when: the held-out images stay in training; others are held out than are left out; test is
    # cut; the seed does not reach the choice.
    count = 40 if case["source"] == "digits" else 6
    case["train_images"] = case.get("train_images", 15)
    whole = build_source(**case)
    held, other = (build_source(**case, validation_images=count, subset_seed=s) for s in (0, 5))
    if case["source"] != "digits":
        assert torch.bincount(whole.train.labels).tolist() == [5, 5, 5]
        assert torch.bincount(held.validation.labels).tolist() == [2, 2, 2]
    parts = images_and_labels(held.train) + images_and_labels(held.validation)
    assert sorted(parts) == sorted(images_and_labels(whole.train))
    assert images_and_labels(held.test) == images_and_labels(whole.test)
    assert images_and_labels(other.train) != images_and_labels(held.train)


# ---- what is special to one


def test_digits_are_the_fixed_stratified_halves() -> None:
    # Red when: the scale is 255 / 15 or 16; flips are on; the split is not stratified.
    found: Any = build_source("digits")
    assert found.train.images.unique().tolist() == [round(v * 255 / 16) for v in range(17)]
    assert found.train.flip is False
    ours, theirs = (torch.bincount(split.labels) for split in (found.train, found.test))
    assert (int(ours.sum()), int(theirs.sum())) == (898, 899)
    assert (ours - theirs).abs().max() <= 1


def test_in_memory_images_are_resized_once_antialiased(root: Path) -> None:
    # Red when: the nearest pixel is taken (the chequers stay black and white), or the image is not
    # cropped to its centre.
    chequers = (np.indices((16, 48)).sum(0) % 2 * 255).astype(np.uint8)
    chequers[:, :16] = chequers[:, 32:] = 255
    Image.fromarray(chequers).save(root / "train" / "cat" / "0.png")
    found = build_source("cifar10", dir=root, image_size=4)
    assert (pixels(found.train)[0, :, :, 1:3].int() - 127).abs().max() <= 8
    assert pixels(build_source("digits", image_size=16).train).shape[-1] == 16


def test_decoding_reports_progress_and_keeps_the_order(tmp_path: Path) -> None:
    # Red when: an image goes to another row than its own, or its channels are in another order.
    folder = image_folder(tmp_path, 200, 2)
    heard: list[Any] = []
    found = build_source("cifar10", dir=folder, progress=lambda *line: heard.append(line))
    names = sorted(str(n) for n in range(200))
    for row in (0, 1, 255, 256, 599):
        want = picture(100 * (row // 200) + int(names[row % 200]))
        assert np.array_equal(pixels(found.train)[row].permute(1, 2, 0).numpy(), np.asarray(want))
    assert heard == [("decode train", n, 600) for n in (256, 512, 600)] + [("decode test", 6, 6)]


def test_files_and_rows_with_the_same_images_are_the_same_source(
    tmp_path: Path, hub_cache: None
) -> None:
    # Red when: the order of rows or keys differs, or test without labels is taken instead of
    # validation.
    table = build_source(**CASES["huggingface"](tmp_path / "table"))
    for n in range(24):
        path = tmp_path / "files" / ("train" if n < 12 else "val") / CLASSES[n % 3] / f"{n:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(n % 12).save(path)
    files = build_source("folder", dir=tmp_path / "files", image_size=8)
    order = torch.argsort(table.test.labels, stable=True)
    assert torch.equal(pixels(table.test)[order], pixels(files.test))


def test_links_are_followed_and_a_test_folder_without_classes_is_passed_over(root: Path) -> None:
    # Red when: test is taken because it is there (ImageNet's has neither class folders nor labels).
    (root / "elsewhere").mkdir()
    picture(7).save(root / "elsewhere" / "7.PNG")
    (root / "train" / "cat" / "more").symlink_to(root / "elsewhere")
    (root / "test").rename(root / "val")
    (root / "test").mkdir()
    picture(1).save(root / "test" / "1.png")
    found = build_source("folder", dir=root)
    assert (len(found.train.labels), len(found.test.labels)) == (25, 12)


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".cat"])
def test_what_other_programs_leave_behind_is_no_image(root: Path, name: str) -> None:
    # Red when: such a folder is a class, or the thumbnails in it are images of one.
    before = build_source("folder", dir=root).train
    for folder in (root / "train", root / "test", root / "train" / "cat"):
        (folder / name).mkdir()
        picture(3).save(folder / name / "thumbnail.png")
    (root / "train" / "cat" / "._0.png").write_bytes(b"resource fork")
    found = build_source("folder", dir=root)
    assert found.class_names == CLASSES
    assert found.train.keys.tolist() == before.keys.tolist()


# ---- a subset


@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.data(), st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_subset_keeps_every_class_share(
    sizes: list[int], data: st.DataObject, leave: int
) -> None:
    # Red when: samples are taken without regard to the class; the remainders go to the smallest
    # first; the number that an error advises is still an error.
    labels = torch.repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    count, names = data.draw(st.integers(1, len(labels))), tuple(map(str, range(len(sizes))))
    try:
        chosen = choose(labels, count, names, 0, "x", leave)
    except ConadvError as error:
        if "Choose at least" in str(error):
            enough = int(str(error).rpartition(" ")[2].rstrip("."))
            assert len(choose(labels, enough, names, 0, "x", leave)) == enough > count
        elif "Add images" in str(error):
            assert leave >= min(sizes)
        else:
            assert leave
            assert count > 1
        return
    assert len(chosen.unique()) == count
    assert torch.equal(chosen, chosen.sort().values)
    taken = torch.bincount(labels[chosen], minlength=len(sizes))
    assert (taken - torch.tensor(sizes) * count / len(labels)).abs().max() < 1
    assert taken.min() > 0
    assert (torch.tensor(sizes) - taken).min() >= leave


def test_the_subset_may_follow_the_seed() -> None:
    # Red when: the run's seed is not handed on, or is taken where a subset_seed is given.
    def labels(seed: int, subset_seed: int | None) -> Tensor:
        data = DataConfig(source="digits", train_images=100, subset_seed=subset_seed)
        run = resolve(Config(epochs=1, seed=seed, global_batch_size=10, data=data))
        return load_data(run).source.train.labels

    assert torch.equal(labels(7, None), labels(0, 7))
    assert not torch.equal(labels(7, None), labels(7, 0))


# ---- errors


def _flat_val(root: Path) -> None:
    for path in (root / "test").glob("*/*.png"):
        path.rename(root / "test" / f"{path.parent.name}-{path.name}")
    for name in CLASSES:
        (root / "test" / name).rmdir()


def _only_cat(root: Path) -> None:
    for name in ("dog", "owl"):
        shutil.rmtree(root / "train" / name)


def _no_images(root: Path) -> None:
    for name in ("emu", "yak"):
        (root / "test" / name).mkdir()
        (root / "test" / name / "notes.txt").write_text("no image")


SPOILT: list[tuple[Callable[[Path], Any], str]] = [
    (shutil.rmtree, "does not exist.*train/<class>"),
    (lambda root: shutil.rmtree(root / "train"), "has no folder train"),
    (lambda root: shutil.rmtree(root / "test"), "neither a folder test nor val"),
    (_only_cat, "only one class"),
    (_no_images, "no image in .*test of these classes: emu, yak"),
    (
        lambda root: (root / "test" / "dog").rename(root / "test" / "wolf"),
        "different classes.*only in train: dog; only in test: wolf",
    ),
    (_flat_val, r"test has no class folders.*valprep\.sh"),
    (
        lambda root: (root / "train" / "dog" / "self").symlink_to(root / "train"),
        "is a link to a folder that it lies in",
    ),
    (lambda root: (root / "train").chmod(0), "Cannot read the folder .*train: Permission denied"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT)
def test_a_folder_that_cannot_be_trained_on_is_an_error(
    root: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(root)
    if message.endswith("denied") and os.access(root / "train", os.R_OK):
        pytest.skip("root may read everything")
    for name in ("cifar10", "folder"):
        with pytest.raises(ConadvError, match=message):
            build_source(name, dir=root)


def test_images_of_several_sizes_need_image_size(root: Path) -> None:
    for name, width in (("cat/0", 24), ("owl/1", 8)):
        picture(1, width, 16 if width > 16 else 8).save(root / "train" / f"{name}.png")
        with pytest.raises(ConadvError, match=rf"{name}.png is {width} x .*Give data.image_size"):
            build_source("cifar10", dir=root)
        assert build_source("cifar10", dir=root, image_size=8).image_size == 8
        picture(1).save(root / "train" / f"{name}.png")


TABLES: list[tuple[dict[str, Any], str]] = [
    ({}, "no parquet file"),
    ({"train": [0, 1, 2]}, "rows with labels.*found: train"),
    ({"train": [0, 1, 2], "test": [-1, -1]}, "rows with labels.*found: train, test"),
    ({"train": [0, 0, 1], "test": [0, 1, 2]}, "no image in train of .* of these classes: owl"),
    ({"train": [0, 1, 2], "test": [0, 1, 2], "without": "pixels"}, "0 columns of the type Image"),
    ({"train": b"PAR1 no", "test": [0, 1, 2]}, "Cannot read the parquet files"),
]


@pytest.mark.parametrize(("content", "message"), TABLES)
def test_tables_that_cannot_be_trained_on_are_errors(
    tmp_path: Path, content: dict[str, Any], message: str, hub_cache: None
) -> None:
    (tmp_path / "data").mkdir()
    for split in {"train", "test"} & content.keys():
        if isinstance(content[split], bytes):
            (tmp_path / "data" / f"{split}.parquet").write_bytes(content[split])
        else:
            without = content.get("without")
            parquet(tmp_path / "data", f"{split}.parquet", content[split], without=without)
    with pytest.raises(ConadvError, match=message):
        build_source("huggingface", dir=tmp_path / "data")


def test_a_path_in_a_table_is_not_followed(tmp_path: Path, hub_cache: None) -> None:
    # Red when: images are decoded by datasets, which opens the path.
    picture(0).save(tmp_path / "secret.png")
    row = {"bytes": None, "path": str(tmp_path / "secret.png")}
    for split in ("train", "test"):
        parquet(tmp_path / "d", f"{split}.parquet", [0, 1, 2], row0=row)
    train = build_source("huggingface", dir=tmp_path / "d").train
    with pytest.raises(ConadvError, match=r"train/row 0: the row has no bytes"):
        train.readable(torch.tensor([0]))


def test_the_extra_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConadvError, match=r"pip install '\.\[huggingface\]'"):
        build_source("huggingface", dir=tmp_path)


DIGITS: dict[str, Any] = {"source": "digits"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "cifar"}, "Did you mean 'cifar10'"),
        ({"source": "folder"}, "folder needs a folder.*--data DIR"),
        ({**DIGITS, "dir": Path("x")}, "data.dir has no effect with data.source digits"),
        ({**DIGITS, "on_bad_image": "skip"}, "data.on_bad_image has no effect"),
        ({"source": "folder", "dir": Path("x"), "download": True}, "data.download has no effect"),
        ({**DIGITS, "train_images": 899}, "train_images 899 is larger than .* 898 images"),
        ({**DIGITS, "train_images": 9}, "train_images 9 takes no image of class.*at least 11"),
        (
            {**DIGITS, "train_images": 200, "validation_images": 195},
            "validation_images 195 leaves no image of class.*a smaller number",
        ),
    ],
)
def test_settings_that_do_not_fit_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConadvError, match=message):
        build_source(**changes)


@pytest.mark.parametrize("held", [1, 2, 11, 21])
def test_no_number_of_validation_images_helps_a_class_of_one(root: Path, held: int) -> None:
    # Red when: the advice is to take more, or fewer, of a class that has a single image.
    for number in range(1, 8):
        (root / "train" / "owl" / f"{number}.png").unlink()
    with pytest.raises(ConadvError, match=r"'owl' has 1 image.*Add images to the class or"):
        build_source("folder", dir=root, validation_images=held)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.1, 0.2, 0.3)}, "data.mean has 3 values, but digits has 1.*Give 1 or 1"),
        ({"std": (0.1, 0.2)}, "data.std has 2 values"),
        ({"std": (0.0,)}, "must be positive"),
    ],
)
def test_normalisation_fits_the_channels(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConadvError, match=message):
        load_source(Config(epochs=1, data=DataConfig(**changes)))


def test_a_failed_download_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(root: str, train: bool, download: bool) -> None:
        raise RuntimeError("no route to host" if download else "Dataset not found")

    monkeypatch.setattr(datasets, "FashionMNIST", refuse)
    with pytest.raises(ConadvError, match=f"Cannot download fashion-mnist into {tmp_path}.*route"):
        build_source("fashion-mnist", dir=tmp_path, download=True)
    with pytest.raises(ConadvError, match=f"no fashion-mnist in {tmp_path}.*--download"):
        build_source("fashion-mnist", dir=tmp_path)
