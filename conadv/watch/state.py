"""What a record has said so far, as far as it is shown. Whatever stands in a record, adding it raises nothing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from conadv.errors import printable

RECENT = 50
"""Steps that step time, phase shares and warnings are about."""
LOSSES = 4096
"""Losses that are kept for the curve; beyond it every other one goes."""
SLOW_PHASES = {
    "data": "steps wait for images: more --data.num-workers, smaller files, or a faster disk",
    "wait": "ranks wait for the network or for each other: see conadv timeline",
    "receive": "learners wait for attack ranks: more of them, or a larger staleness",
}
"""Phases that should take next to nothing, and what to do where they do not."""
SLOW_SHARE = 0.25


def number(value: Any) -> float | None:
    """A finite number, or None for anything else that a file may hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -1e300 < value < 1e300 and not math.isnan(value) else None


def text(value: Any, limit: int = 300) -> str:
    """One printable line of at most ``limit`` characters."""
    return printable(str(value)[:limit])


@dataclass
class Step:
    """A step's line, its numbers checked."""

    step: int
    epoch: int
    lr: float | None
    loss: float | None
    losses: dict[str, float | None]
    grad_norm: float | None
    staleness: float | None
    seconds: float | None
    phases: dict[str, float]
    time: float | None


@dataclass
class State:
    """The run, from the lines of its record in their order."""

    header: dict[str, Any] = field(default_factory=dict)
    last: Step | None = None
    recent: deque[Step] = field(default_factory=lambda: deque(maxlen=RECENT))
    losses: list[float] = field(default_factory=list)
    evals: dict[str, tuple[int, float | None, float | None]] = field(default_factory=dict)
    """Split -> (step, accuracy, loss) of its last evaluation."""
    best: dict[str, float] = field(default_factory=dict)
    events: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    skipped: int = 0
    late: int = 0
    bad_images: int = 0
    ended: str | None = None
    """How the last line says that the run ended: "stopped" or "failed"; None while it goes on."""
    _stride: int = 1

    @property
    def total(self) -> int:
        """Steps that are planned; 0 while that is not known."""
        return int(number(self.header.get("steps")) or 0)

    @property
    def done(self) -> int:
        return 0 if self.last is None else self.last.step + 1

    def add(self, line: dict[str, Any]) -> None:
        """Take in one line."""
        add = getattr(self, f"_add_{line['type']}", None) if line["type"].isidentifier() else None
        if add is not None:
            add(line)

    def _add_header(self, line: dict[str, Any]) -> None:
        self.header = line
        self.events.append(f"started at {text(line.get('time'), 40)}")

    def _add_step(self, line: dict[str, Any]) -> None:
        step = _step(line)
        if step is None:
            return
        self.last, self.ended = step, None
        self.recent.append(step)
        if step.loss is not None and step.step % self._stride == 0:
            self.losses.append(step.loss)
            if len(self.losses) > LOSSES:
                self.losses, self._stride = self.losses[::2], 2 * self._stride
        if line.get("skipped"):
            self.skipped += 1
            self.events.append(f"step {step.step}: update left out: {text(line['skipped'])}")
        self.late += line.get("late") is True

    def _add_eval(self, line: dict[str, Any]) -> None:
        split, step = text(line.get("split"), 20), int(number(line.get("step")) or 0)
        accuracy, loss = number(line.get("accuracy")), number(line.get("loss"))
        self.evals[split] = (step, accuracy, loss)
        if accuracy is not None:
            self.best[split] = max(accuracy, self.best.get(split, 0.0))
            self.events.append(f"step {step}: {split} accuracy {100 * accuracy:.2f} %")

    def _add_bad_image(self, line: dict[str, Any]) -> None:
        self.bad_images += 1
        self.events.append(
            f"left out: {text(line.get('path'), 120)} ({text(line.get('reason'), 120)})"
        )

    def _add_resume(self, line: dict[str, Any]) -> None:
        self.ended = None
        self.events.append(
            f"resumed from step {text(line.get('step'), 20)} at {text(line.get('time'), 40)}"
        )
        damaged = line.get("damaged")
        for message in damaged if isinstance(damaged, list) else ():
            self.events.append(f"damaged: {text(message)}")

    def _add_stop(self, line: dict[str, Any]) -> None:
        self.ended = "stopped"
        signal, step = text(line.get("signal"), 20), text(line.get("step"), 20)
        self.events.append(f"stopped by {signal} after {step} steps, saved: --resume goes on")

    def _add_error(self, line: dict[str, Any]) -> None:
        self.ended = "failed"
        self.events.append(
            f"failed after {text(line.get('step'), 20)} steps: {text(line.get('message'))}"
        )

    # ---- what is derived

    def step_seconds(self) -> float | None:
        """Median of the recent steps; the first of a run allocates and is left out where there are others."""
        known = [step.seconds for step in self.recent if step.seconds is not None]
        return median(known[1:] or known) if known else None

    def seconds_left(self) -> float | None:
        """Of the training steps, by the time that recent ones took from one to the next, evaluations included."""
        first, last = (self.recent[0], self.recent[-1]) if len(self.recent) > 1 else (None, None)
        if (
            first is None
            or last is None
            or first.time is None
            or last.time is None
            or last.step <= first.step
        ):
            return None
        return max(
            0.0, (last.time - first.time) / (last.step - first.step) * (self.total - self.done)
        )

    def phase_shares(self) -> dict[str, float]:
        """Phase -> its share of all phases of the recent steps, the largest first."""
        sums: dict[str, float] = {}
        for step in self.recent:
            for name, seconds in step.phases.items():
                sums[name] = sums.get(name, 0.0) + seconds
        total = sum(sums.values())
        shares = {name: seconds / total for name, seconds in sums.items()} if total > 0 else {}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def warnings(self) -> Iterator[str]:
        """What a user may want to act on."""
        if self.skipped:
            yield f"{self.skipped} update(s) left out: loss or gradient was not finite (lower lr, longer warm-up)"
        if self.late:
            yield f"{self.late} step(s) without their adversarial images: attack ranks were late"
        if self.bad_images:
            yield f"{self.bad_images} image file(s) that cannot be read were left out (conadv check)"
        for name, share in self.phase_shares().items():
            if name in SLOW_PHASES and share > SLOW_SHARE:
                yield f"{name} takes {100 * share:.0f} % of the time: {SLOW_PHASES[name]}"


def _step(line: dict[str, Any]) -> Step | None:
    index = number(line.get("step"))
    if index is None or index < 0:
        return None
    return Step(
        int(index),
        int(number(line.get("epoch")) or 0),
        number(line.get("lr")),
        number(line.get("loss")),
        {name: number(value) for name, value in _mapping(line.get("losses"))},
        number(line.get("grad_norm")),
        number(line.get("staleness")),
        number(line.get("seconds")),
        {name: max(0.0, number(value) or 0.0) for name, value in _mapping(line.get("phases"))},
        number(line.get("time")),
    )


def _mapping(value: Any) -> list[tuple[str, Any]]:
    """At most 12 entries with printable names."""
    return (
        [(text(name, 20), entry) for name, entry in value.items()][:12]
        if isinstance(value, dict)
        else []
    )
