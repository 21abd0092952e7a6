"""Windows over batches, and whose memory a batch is: what waits is not the loader's any more."""

from __future__ import annotations

import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from torchvision import tv_tensors

from conadv import FGSM, ConadvError, Concurrent, TrainStep, WindowedLoader, windows
from conadv.data import windows as windows_module
from conadv.types import Batch, MicroBatch

Pair = namedtuple("Pair", "x y")


@given(st.integers(0, 12), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_windows_pair_each_item_with_a_later_one(count: int, ahead: int) -> None:
    # Red when: the pairs are one off, or ahead 0 gives the item itself.
    later = [n + ahead if ahead and n + ahead < count else None for n in range(count)]
    assert list(windows(range(count), ahead)) == list(zip(range(count), later, strict=True))


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_windows_hold_no_more_than_they_need(ahead: int) -> None:
    # Red when: the items are read into a list first.
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
    for pair in windows(items(), ahead, copy=False):
        del pair
        most = max(most, len(alive))
    assert most <= ahead + 1


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_epochs_join_as_one_stream(ahead: int) -> None:
    # Red when: windows are made anew for each epoch (None at each epoch's end).
    loader = WindowedLoader([1, 2, 3], ahead, epochs=3)
    epochs = [list(loader) for _ in range(3)]
    assert [len(pairs) for pairs in epochs] == [3, 3, 3] == [len(loader)] * 3
    assert list(chain(*epochs)) == list(windows([1, 2, 3] * 3, ahead))
    assert list(loader) == []
    endless = WindowedLoader([1, 2], 1)
    assert [list(endless) for _ in range(2)] == [[(1, 2), (2, 1)]] * 2


def test_a_loop_that_broke_off_goes_on() -> None:
    # Red when: leaving an epoch early forgets what waits, so that it belongs to another batch.
    loader = WindowedLoader([1, 2, 3], 1, epochs=2)
    first = next(iter(loader))
    assert [first, *loader, *loader] == list(windows([1, 2, 3] * 2, 1))


def test_an_epoch_that_begins_early_has_its_own_order() -> None:
    # Red when: set_epoch is left to the framework, which calls it after the next epoch has begun.
    dataset = TensorDataset(torch.arange(8))
    sampler: Any = DistributedSampler(dataset, 1, 0, seed=3)
    loader = WindowedLoader(DataLoader(dataset, 2, sampler=sampler), 1, epochs=2)
    found = [[n for now, _ in loader for n in now[0].tolist()] for _ in range(2)]
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert found[epoch] == list(sampler)
    assert found[0] != found[1]


def test_errors_of_windows() -> None:
    with pytest.raises(ConadvError, match="0 or more"):
        list(WindowedLoader([1], -1))
    with pytest.raises(ConadvError, match="no batch"):
        list(WindowedLoader([], 1))
    with pytest.raises(ConadvError, match=r"cannot copy a object.*copy=False"):
        list(windows([(torch.zeros(1), object())], 1))


# ---- loaders that fill the same memory again

MEMORY = torch.zeros(4)
ITEMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "pair": lambda x: (x, x[:2]),
    "list": lambda x: [x, 3, "name", None],
    "named": lambda x: Pair(x, x[1:]),
    "dictionary": lambda x: {"image": x, "meta": {"y": [x[:1]], "path": "a"}},
    "ordered": lambda x: OrderedDict(image=x),
    "read-only mapping": lambda x: MappingProxyType({"image": x}),
    "array": lambda x: (x.numpy(), 1.5),
    "image": lambda x: tv_tensors.Image(x.view(1, 2, 2)),
    "batch": lambda x: Batch(0, (MicroBatch(0, x, MappingProxyType({"clean": x})),)),
}


def numbers(item: Any) -> list[float]:
    """All numbers in tensors and arrays of an item."""
    if isinstance(item, (Tensor, np.ndarray)):
        return [float(value) for value in item.ravel()]
    if isinstance(item, Batch):
        return [n for m in item.micro for n in (*numbers(m.y_N), *numbers(m.views["clean"]))]
    parts = item.values() if hasattr(item, "values") else item
    if isinstance(item, (str, int, float)) or item is None:
        return []
    return [number for part in parts for number in numbers(part)]


