"""A run's record -> its timeline: when every rank did what, on one clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import ConfigDict, Field

from conadv.errors import ConadvError
from conadv.safe_io import Document, checked
from conadv.training.record import BESIDE

_LONGEST = 1e9  # seconds, and steps: no run has measured more
_Count = Annotated[int, Field(ge=0, lt=_LONGEST)]
_Time = Annotated[float, Field(gt=-_LONGEST, lt=_LONGEST)]
_Phase = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]


class _Line(Document):
    """A line of the record, as far as a timeline reads it."""

    model_config = ConfigDict(strict=False)  # JSON has lists for tuples
    type: str
    step: _Count = 0
    rank: _Count = 0  # rank 0 writes the lines of type "step"
    role: Literal["learner", "attack"] = "learner"
    staleness: _Count | None = None
    late: bool = False
    spans: list[tuple[_Phase, _Time, _Time]] = Field([])
    config: dict[str, Any] = Field({})
    execution: dict[str, Any] = Field({})


@dataclass(frozen=True)
class Timeline:
    """What ran when, in a run or in its part since a resume.

    spans: rank, role ("learner" or "attack"), step (that it belongs to), phase, start, end (seconds
    on the run's clock), by rank and start. staleness: step -> measured staleness, where weights
    made its images. late: steps that went without their adversarial images. resumed: the step at
    which this part began, None from the start. config, execution: the header's.
    """

    spans: pd.DataFrame
    staleness: dict[int, int]
    late: frozenset[int]
    resumed: int | None
    config: dict[str, Any]
    execution: dict[str, Any]

    @cached_property
    def steps(self) -> range:
        """From the first to the last step with spans, by the learners where the record has any."""
        learners = self.spans[self.spans["role"] == "learner"]
        step = (learners if len(learners) else self.spans)["step"]
        return range(int(step.min()), int(step.max()) + 1)

    @cached_property
    def steady(self) -> range:
        """The steps without the warm-up: the first tenth, and at least tau + 1 steps.

        In the first step nothing overlaps yet (the gradients' buckets are not known), in the first
        tau steps the images are made inside the step, and caches are cold. All steps if none is
        left.
        """
        tau = self.config.get("staleness")
        cold = max((tau if isinstance(tau, int) else 0) + 1, len(self.steps) // 10)
        return self.steps[cold:] or self.steps

    def ranks(self, role: str) -> list[int]:
        """The ranks of a role that have spans."""
        return sorted(map(int, self.spans.loc[self.spans["role"] == role, "rank"].unique()))

    def within(self, steps: range) -> pd.DataFrame:
        """The spans of these steps."""
        return self.spans[self.spans["step"].between(steps.start, steps.stop - 1)]


def extents(spans: pd.DataFrame) -> pd.DataFrame:
    """start and end of every step by (role, rank, step): own phases, not the network's."""
    own = spans[~spans["phase"].isin(BESIDE)]
    return own.groupby(["role", "rank", "step"]).agg(start=("start", "min"), end=("end", "max"))


def timeline(lines: Iterable[Any], name: str = "record.jsonl") -> Timeline:
    """The timeline in the lines of a record (:func:`conadv.training.record.read_lines`).

    A resumed run has a clock for every part: taken is the part with the most spans, the last of
    equals. ``name`` is what errors call the record. Raises ConadvError, with the line's number, for
    lines that are not a conadv record's, and where no step has spans.
    """
    read = [_parsed(raw, f"{name}, line {number}") for number, raw in enumerate(lines, 1)]
    parts: list[list[_Line]] = [[]]
    for line in read:
        if line.type == "resume":
            parts.append([])
        parts[-1].append(line)
    best = max(reversed(parts), key=lambda part: sum(len(line.spans) for line in part))
    rows = [(line.rank, line.role, line.step, *span) for line in best for span in line.spans]
    if not rows:
        raise ConadvError(
            f"{name} has no spans: it was made by an older version, or with --timeline-steps 0."
            " Train again with --timeline-steps 200."
        )
    spans = pd.DataFrame(rows, columns=["rank", "role", "step", "phase", "start", "end"])
    if (spans["end"] < spans["start"]).any() or (spans.groupby("rank")["role"].nunique() > 1).any():
        raise ConadvError(f"{name} has a span that ends before its start, or a rank of two roles.")
    header = next((line for line in read if line.type == "header"), _Line(type="header"))
    return Timeline(
        spans.sort_values(["rank", "start", "end"], ascending=[True, True, False], kind="stable"),
        {line.step: line.staleness for line in best if line.staleness is not None},
        frozenset(line.step for line in best if line.late),
        best[0].step if best[0].type == "resume" else None,
        header.config,
        best[0].execution or header.execution,
    )


def _parsed(raw: Any, where: str) -> _Line:
    if isinstance(raw, dict) and raw.get("type") not in ("header", "resume", "step", "timeline"):
        raw = {"type": raw.get("type")}  # nothing else of such a line is read
    return checked(_Line, raw, Path(where), "Give the folder of a run as conadv train wrote it.")
