"""A collective that fails names who is missing, and finds out in bounded time."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from conadv.distributed.diagnosis import ANSWER_SECONDS, NOBODY_KNOWS, Answer, describe

from . import jobs
from .pool import Ranks

WAITING = Answer("wait", 7, False)
# what befalls which of three ranks
FATES = {"killed": 1, "stopped": 1, "held up": 1, "leaves": 2, "the store stopped": 0}


@pytest.fixture(scope="module")
def messages() -> dict[str, list[str]]:
    """What the other ranks raise; all pools at once, since they mostly wait."""
    found = {}
    with ExitStack() as stack:
        # seconds: enough for a busy machine to get to step 2
        pools = {fate: stack.enter_context(Ranks(3, timeout=8.0)) for fate in FATES}
        for fate, pool in pools.items():
            pool.start(jobs.gone, FATES[fate], fate.removeprefix("the store "))
        for fate, pool in pools.items():
            answers = [pool.answer(rank) for rank in range(3) if rank != FATES[fate]]
            assert [(kind, what[0]) for kind, what in answers] == [("error", "ConadvError")] * 2
            found[fate] = [what[1] for _, what in answers]
    return found


@pytest.mark.parametrize("fate", ["killed", "stopped"])
def test_a_rank_that_says_nothing_is_named(fate: str, messages: dict[str, list[str]]) -> None:
    # Red when: a rank that has not answered counts as one that has.
    for message in messages[fate]:
        assert "from rank 1: ended, hanging, or out of reach" in message
        assert "Still there: ranks 0, 2 in phase" in message
        assert "of step 2." in message
        assert "start all ranks again with --resume" in message


def test_a_rank_that_is_held_up_or_has_left_says_where(messages: dict[str, list[str]]) -> None:
    # Red when: at() is not passed on; only ranks whose own collective has failed are called;
    # close() says nothing.
    for message in messages["held up"]:
        assert "All ranks are still there: " in message
        assert "rank 1 in phase 'data' of step 2" in message
    for message in messages["leaves"]:
        assert "Left before: rank 2 in phase 'data' of step 2" in message
        assert "No word" not in message


def test_where_the_store_is_gone_nobody_is_accused(messages: dict[str, list[str]]) -> None:
    # Red when: findings() waits for the store without a limit; it accuses a rank without an answer
    # from the store. Rank 0 keeps the store here, as without torchrun.
    for message in messages["the store stopped"]:
        assert NOBODY_KNOWS in message
        assert "No word" not in message


def test_words() -> None:
    # Red when: the furthest behind does not come first; long lists are not cut.
    late = Answer("data", 6, False)
    assert describe({0: WAITING, 1: late, 2: WAITING}, 3) == (
        "All ranks are still there: rank 1 in phase 'data' of step 6; ranks 0, 2 in phase 'wait' "
        "of step 7. One is held up, or a link has failed."
    )
    gone = Answer("gradient", 7, True)
    assert describe({0: WAITING, 2: gone}, 4) == (
        f"No word within {ANSWER_SECONDS:g} s from ranks 1, 3: ended, hanging, or out of reach "
        "from here. Left before: rank 2 in phase 'gradient' of step 7; the reason is in the output "
        "there. Still there: rank 0 in phase 'wait' of step 7."
    )
    assert "from ranks 1, 2, 3, 4, 5, 6, 7, 8 and 91 more: ended" in describe({0: WAITING}, 100)
