"""Who is missing: what the ranks find out about each other once a collective has failed.

torch.distributed says that a collective failed, not because of whom; and a rank that waits for another one often does
not know it yet. So every rank keeps one thread asleep at the store through which the ranks have met. The first rank
whose collective fails calls the roll there; the threads of all that still live answer with the phase and step they are
in, even where their main thread is blocked. Whoever does not answer in time is named.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import timedelta
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any, NamedTuple

import torch.distributed as dist

ANSWER_SECONDS = 3.0  # how long a rank has to answer
LIMIT_SECONDS = 5.0  # what all of it may cost when the store does not answer either
NOBODY_KNOWS = (
    "Another rank has ended, or does not answer; so has the store at MASTER_ADDR, through which ranks find out who: "
    "its host cannot be reached, or the process that keeps it has ended."
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

    ``store``: a torch.distributed store that the ranks of this start share and no earlier start has used (see
    conadv.distributed.rendezvous). ``last`` is the phase and step that this rank answers with. One thread and one connection to
    the store; nothing travels until a collective fails.
    """

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        self.last = ("setup", 0)
        self._rank = rank
        self._ranks = ranks
        self._store: Any = dist.PrefixStore("conadv/roll-call", store)  # type: ignore[attr-defined]
        self._line = self._store.clone()  # the thread blocks its connection
        self._done = Event()
        self._result = ""
        self._thread = Thread(target=self._listen, name="conadv-roll-call", daemon=True)
        self._thread.start()

    def findings(self) -> str:
        """A sentence or two on who is missing. Calls the roll if nobody has; at most 5 s, the same answer each time."""
        if not self._done.is_set():
            Thread(target=self._call, daemon=True).start()  # may block on a silent link
            self._done.wait(LIMIT_SECONDS)
        return self._result or NOBODY_KNOWS

    def close(self) -> None:
        """Say that this rank has left, and end the thread; at most a second where the store is silent."""
        Thread(target=self._leave, daemon=True).start()
        self._thread.join(1.0)

    # ---- in threads: a store may block for as long as its host is silent

    def _listen(self) -> None:
        mine = _call_key(self._rank)
        try:
            self._line.wait([mine], _FOREVER)
            if self._line.get(mine) == b"roll":
                self._answer(self._line, left=False)
                self._result = describe(self._gather(), self._ranks)
                sleep(
                    2 * _POLL_SECONDS
                )  # the store may live in this process, and the others have to read it too
        except RuntimeError:
            pass  # the store has gone: findings() says so
        finally:
            self._done.set()

    def _call(self) -> None:
        try:
            first = self._store.add("calls", 1) == 1
            called = range(self._ranks) if first else [self._rank]
            self._store.multi_set([_call_key(rank) for rank in called], ["roll"] * len(called))
        except RuntimeError:
            self._done.set()

    def _leave(self) -> None:
        try:
            self._answer(self._store, left=True)
            self._store.set(_call_key(self._rank), "left")
        except RuntimeError:
            pass  # nobody can be told

    def _answer(self, store: Any, left: bool) -> None:
        store.append("answers", json.dumps([self._rank, *self.last, left]) + "\n")

    def _gather(self) -> dict[int, Answer]:
        """The answers that are there when all have come, or when time is up."""
        end = monotonic() + ANSWER_SECONDS
        while True:
            lines = map(json.loads, self._line.get("answers").decode().splitlines())
            answers: dict[int, Answer] = {}
            for rank, *place in lines:
                answers.setdefault(rank, Answer(*place))  # who has answered may leave
            if len(answers) == self._ranks or monotonic() > end:
                return answers
            sleep(_POLL_SECONDS)


def describe(answers: Mapping[int, Answer], ranks: int) -> str:
    """What ``answers`` (by rank) say about ``ranks`` ranks.

    A rank that has not noticed anything answers too, so silence is no proof, but the best evidence that there is.
    """
    silent = [rank for rank in range(ranks) if rank not in answers]
    left = [rank for rank, answer in sorted(answers.items()) if answer.left]
    said = []
    if silent:
        said.append(
            f"No word within {ANSWER_SECONDS:g} s from {_names(silent)}: ended, hanging, or out of reach from here."
        )
    if left:
        said.append(f"Left before: {_places(answers, left)}; the reason is in the output there.")
    present = [rank for rank in answers if not answers[rank].left]
    if silent or left:
        said.append(f"Still there: {_places(answers, present)}.")
    else:
        said.append(
            f"All ranks are still there: {_places(answers, present)}. One is held up, or a link has failed."
        )
    return " ".join(said)


def _call_key(rank: int) -> str:
    return f"call/{rank}"


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
