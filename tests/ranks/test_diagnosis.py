"""A collective that fails names who is missing, and finds out in bounded time."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from conadv.distributed.diagnosis import (
    ANSWER_SECONDS,
    LIMIT_SECONDS,
    NOBODY_KNOWS,
    Answer,
    describe,
)

from . import jobs
from .pool import Ranks

TIMEOUT = 2.0
WAITING = Answer("wait", 7, False)


@pytest.fixture
def three() -> Iterator[Ranks]:
    pool = Ranks(3, timeout=TIMEOUT)
    yield pool
    pool.close()


def messages(pool: Ranks, culprit: int, how: str) -> list[str]:
    """What the other ranks raise; they have to do so within the timeout and the time of the diagnosis."""
    for pipe in pool.pipes:
        pipe.send((jobs.gone, (culprit, how)))
    begin = time.monotonic()
    found = [pool.answer(rank, 20.0) for rank in range(3) if rank != culprit]
    assert time.monotonic() - begin < TIMEOUT + LIMIT_SECONDS + 3
    assert [(kind, what[0]) for kind, what in found] == [("error", "ConadvError")] * len(found)
    return [what[1] for _, what in found]


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_rank_that_says_nothing_is_named(three: Ranks, how: str) -> None:
    # Red when: a rank that has not answered counts as one that has.
    for message in messages(three, 1, how):
        assert "from rank 1: ended, hanging, or out of reach" in message
        assert "Still there: ranks 0, 2 in phase" in message
        assert "of step 2." in message
        assert "start all ranks again with --resume" in message


def test_a_rank_that_is_held_up_says_where(three: Ranks) -> None:
    # Red when: at() is not passed on; only ranks whose own collective has failed are called.
    for message in messages(three, 1, "held up"):
        assert "All ranks are still there: " in message
        assert "rank 1 in phase 'data' of step 2" in message


def test_a_rank_that_has_left_is_not_called_silent(three: Ranks) -> None:
    # Red when: close() says nothing.
    for message in messages(three, 2, "leaves"):
        assert "Left before: rank 2 in phase 'data' of step 2" in message
        assert "No word" not in message


def test_where_the_store_is_gone_nobody_is_accused(three: Ranks) -> None:
    # Red when: findings() waits for the store without a limit; it accuses a rank without an answer from the store.
    # Rank 0 keeps the store here, as without torchrun.
    for message in messages(three, 0, "stopped"):
        assert NOBODY_KNOWS in message
        assert "No word" not in message


def test_words() -> None:
    # Red when: the furthest behind does not come first; long lists are not cut.
    late = Answer("data", 6, False)
    assert describe({0: WAITING, 1: late, 2: WAITING}, 3) == (
        "All ranks are still there: rank 1 in phase 'data' of step 6; ranks 0, 2 in phase 'wait' of step 7. "
        "One is held up, or a link has failed."
    )
    gone = Answer("gradient", 7, True)
    assert describe({0: WAITING, 2: gone}, 4) == (
        f"No word within {ANSWER_SECONDS:g} s from ranks 1, 3: ended, hanging, or out of reach from here. "
        "Left before: rank 2 in phase 'gradient' of step 7; the reason is in the output there. "
        "Still there: rank 0 in phase 'wait' of step 7."
    )
    assert "from ranks 1, 2, 3, 4, 5, 6, 7, 8 and 91 more: ended" in describe({0: WAITING}, 100)
