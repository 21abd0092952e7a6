"""Ranks that the tests of a file share, and one thread in this process, as the ranks have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .pool import Ranks


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """With another number of threads this process would sum in another order than the ranks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    with Ranks(3) as pool:
        yield pool
