"""The data order: every image once per epoch, the same whoever asks, from wherever one starts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conadv.data.order import Order
from conadv.errors import ConadvError


@st.composite
def orders(draw: st.DrawFn) -> Order:
    num_images = draw(st.integers(1, 200))
    return Order(num_images, draw(st.integers(1, num_images)), draw(st.integers(0, 2**40)))


@given(orders(), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_shows_each_image_at_most_once(order: Order, epoch: int) -> None:
    # Red when: step is not taken modulo steps_per_epoch; the permutation is drawn with replacement.
    first = epoch * order.steps_per_epoch
    seen = torch.cat([order.indices(step) for step in range(first, first + order.steps_per_epoch)])
    assert (
        len(seen.unique())
        == len(seen)
        == order.num_images // order.global_batch_size * order.global_batch_size
    )
    assert 0 <= seen.min() <= seen.max() < order.num_images
    assert {order.epoch_of(step) for step in range(first, first + order.steps_per_epoch)} == {epoch}


def test_an_epoch_covers_everything_when_the_batch_divides_it() -> None:
    order = Order(12, 4, seed=0)
    seen = torch.cat([order.indices(step) for step in range(3)])
    assert sorted(seen.tolist()) == list(range(12))


def test_epochs_and_seeds_differ() -> None:
    # Red when: the permutation's key leaves out the epoch, or the seed.
    assert not torch.equal(Order(1000, 1000, 0).indices(0), Order(1000, 1000, 0).indices(1))
    assert not torch.equal(Order(1000, 1000, 0).indices(0), Order(1000, 1000, 1).indices(0))


def test_asking_in_any_order_gives_the_same_and_the_answer_is_the_callers_own() -> None:
    # Red when: micro_batch returns a view of the cached permutation.
    order = Order(40, 10, seed=3)
    forwards = [order.indices(step) for step in range(12)]
    backwards = [order.indices(step) for step in reversed(range(12))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    before = order.indices(0).clone()
    order.indices(0).zero_()
    assert torch.equal(order.indices(0), before)


def test_the_callers_random_stream_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Order(50, 7, seed=11).indices(0)
    assert torch.equal(torch.rand(3), expected)


def test_a_batch_larger_than_the_data_set_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ConadvError, match=r"512.*100 images"):
        Order(100, 512, seed=0)
    with pytest.raises(ConadvError, match="at least 1"):
        Order(100, 0, seed=0)
