"""Batches: the same for any number of workers, ranks and starting points; and windows over them."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from conadv import windows
from conadv.config.schema import Config
from conadv.data import loader
from conadv.data.loader import Data, _stream
from conadv.errors import ConadvError
from conadv.training.data import load_data
from conadv.types import Batch

VIEWS = ("clean", "second", "aug")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 training and 4 test images of various sizes."""
    root, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                image = noise.integers(0, 256, (20 + n, 30 - 3 * n, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / split / name / f"{n}.jpg")
    return root


def config(batch: int, micro: int | None = None, seed: int = 0, **data: Any) -> Config:
    data = {"augment": "basic", "aug_view": "randaugment", **data}
    values = {
        "epochs": 1,
        "global_batch_size": batch,
        "micro_batch_size": micro,
        "seed": seed,
        "data": data,
    }
    return Config.model_validate(values)


def folder_config(root: Path, **changes: Any) -> Config:
    return config(4, 2, source="folder", dir=root, image_size=16, **changes)


def same(a: Batch, b: Batch) -> bool:
    if (a.step, a.epoch, len(a.micro)) != (b.step, b.epoch, len(b.micro)):
        return False
    return all(
        x.index == y.index
        and torch.equal(x.y_N, y.y_N)
        and x.views.keys() == y.views.keys()
        and all(torch.equal(x.views[view], y.views[view]) for view in x.views)
        for x, y in zip(a.micro, b.micro, strict=True)
    )


def all_same(a: Iterator[Batch] | list[Batch], b: Iterator[Batch] | list[Batch]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return bool(pairs) and all(same(x, y) for x, y in pairs)


# build_data


def test_data_says_what_it_holds() -> None:
    data = load_data(config(100))
    assert (data.num_classes, data.channels, data.image_size) == (10, 1, 8)
    assert (data.train_size, data.test_size, data.class_names) == (898, 899, tuple("0123456789"))
    assert data.order.steps_per_epoch == 8


def test_a_batch_larger_than_the_data_set_is_an_error() -> None:
    with pytest.raises(ConadvError, match=r"1000 .*898 images"):
        load_data(config(1000))


def test_a_batch_that_the_ranks_do_not_divide_is_an_error() -> None:
    with pytest.raises(ConadvError, match=r"3 rank"):
        load_data(config(100, 50), ranks=3)


# train_batches


def test_batches_hold_the_images_of_the_order_with_their_labels() -> None:
    # Red when: labels are taken from other indices than images; a view is not a draw of its own augmentation.
    data = load_data(config(64, 16, augment="none"))
    for batch in data.train_batches(0, 30, ("clean", "second")):
        assert batch.epoch == data.order.epoch_of(batch.step)
        assert [micro.index for micro in batch.micro] == [0, 1, 2, 3]
        indices = data.order.indices(batch.step)
        clean = torch.cat([micro.views["clean"] for micro in batch.micro])
        assert torch.equal(clean, data.source.train.readable(indices)[0])
        assert torch.equal(
            torch.cat([micro.y_N for micro in batch.micro]), data.source.train.labels[indices]
        )
        assert all(
            torch.equal(micro.views["clean"], micro.views["second"]) for micro in batch.micro
        )


def test_views_are_independent_and_the_clean_view_does_not_depend_on_the_others() -> None:
    # Red when: the view's name is left out of the key.
    data = load_data(config(128, aug_view="basic"))
    (alone,), (batch,) = data.train_batches(0, 1, ("clean",)), data.train_batches(0, 1, VIEWS)
    views = batch.micro[0].views
    assert torch.equal(alone.micro[0].views["clean"], views["clean"])
    assert {v.dtype for v in views.values()} == {torch.uint8}
    for a, b in [("clean", "second"), ("clean", "aug"), ("second", "aug")]:
        assert (views[a] != views[b]).flatten(1).any(1).float().mean() > 0.7


def test_epochs_and_seeds_give_other_batches() -> None:
    # Red when: epoch or seed is left out of the sample's key (a full-batch step then repeats its augmentation).
    data, other = load_data(config(898)), load_data(config(898, seed=1))

    def total(data: Data, step: int) -> int:
        (batch,) = data.train_batches(step, step + 1)
        return int(batch.micro[0].views["clean"].long().sum())

    assert len({total(data, 0), total(data, 1), total(other, 0)}) == 3


@given(st.integers(0, 40), st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_resuming_at_any_step_continues_the_same_batches(start: int, count: int) -> None:
    # Red when: a step's keys count from start_step.
    data = _resume_data()
    whole = list(data.train_batches(0, start + count, VIEWS))
    assert all_same(whole[start:], data.train_batches(start, start + count, VIEWS))


def _resume_data() -> Data:
    return load_data(config(90, 30))


@pytest.mark.parametrize("ranks", [2, 4])
def test_n_ranks_are_one_rank_with_n_fold_accumulation(ranks: int) -> None:
    # Red when: MicroBatch.index is m instead of rank * accumulation + m.
    one = load_data(config(96, 12))
    many = [load_data(config(96, 12), rank=rank, ranks=ranks) for rank in range(ranks)]
    shares = zip(*(data.train_batches(0, 12, VIEWS) for data in many), strict=True)
    joined = [
        Batch(s[0].step, tuple(m for batch in s for m in batch.micro), s[0].epoch) for s in shares
    ]
    assert all_same(joined, one.train_batches(0, 12, VIEWS))


def test_worker_processes_change_nothing(photos: Path) -> None:
    # Red when: an augmentation draws from the worker's own generator.
    in_place, workers = (load_data(folder_config(photos, num_workers=count)) for count in (0, 2))
    assert all_same(in_place.train_batches(1, 8, VIEWS), workers.train_batches(1, 8, VIEWS))
    in_place, workers = (load_data(config(50, 25, num_workers=count)) for count in (0, 2))
    assert all_same(in_place.train_batches(0, 3, VIEWS), workers.train_batches(0, 3, VIEWS))


@dataclass(frozen=True)
class Touch:
    """Leaves a file for every key that was loaded, in whatever process."""

    folder: Path

    def __call__(self, key: int) -> int:
        (self.folder / str(key)).touch()
        return key


def test_workers_go_on_until_they_are_ahead(tmp_path: Path) -> None:
    # Red when: prefetch_factor is fixed at 2 (5 files), or has no bound.
    stream = _stream(Touch(tmp_path), range(100), 2, ahead=8)
    assert next(stream) == 0
    end = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 1 + 2 * 8:
        assert time.monotonic() < end, list(tmp_path.iterdir())
        time.sleep(0.01)
    time.sleep(0.2)  # long for a worker: one that had no bound would go on
    assert len(list(tmp_path.iterdir())) == 1 + 2 * 8


@pytest.mark.parametrize(
    ("workers", "micro", "ahead"), [(2, 5, 8), (3, 5, 6), (2, 40, 2), (0, 5, 0)]
)
def test_the_next_step_is_read_as_a_whole(
    workers: int, micro: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: the loader reads two micro-batches ahead whatever the accumulation, or counts those of other ranks.
    seen: list[int] = []
    monkeypatch.setattr(
        loader, "_stream", lambda load, keys, count, ahead: iter(seen.append(ahead) or ())
    )
    for ranks in (1, 2):
        data = load_data(
            config(80 * ranks, micro, num_workers=workers), rank=ranks - 1, ranks=ranks
        )
        list(data.train_batches(0, 0))
    assert seen == [ahead, ahead]


def test_workers_run_one_thread_each() -> None:
    assert list(_stream(_threads, range(2), 2)) == [1, 1]


def _threads(key: int) -> int:
    return torch.get_num_threads()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_named_even_from_a_worker(
    photos: Path, tmp_path: Path, num_workers: int
) -> None:
    # Red when: _Caught lets the error through (its message then begins with the worker's traceback).
    root = tmp_path / "photos"
    for path in sorted(photos.rglob("*.jpg")):
        copy = root / path.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    bad = root / "train" / "dog" / "2.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    data = load_data(folder_config(root, num_workers=num_workers))
    with pytest.raises(ConadvError, match=rf"^Cannot read the image {bad}: [^\n]*$"):
        list(data.train_batches(0, 3))


def test_the_callers_random_stream_is_left_alone() -> None:
    # Red when: the DataLoader has no generator of its own.
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    data = load_data(config(100))
    list(data.train_batches(0, 2, VIEWS))
    list(data.eval_batches("test", 10, 5))
    assert torch.equal(torch.rand(4), expected)


def test_an_unknown_view_is_an_error_before_the_first_batch() -> None:
    data = load_data(config(100, aug_view=None))
    with pytest.raises(ConadvError, match=r"'aug'.*data.aug_view"):
        data.train_batches(0, 1, ("clean", "aug"))
    with pytest.raises(ConadvError, match="Did you mean 'second'"):
        data.train_batches(0, 1, ("seconds",))


# eval_batches


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_sees_every_image_once_without_augmentation(
    photos: Path, num_workers: int
) -> None:
    # Red when: the last, smaller batch is dropped.
    data = load_data(folder_config(photos, num_workers=num_workers))
    images, labels = zip(*data.eval_batches("train", None, 5), strict=True)
    assert [len(x) for x in images] == [5, 5, 2]
    assert torch.equal(torch.cat(images), data.source.train.readable(torch.arange(12))[0])
    assert torch.equal(torch.cat(labels), data.source.train.labels)
    assert sum(len(y) for _, y in data.eval_batches("test", None, 3)) == data.test_size == 4


def test_a_limit_takes_the_start_of_one_mixed_order_whatever_the_seed() -> None:
    # Red when: the first images are taken in file order (one class); the permutation uses the run's seed.
    data, other = load_data(config(100)), load_data(config(100, seed=5))
    (images, labels), *_ = data.eval_batches("test", 50, 50)
    (again, _), *_ = other.eval_batches("test", 50, 50)
    (fewer, _), *_ = data.eval_batches("test", 20, 50)
    assert torch.equal(images, again)
    assert torch.equal(images[:20], fewer)
    assert len(labels.unique()) > 5
    assert not torch.equal(images, data.source.test.readable(torch.arange(50))[0])
    assert sum(len(y) for _, y in data.eval_batches("test", 10_000, 500)) == 899


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(ConadvError, match="Did you mean 'test'"):
        load_data(config(100)).eval_batches("tests", None, 5)


# windows


@given(st.lists(st.integers()), st.integers(0, 6))
def test_windows_pair_each_item_with_the_one_ahead(items: list[int], ahead: int) -> None:
    # Red when: the future is waiting[-1] near the end, where there is none.
    future = [*items[ahead:], *[None] * ahead] if ahead else [None] * len(items)
    assert list(windows(items, ahead)) == list(zip(items, future[: len(items)], strict=True))


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_windows_hold_at_most_ahead_plus_one_items(ahead: int) -> None:
    # Red when: windows turns its input into a list first.
    class Item:
        pass

    alive: weakref.WeakSet[Item] = weakref.WeakSet()

    def items() -> Iterator[Item]:
        for _ in range(10):
            item = Item()
            alive.add(item)
            yield item
            del item

    most = 0
    for pair in windows(items(), ahead):
        del pair
        most = max(most, len(alive))
    assert most <= ahead + 1


def test_windows_work_on_any_loader() -> None:
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.arange(6)), batch_size=2)
    pairs = [(now[0].tolist(), then and then[0].tolist()) for now, then in windows(loader, 2)]
    assert pairs == [([0, 1], [4, 5]), ([2, 3], None), ([4, 5], None)]


def test_a_negative_ahead_is_an_error() -> None:
    with pytest.raises(ConadvError, match="ahead -1"):
        windows([1], -1)
