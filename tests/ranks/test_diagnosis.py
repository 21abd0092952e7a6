"""A collective that fails names who is missing, and finds out in bounded time."""

from __future__ import annotations

import pytest

from conadv.distributed.diagnosis import ANSWER_SECONDS, NOBODY_KNOWS, Answer, describe

from . import jobs
from .pool import Ranks

WAITING = Answer("wait", 7, False)


def messages(culprit: int, how: str) -> list[str]:
    """What the other ranks raise."""
    with Ranks(3, timeout=6.0) as pool:  # seconds: enough for a busy machine to get to step 2
        pool.start(jobs.gone, culprit, how)
        found = [pool.answer(rank) for rank in range(3) if rank != culprit]
    assert [(kind, what[0]) for kind, what in found] == [("error", "ConadvError")] * len(found)
    return [what[1] for _, what in found]


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_rank_that_says_nothing_is_named(how: str) -> None:
    # Red when: a rank that has not answered counts as one that has.
    for message in messages(1, how):
        assert "from rank 1: ended, hanging, or out of reach" in message
        assert "Still there: ranks 0, 2 in phase" in message
        assert "of step 2." in message
        assert "start all ranks again with --resume" in message


def test_a_rank_that_is_held_up_says_where() -> None:
    # Red when: at() is not passed on; only ranks whose own collective has failed are called.
    for message in messages(1, "held up"):
        assert "All ranks are still there: " in message
        assert "rank 1 in phase 'data' of step 2" in message


def test_a_rank_that_has_left_is_not_called_silent() -> None:
    # Red when: close() says nothing.
    for message in messages(2, "leaves"):
        assert "Left before: rank 2 in phase 'data' of step 2" in message
        assert "No word" not in message


def test_where_the_store_is_gone_nobody_is_accused() -> None:
    # Red when: findings() waits for the store without a limit; it accuses a rank without an answer from the store.
    # Rank 0 keeps the store here, as without torchrun.
    for message in messages(0, "stopped"):
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
