"""Schedules against the formulas in their docstring."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conadv import ConadvError, WarmupDecay


def test_by_hand() -> None:
    # Red when: warm-up starts at 0, the power is applied to 1 - s twice, or end is added twice.
    poly = WarmupDecay(peak=8.0, total_steps=10, warmup_steps=4, power=2, end=0.5)
    assert [poly(t) for t in range(4)] == [2, 4, 6, 8]
    assert poly(4) == 8
    assert poly(7) == pytest.approx(0.5 + 7.5 * 0.25)
    assert poly(10) == poly(99) == 0.5
    cosine = WarmupDecay(peak=2.0, total_steps=8, decay="cosine")
    assert [cosine(0), cosine(4), cosine(8)] == pytest.approx([2.0, 1.0, 0.0])
    assert cosine(2) == pytest.approx(1 + math.cos(math.pi / 4))
    flat = WarmupDecay(peak=3.0, total_steps=5, warmup_steps=1, decay="constant")
    assert [flat(t) for t in (0, 1, 4, 50)] == [3, 3, 3, 3]


def test_phases_by_hand() -> None:
    # Red when: the peak lasts until the decay begins, or a warm-up step at half of the peak counts
    # as peak.
    schedule = WarmupDecay(peak=8.0, total_steps=10, warmup_steps=2, power=1)
    assert [schedule(t) for t in range(10)] == pytest.approx([4, 8, 8, 7, 6, 5, 4, 3, 2, 1])
    assert [schedule.phase(t) for t in range(10)] == ["warm-up"] * 2 + ["peak"] * 5 + ["decay"] * 3


@given(st.floats(1e-3, 1e3), st.integers(1, 500), st.data())
def test_rises_then_falls_and_stays_in_range(peak: float, total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total))
    decay = data.draw(st.sampled_from(["polynomial", "cosine", "constant"]))
    schedule = WarmupDecay(peak, total, warmup, decay, data.draw(st.floats(0.5, 4)))
    values = [schedule(t) for t in range(total + 3)]
    assert all(0 <= value <= peak * (1 + 1e-12) for value in values)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)


def test_errors() -> None:
    with pytest.raises(ConadvError, match="does not fit"):
        WarmupDecay(1.0, 5, 6)
    with pytest.raises(ConadvError, match="above the peak"):
        WarmupDecay(1.0, 5, end=2.0)