def filled_again(make: Callable[[Tensor], Any], count: int) -> Iterator[Any]:
    item = make(MEMORY)  # one object for all batches, as some loaders have
    for number in range(count):
        MEMORY.fill_(number)
        yield item


class Refilled(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return filled_again(ITEMS["pair"], 6)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("name", ITEMS)
def test_an_item_that_waits_keeps_its_numbers(name: str, ahead: int) -> None:
    # Red when: items are kept as they come, or one kind of container is copied without its content.
    for loader in (windows, partial(WindowedLoader, epochs=1)):
        for step, pair in enumerate(loader(filled_again(ITEMS[name], 6), ahead)):
            wanted = [step, step + ahead if ahead else None]
            for item, number in zip(pair, wanted, strict=True):
                if item is None:
                    assert number is None or number >= 6
                    continue
                assert set(numbers(item)) == {number}
                assert type(item) is type(ITEMS[name](MEMORY)) or name == "read-only mapping"


@pytest.mark.parametrize(("workers", "copies"), [(0, 6), (1, 0)])
def test_batches_of_worker_processes_are_not_copied(
    workers: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: a DataLoader is trusted without worker processes, where the data set's own memory
    # passes through it.
    copied: list[Any] = []
    owned = windows_module._owned
    monkeypatch.setattr(windows_module, "_owned", lambda x: copied.append(0) or owned(x))
    loader = DataLoader(Refilled(), batch_size=None if not workers else 1, num_workers=workers)
    pairs = list(windows(loader, 1))
    assert [numbers(x)[0] for (x, _), _ in pairs] == [0, 1, 2, 3, 4, 5]
    assert len(copied) >= copies
    assert bool(copied) == bool(copies)


# ---- the same in a training step


def data(count: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [
        (torch.rand(8, 3, 4, 4, generator=g), torch.randint(0, 10, (8,), generator=g))
        for _ in range(count)
    ]


def ring(places: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in so many places of memory; a place is filled again when the next one is taken."""
    bank = [(torch.empty(8, 3, 4, 4), torch.empty(8, dtype=torch.long)) for _ in range(places)]
    for number, batch in enumerate(data(6)):
        for place, content in zip(bank[number % places], batch, strict=True):
            place.copy_(content)
        yield bank[number % places]


def engine(staleness: int, attack: Any = None) -> TrainStep:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method = Concurrent(attack or FGSM(8 / 255), staleness=staleness)
    return TrainStep(net, optimizer, method)


@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("places", [1, 2, 3])
def test_a_ring_of_buffers_trains_on_the_right_images(staleness: int, places: int) -> None:
    # Red when: windows keep what the loader gives.
    found, wanted = (
        [step(*pair).losses for pair in windows(loader, staleness)]
        for step, loader in ((engine(staleness), ring(places)), (engine(staleness), data(6)))
    )
    assert found == wanted


@pytest.mark.filterwarnings("ignore:A batch was not attacked")
def test_labels_that_changed_while_they_waited_are_an_error() -> None:
    # Red when: the labels that wait are the loader's, so that they equal those of any batch there.
    step, batches = engine(1), data(3)
    x, y = batches[1][0].clone(), batches[1][1].clone()
    step(batches[0], (x, y))
    y.copy_(batches[2][1])
    with pytest.raises(ConadvError, match="were made of another batch"):
        step((x, y), None)


def test_an_attack_that_returns_its_input_waits_in_memory_of_its_own() -> None:
    # Red when: what waits is a view of the batch that it was made of.
    def none(forward: Any, x_NCHW: Tensor, y_N: Tensor, generator: Any) -> Tensor:
        return x_NCHW

    step, batches = engine(1, none), data(2)
    x, y = (part.clone() for part in batches[1])
    step(batches[0], (x, y))
    x.zero_()
    record = step(batches[1], None)
    assert record.losses["adv"] == record.losses["clean"]
