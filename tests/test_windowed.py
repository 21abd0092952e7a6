"""WindowedLoader: epochs that join without a gap, for frameworks that own the loop over them."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from conadv import ConadvError, WindowedLoader, windows


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_epochs_join_as_one_stream(ahead: int) -> None:
    # Red when: windows are made anew for each epoch (None at each epoch's end).
    loader = WindowedLoader([1, 2, 3], ahead, epochs=3)
    epochs = [list(loader) for _ in range(3)]
    assert [len(pairs) for pairs in epochs] == [3, 3, 3] == [len(loader)] * 3
    assert list(chain(*epochs)) == list(windows([1, 2, 3] * 3, ahead))
    assert list(loader) == []


def test_without_a_number_of_epochs_there_is_always_a_future() -> None:
    loader = WindowedLoader([1, 2], 1)
    assert [list(loader) for _ in range(2)] == [[(1, 2), (2, 1)]] * 2


def test_a_loop_that_broke_off_goes_on() -> None:
    # Red when: leaving an epoch early forgets what waits, so that the images that wait are another batch's.
    loader = WindowedLoader([1, 2, 3], 1, epochs=2)
    first = next(iter(loader))
    assert [first, *loader, *loader] == list(windows([1, 2, 3] * 2, 1))


def test_an_epoch_that_begins_early_has_its_own_order() -> None:
    # Red when: set_epoch is left to the framework, which calls it after the next epoch has begun.
    data = TensorDataset(torch.arange(8))

    def batches(loader: Any) -> list[list[int]]:
        return [now[0].tolist() for now, _ in loader]

    sampler = DistributedSampler(data, 1, 0, seed=3)
    loader = WindowedLoader(DataLoader(data, 2, sampler=sampler), 1, epochs=2)
    found = [batches(loader) for _ in range(2)]
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert list(chain(*found[epoch])) == list(sampler)
    assert found[0] != found[1]


def test_errors() -> None:
    with pytest.raises(ConadvError, match="0 or more"):
        WindowedLoader([1], -1)
    with pytest.raises(ConadvError, match="no batch"):
        list(WindowedLoader([], 1))
    with pytest.raises(TypeError):
        len(WindowedLoader(iter([1]), 1))
