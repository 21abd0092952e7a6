"""A plan as rows: the best layout for each method, number of devices and batch, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from conadv.errors import ConadvError
from conadv.plan.model import Planner, Prediction
from conadv.plan.search import Choice, Rules, best


@dataclass(frozen=True)
class Row:
    """The best layout of at most ``devices``.

    overhead: step time over that of noise on the same learners. limit: what the step would gain most by if it were
    free: arithmetic, link, latency; or memory, where it forced a smaller micro-batch. extrapolated: what of the
    prediction lies outside what was measured: "batch", "ranks", "link".
    """

    method: str
    devices: int
    global_batch: int
    prediction: Prediction
    memory: int
    overhead: float
    limit: str
    extrapolated: tuple[str, ...]

    def as_json(self, steps: int | None = None) -> dict[str, Any]:
        """Plain values, with the derived ones; with ``steps`` also the seconds that so many take."""
        prediction, layout = self.prediction, self.prediction.layout
        values = asdict(self) | {
            "extrapolated": list(self.extrapolated),
            "executor": layout.executor,
        }
        derived = {
            "images_per_second": prediction.images_per_second,
            "device_seconds_per_image": prediction.device_seconds_per_image,
        }
        if steps is not None:
            derived |= {"steps": steps, "total_seconds": prediction.step * steps}
        return values | derived


@dataclass(frozen=True)
class Omitted:
    """A combination that does not exist, and why."""

    method: str
    devices: int
    global_batch: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """All rows, in order of batch, devices, method."""

    planner: Planner
    rows: tuple[Row, ...]
    omitted: tuple[Omitted, ...]


def make_plan(
    planner: Planner,
    methods: Sequence[str],
    devices: Sequence[int],
    batches: Sequence[int],
    rules: Rules,
    link_given: bool = False,
) -> Plan:
    """Rows for every combination. Raises ConadvError with the first reason if there is no row at all."""
    rows: list[Row] = []
    omitted: list[Omitted] = []
    for batch in batches:
        for count in devices:
            for method in methods:
                try:
                    rows.append(
                        _row(planner, best(planner, method, count, batch, rules), count, link_given)
                    )
                except ConadvError as error:
                    omitted.append(Omitted(method, count, batch, str(error)))
    if not rows:
        raise ConadvError(f"Nothing to plan: {omitted[0].reason}")
    return Plan(planner, tuple(rows), tuple(omitted))


def _row(planner: Planner, choice: Choice, devices: int, link_given: bool) -> Row:
    prediction = choice.prediction
    return Row(
        prediction.method,
        devices,
        prediction.layout.global_batch,
        prediction,
        choice.memory,
        planner.overhead(prediction),
        "memory" if choice.short_of_memory else planner.limit(prediction),
        extrapolated(planner, prediction, link_given),
    )


def extrapolated(planner: Planner, prediction: Prediction, link_given: bool) -> tuple[str, ...]:
    """What of a prediction lies outside of what was measured, as in :class:`Row`."""
    layout, link = prediction.layout, planner.link
    found = []
    if not planner.in_range(prediction.method, layout.micro_batch):
        found.append("batch")
    if layout.devices > 1 and link is not None:
        if layout.learners > link.ranks:
            found.append("ranks")
        if link_given:
            found.append("link")
    return tuple(found)
