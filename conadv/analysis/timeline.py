"""A run's record -> its timeline: when every rank did what, on one clock."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from conadv.analysis.intervals import Intervals
from conadv.errors import ConadvError
from conadv.training.record import BESIDE

Line = dict[str, Any]
Steps = npt.NDArray[np.int64]

ROLES = ("learner", "attack")
LONGEST = 1e9  # seconds; and steps: what lies beyond is no time that a run has measured
_PHASE = re.compile(r"[a-z][a-z0-9_-]{0,31}")


@dataclass(frozen=True)
class Lane:
    """One rank: n spans, sorted by start.

    phase_n: names; step_n: the step that a span belongs to; span_n2: (start, end) in seconds on the run's clock.
    """

    rank: int
    role: str
    phase_n: npt.NDArray[np.str_]
    step_n: Steps
    span_n2: Intervals

    def of(self, *phases: str) -> Intervals:
        """The spans of these phases."""
        return self.span_n2[np.isin(self.phase_n, phases)]

    @property
    def own(self) -> npt.NDArray[np.bool_]:
        """Which of the n spans are this process's own doing, not the network's."""
        return ~np.isin(self.phase_n, BESIDE)

    def only(self, steps: range) -> Lane:
        """The spans of these steps."""
        chosen = (self.step_n >= steps.start) & (self.step_n < steps.stop)
        return Lane(
            self.rank, self.role, self.phase_n[chosen], self.step_n[chosen], self.span_n2[chosen]
        )

    def extents(self) -> tuple[Steps, Intervals]:
        """The steps with own spans, ascending, and for each the start of its first and the end of its last one."""
        step_n, span_n2 = self.step_n[self.own], self.span_n2[self.own]
        steps, place = np.unique(step_n, return_inverse=True)
        extent = np.stack([np.full(len(steps), np.inf), np.full(len(steps), -np.inf)], axis=1)
        np.minimum.at(extent[:, 0], place, span_n2[:, 0])
        np.maximum.at(extent[:, 1], place, span_n2[:, 1])
        return steps, extent


@dataclass(frozen=True)
class Timeline:
    """What the lanes of a run (or of its part since a resume) have in common.

    lanes: in the order of ranks. staleness: step -> measured staleness, where weights made its images. late: steps
    that went without their adversarial images. resumed: the step at which this part began, None from the start.
    header: as the record has it, with this part's own ``execution``; or empty.
    """

    lanes: tuple[Lane, ...]
    staleness: dict[int, int]
    late: frozenset[int]
    resumed: int | None
    header: Line

    @property
    def tau(self) -> int:
        """The configured staleness; 0 where the method has none."""
        value = self.setting("config", "staleness")
        return value if isinstance(value, int) and value > 0 else 0

    def setting(self, group: str, name: str) -> Any:
        """A value of the header's ``config`` or ``execution``; None where the record lacks it."""
        values = self.header.get(group)
        return values.get(name) if isinstance(values, dict) else None

    @cached_property
    def steps(self) -> range:
        """From the first to the last step with spans, by the learners where the record has any."""
        step_n = np.concatenate([lane.step_n for lane in self.of("learner") or self.lanes])
        return range(int(step_n.min()), int(step_n.max()) + 1)

    @cached_property
    def steady(self) -> range:
        """The steps without the warm-up, which is the first tenth, and at least tau + 1 steps.

        In the first step nothing overlaps yet (the gradients' buckets are not known), in the first tau steps the
        images are made inside the step, and caches and allocators are cold. If there is nothing else: all steps.
        """
        begin = self.steps.start + max(self.tau + 1, len(self.steps) // 10)
        return range(begin, self.steps.stop) if begin < self.steps.stop else self.steps

    def of(self, role: str) -> list[Lane]:
        return [lane for lane in self.lanes if lane.role == role]


def timeline(lines: Sequence[Any], name: str = "record.jsonl") -> Timeline:
    """The timeline in the lines of a record (:func:`conadv.training.record.read_lines`).

    A run that was resumed has one clock per part; taken is the part with the most spans, the last of equals.
    ``name`` is what errors call the record. Raises ConadvError, with the line's number, for lines that are no
    conadv record, and where no step has spans.
    """
    reader = _Reader(name)
    numbered = [reader.line(number, line) for number, line in enumerate(lines, 1)]
    header = next((line for _, line in numbered if line["type"] == "header"), {})
    parts = [_Part(reader, header, part) for part in _parts(numbered)]
    best = max(reversed(parts), key=lambda part: part.count)
    if not best.count:
        raise ConadvError(
            f"{name} has no spans: the run was made by an older version, or with --timeline-steps 0. "
            "Train again with --timeline-steps 200."
        )
    return best.timeline()


def _parts(numbered: Sequence[tuple[int, Line]]) -> Iterator[Sequence[tuple[int, Line]]]:
    """The record cut before every "resume": each part has a clock of its own."""
    cuts = [i for i, (_, line) in enumerate(numbered) if line["type"] == "resume"]
    for begin, end in pairwise([0, *cuts, len(numbered)]):
        yield numbered[begin:end]


class _Reader:
    """Takes nothing on trust: what a line holds is of the right type and range, or its number is named."""

    def __init__(self, name: str) -> None:
        self._name = name

    def line(self, number: int, line: Any) -> tuple[int, Line]:
        if not isinstance(line, dict) or not isinstance(line.get("type"), str):
            raise self.error(number, "it is no line of a conadv record")
        return number, line

    def whole(self, number: int, line: Line, key: str) -> int:
        value = line.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < LONGEST:
            raise self.error(number, f"{key} must be a whole number from 0, not {_short(value)}")
        return value

    def role(self, number: int, line: Line) -> str:
        value = line.get("role")
        if value not in ROLES:
            raise self.error(number, f"role must be one of {', '.join(ROLES)}, not {_short(value)}")
        return str(value)

    def spans(self, number: int, line: Line) -> list[tuple[str, float, float]]:
        found = line.get("spans", [])
        if not isinstance(found, list):
            raise self.error(number, f"spans must be a list, not {_short(found)}")
        return [self._span(number, span) for span in found]

    def _span(self, number: int, span: Any) -> tuple[str, float, float]:
        if not isinstance(span, list) or len(span) != 3:
            raise self.error(number, f"a span must be [phase, start, end], not {_short(span)}")
        phase, start, end = span
        if not isinstance(phase, str) or not _PHASE.fullmatch(phase):
            raise self.error(number, f"{_short(phase)} is no name of a phase")
        if not _is_time(start) or not _is_time(end) or end < start:
            raise self.error(
                number, f"a span must have start <= end in seconds, not {_short(span)}"
            )
        return phase, start, end

    def error(self, number: int, what: str) -> ConadvError:
        return ConadvError(
            f"{self._name}, line {number}: {what}. Give the folder of a run as conadv train wrote it."
        )


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LONGEST


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Part:
    """The lines of one start of the run."""

    def __init__(self, reader: _Reader, header: Line, numbered: Sequence[tuple[int, Line]]) -> None:
        self._reader = reader
        self._header = header
        self._rows: dict[int, list[tuple[str, float, float, int]]] = {}
        self._roles: dict[int, str] = {}
        self._staleness: dict[int, int] = {}
        self._late: set[int] = set()
        self._resumed: int | None = None
        for number, line in numbered:
            self._take(number, line)

    @property
    def count(self) -> int:
        return sum(map(len, self._rows.values()))

    def _take(self, number: int, line: Line) -> None:
        read = self._reader
        if line["type"] == "resume":
            self._resumed = read.whole(number, line, "step")
            self._header = {
                **self._header,
                **{key: line[key] for key in ("execution", "ranks") if key in line},
            }
        if line["type"] not in ("step", "timeline"):
            return
        step = read.whole(number, line, "step")
        rank, role = 0, "learner"  # who writes the steps
        if line["type"] == "timeline":
            rank, role = read.whole(number, line, "rank"), read.role(number, line)
        elif line.get("staleness") is not None:
            self._staleness[step] = read.whole(number, line, "staleness")
        if line.get("late") is True:
            self._late.add(step)
        if self._roles.setdefault(rank, role) != role:
            raise read.error(number, f"rank {rank} is {role} here and {self._roles[rank]} above")
        self._rows.setdefault(rank, []).extend((*span, step) for span in read.spans(number, line))

    def timeline(self) -> Timeline:
        return Timeline(
            lanes=tuple(self._lane(rank) for rank in sorted(self._rows) if self._rows[rank]),
            staleness=self._staleness,
            late=frozenset(self._late),
            resumed=self._resumed,
            header=self._header,
        )

    def _lane(self, rank: int) -> Lane:
        phases, starts, ends, steps = zip(*self._rows[rank], strict=True)
        span_n2 = np.array([starts, ends], dtype=np.float64).T
        order = np.lexsort((-span_n2[:, 1], span_n2[:, 0]))
        return Lane(
            rank,
            self._roles[rank],
            np.array(phases)[order],
            np.array(steps, dtype=np.int64)[order],
            span_n2[order],
        )
