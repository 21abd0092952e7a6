"""The clock of the phases: what counts as this process's time, and what ran beside it."""

from __future__ import annotations

import time

import pytest
import torch

from conadv import Comm
from conadv.distributed.clock import PhaseClock, covered
from conadv.distributed.handle import Handle

from .test_methods import CASES, make, run


def test_spans_and_seconds() -> None:
    # Red when: spans of the network count as this process's time; origin is added; collect() keeps
    # what it has given.
    clock = PhaseClock(torch.device("cpu"))
    clock.origin = 100.0
    clock.add("data", 101.0, 101.5)
    clock.add("network", 101.25, 103.0, beside=True)
    clock.add("data", 102.0, 102.25)
    seconds, spans, total = clock.collect()
    assert seconds == {"data": 0.75}
    assert total == 0.75
    assert spans == [("data", 1.0, 1.5), ("network", 1.25, 3.0), ("data", 2.0, 2.25)]
    assert clock.collect() == ({}, [], 0.0)
    clock.add("data", 1.0, 2.0)
    clock.discard()
    assert clock.collect() == ({}, [], 0.0)


def test_a_phase_is_measured_on_the_clock_that_processes_share() -> None:
    # Red when: the clock is perf_counter's where the two differ, or a phase's end is its begin.
    clock = PhaseClock(torch.device("cpu"))
    before = time.monotonic()
    with clock.phase("gradient"):
        time.sleep(0.01)
    seconds, ((name, begin, end),), _ = clock.collect()
    assert name == "gradient"
    assert before <= begin + 1e-6
    assert end <= time.monotonic() + 1e-6
    assert end - begin == pytest.approx(seconds["gradient"], abs=2e-6)
    assert seconds["gradient"] >= 0.01


@pytest.mark.parametrize("name", CASES)
def test_the_spans_of_a_step_are_its_phases_in_their_order(name: str) -> None:
    # Red when: a phase is left out of the spans, or lies inside another.
    for record in run(make(CASES[name]()), 3):
        assert sum(end - begin for _, begin, end in record.spans) == pytest.approx(
            sum(record.phases.values()), abs=1e-5 * len(record.spans)
        )
        edges = [moment for _, begin, end in record.spans for moment in (begin, end)]
        assert edges == sorted(edges)
        assert record.spans[-1][0] == "update"


def test_a_sum_over_ranks_ends_when_it_is_there_not_when_it_is_asked_for() -> None:
    # Red when: end is taken in wait(): everything between would seem to be communication.
    future: torch.futures.Future[None] = torch.futures.Future()

    class Work:
        def get_future(self) -> torch.futures.Future[None]:
            return future

        def wait(self) -> None:
            future.wait()

    handle = Handle(torch.zeros(1), lambda tensor: Work(), Comm().guard)
    future.set_result(None)
    there = time.monotonic()
    time.sleep(0.02)
    handle.wait()
    assert handle.begin <= handle.end <= there


def test_time_on_two_streams_counts_once() -> None:
    # Red when: phases are added up; a phase inside another shortens it.
    assert covered([(1.0, 4.0), (0.5, 2.0), (2.5, 3.0), (5.0, 6.0)]) == 4.5
    assert covered([]) == 0.0
