"""Who is missing: what the ranks find out about each other once a collective has failed.

torch.distributed says that a collective failed, not because of whom; and a rank that waits for
another one often does not know it yet. So every rank keeps one thread asleep at the store through
which the ranks have met. The first rank whose collective fails calls the roll there, and the
threads of all live ranks answer with the phase and step that they are in, even where their main
thread is blocked. Ranks that do not answer in time are named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any, NamedTuple

import torch.distributed as dist

ANSWER_SECONDS = 3.0  # how long a rank has to answer
LIMIT_SECONDS = 5.0  # what all of it may cost when the store does not answer either
NOBODY_KNOWS = (
    "Another rank has ended, or does not answer; so has the store at MASTER_ADDR, through which "
    "ranks find out who: its host cannot be reached, or the process that keeps it has ended."
)
_POLL_SECONDS = 0.1
_FOREVER = timedelta(days=365)
_SHOWN = 8  # ranks that one message lists


class Answer(NamedTuple):
    """Where a rank says that it is; ``left``: it has closed its Comm and waits for nobody."""

    phase: str
    step: int
    left: bool


class RollCall:
    """This rank's part in finding out who is missing.

    store: a torch.distributed store that the ranks of this start share and no earlier start has
    used (see conadv.distributed.rendezvous). place: the phase and step that this rank answers with.
    In flight: one thread and one connection to the store; nothing travels until a collective fails.
    """

    def __init__(
        self, store: Any, rank: int, ranks: int, place: Callable[[], tuple[str, int]]
    ) -> None:
        self._rank, self._ranks, self._place = rank, ranks, place
        self._store: Any = dist.PrefixStore("conadv/roll-call", store)  # type: ignore[attr-defined]
        self._listening = self._store.clone()  # its thread blocks a connection
        self._done = Event()
        self._result = ""
        self._thread = _in_thread(self._listen)

    def findings(self) -> str:
        """Who is missing, in a sentence or two. Takes at most 5 s; the same answer each time."""
        if not self._done.is_set():
            _in_thread(self._call)
            self._done.wait(LIMIT_SECONDS)
        return self._result or NOBODY_KNOWS

    def close(self) -> None:
        """Say that this rank has left, and end the thread. At most a second."""
        _in_thread(self._leave)
        self._thread.join(1.0)

    # ---- in threads: a store may block for as long as its host is silent

    def _listen(self) -> None:
        mine = f"call/{self._rank}"
        with suppress(RuntimeError):  # the store has gone: findings() says so
            self._listening.wait([mine], _FOREVER)
            if self._listening.get(mine) == b"roll":
                self._answer(self._listening, left=False)
                self._result = describe(self._gather(), self._ranks)
                # the store may live in this process, and the others still have to read it
                sleep(2 * _POLL_SECONDS)
        self._done.set()

    def _call(self) -> None:
        try:
            is_first = self._store.add("calls", 1) == 1
            for rank in range(self._ranks) if is_first else [self._rank]:
                self._store.set(f"call/{rank}", "roll")
        except RuntimeError:
            self._done.set()

    def _leave(self) -> None:
        with suppress(RuntimeError):  # nobody can be told
            self._answer(self._store, left=True)
            self._store.set(f"call/{self._rank}", "left")

    def _answer(self, store: Any, left: bool) -> None:
        store.append("answers", json.dumps([self._rank, *self._place(), left]) + "\n")

    def _gather(self) -> dict[int, Answer]:
        """The answers that are there when all ranks have answered, or when time is up."""
        end = monotonic() + ANSWER_SECONDS
        while True:
            answers: dict[int, Answer] = {}
            for line in self._listening.get("answers").decode().splitlines():
                rank, *place = json.loads(line)
                answers.setdefault(rank, Answer(*place))  # a rank may leave after it has answered
            if len(answers) == self._ranks or monotonic() > end:
                return answers
            sleep(_POLL_SECONDS)


def _in_thread(function: Callable[[], None]) -> Thread:
    thread = Thread(target=function, name="conadv-roll-call", daemon=True)
    thread.start()
    return thread


def describe(answers: Mapping[int, Answer], ranks: int) -> str:
    """What ``answers`` (by rank) say about ``ranks`` ranks.

    A rank that has not noticed anything answers too, so silence is no proof, but it is the best
    evidence there is.
    """
    silent = [rank for rank in range(ranks) if rank not in answers]
    left = [rank for rank in answers if answers[rank].left]
    present = _places(answers, [rank for rank in answers if not answers[rank].left])
    if not silent and not left:
        return f"All ranks are still there: {present}. One is held up, or a link has failed."
    said = []
    if silent:
        said.append(
            f"No word within {ANSWER_SECONDS:g} s from {_names(silent)}: ended, hanging, or out of "
            "reach from here."
        )
    if left:
        said.append(f"Left before: {_places(answers, left)}; the reason is in the output there.")
    return " ".join([*said, f"Still there: {present}."])


def _places(answers: Mapping[int, Answer], ranks: Iterable[int]) -> str:
    """Ranks by where they are, those that are furthest behind first."""
    by_place: dict[tuple[int, str], list[int]] = {}
    for rank in sorted(ranks):
        by_place.setdefault((answers[rank].step, answers[rank].phase), []).append(rank)
    return "; ".join(
        f"{_names(group)} in phase {phase!r} of step {step}"
        for (step, phase), group in sorted(by_place.items())
    )


def _names(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN]))
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
