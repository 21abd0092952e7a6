"""Batches: the same for any number of workers, ranks and starting points."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from conadv import ConadvError
from conadv.data import loader
from conadv.data.loader import Data
from conadv.data.order import Order
from conadv.data.source import build_source
from conadv.training.data import load_data
from conadv.types import Batch

from .data_cases import config, image_folder

VIEWS = ("clean", "second", "aug")
DIGITS = build_source("digits")


def data(batch: int, micro: int | None = None, **changes: Any) -> Data:
    wanted = {"augment": "basic", "aug_view": "randaugment", **changes}
    source = wanted.pop("source", DIGITS)
    return Data(source, global_batch_size=batch, micro_batch_size=micro or batch, **wanted)


def flat(batches: Iterator[Batch] | list[Batch]) -> list[Any]:
    """All that batches hold, to compare."""
    return [
        (batch.step, batch.epoch, micro.index, micro.y_N.tolist(), images_of(micro.views))
        for batch in batches
        for micro in batch.micro
    ]


def images_of(views: Any) -> dict[str, bytes]:
    return {view: images.numpy().tobytes() for view, images in views.items()}


# ---- the order


@st.composite
def orders(draw: st.DrawFn) -> Order:
    num_images = draw(st.integers(1, 200))
    return Order(num_images, draw(st.integers(1, num_images)), draw(st.integers(0, 2**40)))


@given(orders(), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_shows_each_image_at_most_once(order: Order, epoch: int) -> None:
    # Red when: step is not taken modulo steps_per_epoch; the permutation is drawn with replacement.
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    seen = torch.cat([order.indices(step) for step in steps])
    whole = order.num_images // order.global_batch_size * order.global_batch_size
    assert len(seen.unique()) == len(seen) == whole
    assert 0 <= seen.min() <= seen.max() < order.num_images
    assert {order.epoch_of(step) for step in steps} == {epoch}


def test_any_step_can_be_asked_for_and_the_answer_is_the_callers_own() -> None:
    # Red when: micro_batch returns a view of the cached permutation, or the permutation's key
    # leaves out the epoch or the seed.
    order = Order(40, 10, seed=3)
    forwards = [order.indices(step) for step in range(12)]
    backwards = [order.indices(step) for step in reversed(range(12))][::-1]
    assert torch.equal(torch.cat(forwards), torch.cat(backwards))
    order.indices(0).zero_()
    assert torch.equal(order.indices(0), forwards[0])
    epochs = [tuple(Order(100, 100, n % 2).indices(n // 2).tolist()) for n in range(4)]
    assert len(set(epochs)) == 4


@pytest.mark.parametrize(
    ("batch", "micro", "changes", "message"),
    [
        (1000, 1000, {}, r"1000 .*898 images"),
        (0, 1, {}, "global_batch_size 0"),
        (100, 30, {}, "100 is not micro_batch_size 30"),
        (100, 50, {"ranks": 3}, r"3 rank"),
    ],
)
def test_batches_that_do_not_fit_are_errors(
    batch: int, micro: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConadvError, match=message):
        data(batch, micro, **changes)


# ---- training batches


def test_batches_hold_the_images_of_the_order_with_their_labels() -> None:
    # Red when: labels are taken from other indices than images; a view is not a draw of its own
    # augmentation.
    found = data(64, 16, augment="none")
    for batch in found.train_batches(0, 30, ("clean", "second")):
        assert batch.epoch == found.order.epoch_of(batch.step)
        assert [micro.index for micro in batch.micro] == [0, 1, 2, 3]
        images, indices = DIGITS.train.readable(found.order.indices(batch.step))
        for view in ("clean", "second"):
            assert torch.equal(torch.cat([micro.views[view] for micro in batch.micro]), images)
        y_N = torch.cat([micro.y_N for micro in batch.micro])
        assert torch.equal(y_N, DIGITS.train.labels[indices])


def test_views_epochs_and_seeds_are_independent() -> None:
    # Red when: the view's name, the epoch or the seed is left out of the key (a full-batch step
    # then repeats its augmentation), or a view depends on which others are drawn.
    found = data(898, aug_view="basic")
    (alone,), (batch,) = found.train_batches(0, 1, ("clean",)), found.train_batches(0, 1, VIEWS)
    views = batch.micro[0].views
    assert torch.equal(alone.micro[0].views["clean"], views["clean"])
    for a, b in [("clean", "second"), ("clean", "aug"), ("second", "aug")]:
        assert (views[a] != views[b]).flatten(1).any(1).float().mean() > 0.7
    others = [next(found.train_batches(1, 2)), next(data(898, seed=1).train_batches(0, 1))]
    totals = [int(b.micro[0].views["clean"].long().sum()) for b in (alone, *others)]
    assert len(set(totals)) == 3


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixup and cutmix": {"mixup": 0.2, "cutmix": 1.0},
    "a policy": {"augment": "autoaugment"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_is_the_same_from_any_start_and_with_any_number_of_ranks(name: str) -> None:
    # Red when: a step's keys count from start_step; MicroBatch.index is m instead of rank *
    # accumulation + m; draws of a mix come from a stream, or depend on the views or the rank.
    small = {"source": build_source("digits", train_images=60), **SETTINGS[name]}
    one = data(24, 3, **small)
    whole = flat(one.train_batches(0, 5, VIEWS))  # two epochs and a half
    assert flat(one.train_batches(3, 5, VIEWS)) == whole[3 * 8 :]
    for ranks in (2, 4):
        many = [data(24, 3, rank=rank, ranks=ranks, **small) for rank in range(ranks)]
        shares = zip(*(each.train_batches(0, 5, VIEWS) for each in many), strict=True)
        assert flat(list(chain(*shares))) == whole
    other = data(24, 3, **small, seed=1)
    assert flat(other.train_batches(0, 1, VIEWS)) != whole[:8]


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    # Red when: an augmentation draws from the worker's own generator.
    photos = build_source("folder", dir=image_folder(tmp_path), image_size=8)
    for source in (DIGITS, photos):
        mixed = {"source": source, "augment": "autoaugment", "mixup": 0.2, "cutmix": 1.0}
        ours, theirs = (data(12, 6, num_workers=count, **mixed) for count in (0, 2))
        assert flat(ours.train_batches(1, 4, VIEWS)) == flat(theirs.train_batches(1, 4, VIEWS))


@pytest.mark.parametrize(
    ("workers", "micro", "ahead"), [(2, 5, 8), (3, 5, 6), (2, 40, 2), (0, 5, 0)]
)
def test_the_next_step_is_read_as_a_whole(
    workers: int, micro: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: the loader reads two micro-batches ahead for any accumulation, or counts those of
    # other ranks.
    asked: list[Any] = []

    def dataloader(*args: Any, prefetch_factor: int | None, **options: Any) -> Any:
        asked.append(prefetch_factor)
        return DataLoader(*args, **{**options, "num_workers": 0, "worker_init_fn": None})

    monkeypatch.setattr(loader, "DataLoader", dataloader)
    for ranks in (1, 2):
        found = data(80 * ranks, micro, num_workers=workers, ranks=ranks)
        next(found.train_batches(0, 1))
    assert asked == [ahead or None] * 2


def test_the_callers_random_stream_is_left_alone() -> None:
    # Red when: the DataLoader has no generator of its own.
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    found = data(100, mixup=0.2)
    list(found.train_batches(0, 2, VIEWS))
    list(found.eval_batches("test", 10, 5))
    assert torch.equal(torch.rand(4), expected)


def test_names_that_do_not_exist_are_errors() -> None:
    with pytest.raises(ConadvError, match=r"view 'aug'.*Give data.aug_view"):
        data(10, aug_view=None).train_batches(0, 1, ("aug",))
    with pytest.raises(ConadvError, match="Did you mean 'test'"):
        next(data(10).eval_batches("tset", None, 10))


# ---- evaluation batches


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_sees_every_image_once_in_one_order(ranks: int) -> None:
    # Red when: a rank reads another's batch; the limit depends on the seed, or takes the first
    # images.
    parts = [
        list(data(36, 12, ranks=ranks, rank=r).eval_batches("test", None, 100))
        for r in range(ranks)
    ]
    labels = [parts[n % ranks][n // ranks][1] for n in range(9)]
    assert torch.equal(torch.cat(labels), DIGITS.test.labels)
    first, other = (list(data(96, seed=s).eval_batches("train", 50, 30)) for s in (0, 1))
    assert [len(y) for _, y in first] == [30, 20]
    assert torch.equal(torch.cat([y for _, y in first]), torch.cat([y for _, y in other]))
    assert not torch.equal(
        torch.cat([x for x, _ in first]), DIGITS.train.readable(torch.arange(50))[0]
    )


def test_a_config_becomes_its_data() -> None:
    # Red when: a setting is not handed on.
    found = load_data(config(96, 12, seed=4, augment="basic", aug_view="autoaugment", mixup=0.3))
    want = data(96, 12, seed=4, aug_view="autoaugment", mixup=0.3)
    assert flat(found.train_batches(3, 5, VIEWS)) == flat(want.train_batches(3, 5, VIEWS))
    assert load_data(config(10, num_workers=3, on_bad_image="error")).num_workers == 3
