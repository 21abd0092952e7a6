"""The best executor and split of a number of devices, for every method and batch of a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from conadv.errors import ConadvError
from conadv.planning.cost_model import Layout, Planner, Prediction, kind_of


@dataclass(frozen=True)
class Rules:
    """What the user fixed. micro_batch: clean images per forward pass; None: the largest that fits.

    executor: "auto", "inline" or "ranks". attack_ranks: M; None: any. memory: bytes of a device;
    None: no limit. objective: "speed", the shortest step, or "cost", the fewest device-seconds per
    image.
    """

    micro_batch: int | None = None
    executor: str = "auto"
    attack_ranks: int | None = None
    memory: int | None = None
    objective: str = "speed"

    def cost_of(self, found: Prediction) -> tuple[float, int]:
        """What :func:`best` minimises; of equal layouts it takes the one with fewer devices."""
        seconds = found.step if self.objective == "speed" else found.device_seconds_per_image
        return float(f"{seconds:.9g}"), found.layout.devices  # equal up to rounding is equal


DEFAULT = Rules()


@dataclass(frozen=True)
class Row:
    """The best layout of at most ``devices``.

    overhead: step time over that of noise on the same learners. hidden: the share of the attack
    that the step does not pay for. limit: the bottleneck: arithmetic, link, latency; or memory,
    where it forced a smaller micro-batch. extrapolated: what lies outside of what was measured.
    """

    method: str
    devices: int
    global_batch: int
    prediction: Prediction
    memory: int
    overhead: float
    hidden: float | None
    limit: str
    extrapolated: tuple[str, ...]

    def as_json(self, steps: int | None = None) -> dict[str, Any]:
        """Plain values, with the derived ones; with ``steps`` also the seconds that they take."""
        found = self.prediction
        values = asdict(self) | {
            "executor": "ranks" if found.layout.attack_ranks else "inline",
            "images_per_second": found.images_per_second,
            "device_seconds_per_image": found.device_seconds_per_image,
        }
        total = {} if steps is None else {"steps": steps, "total_seconds": found.step * steps}
        return values | total


def make_plan(
    planner: Planner,
    methods: Sequence[str],
    devices: Sequence[int],
    batches: Sequence[int],
    rules: Rules = DEFAULT,
    link_given: bool = False,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows by batch, devices and method, and the combinations that do not exist, with the reason.

    Raises ConadvError with the first reason if none exists.
    """
    rows, omitted = [], []
    for batch, count, method in product(batches, devices, methods):
        try:
            rows.append(best(planner, method, count, batch, rules, link_given))
        except ConadvError as error:
            about = {"method": method, "devices": count, "global_batch": batch}
            omitted.append(about | {"reason": str(error)})
    if not rows:
        raise ConadvError(f"Nothing to plan: {omitted[0]['reason']}")
    return rows, omitted


def best(
    planner: Planner,
    method: str,
    devices: int,
    global_batch: int,
    rules: Rules = DEFAULT,
    link_given: bool = False,
) -> Row:
    """The layout of at most ``devices`` with the shortest step, or the cheapest image.

    Devices may be left over, where the batch does not divide into all of them or fewer are faster;
    with the executor fixed to "inline" all of them learn.
    Raises ConadvError with the reason where nothing fits.
    """
    if not kind_of(method).stale and (rules.executor == "ranks" or rules.attack_ranks):
        raise ConadvError(
            f"Attack ranks have nothing to do with {method}: only conadv attacks ahead of its step."
        )
    layouts = list(_layouts(planner, method, devices, global_batch, rules))
    if not layouts:
        raise ConadvError(
            f"{method}: a global batch of {global_batch} does not divide over {devices} device(s) "
            "with this executor, micro-batch and number of attack ranks."
        )
    fitting = [layout for layout in layouts if _fits(planner, method, layout, rules)]
    if not fitting:
        raise ConadvError(
            f"memory: {method} on {devices} device(s) needs more than {rules.memory} bytes."
        )
    found = min((planner.predict(method, layout) for layout in fitting), key=rules.cost_of)
    layout = found.layout
    largest = _largest(planner, method, layout.learners, global_batch, replace(rules, memory=None))
    return Row(
        method,
        devices,
        global_batch,
        found,
        planner.device_bytes(method, layout),
        planner.overhead(found),
        planner.hidden(found),
        "memory" if layout.micro_batch < largest else planner.limit(found),
        planner.extrapolated(found, link_given),
    )


def _layouts(
    planner: Planner, method: str, devices: int, global_batch: int, rules: Rules
) -> Iterator[Layout]:
    """The layouts that the rules and the batch allow: every N, and for it every useful M."""
    inline = rules.executor != "ranks" and not rules.attack_ranks
    ranks = kind_of(method).stale and rules.executor != "inline" and rules.attack_ranks != 0
    for learners in (count for count in divisors(global_batch) if count <= devices):
        micro = _largest(planner, method, learners, global_batch, rules)
        accumulation, rest = divmod(global_batch // learners, micro)
        if rest:  # the micro-batch that the user fixed does not divide the local batch
            continue
        if inline and (rules.executor == "auto" or learners == devices):
            yield Layout(learners, 0, micro, accumulation)
        most = min(devices - learners, learners * accumulation) if ranks else 0
        for count in _splits(learners * accumulation, most, rules.attack_ranks):
            yield Layout(learners, count, micro, accumulation)


def _largest(planner: Planner, method: str, learners: int, global_batch: int, rules: Rules) -> int:
    """The micro-batch: the largest measured divisor of the local batch that fits, or as fixed."""
    if rules.micro_batch is not None:
        return rules.micro_batch
    local, points = global_batch // learners, planner.measured(method).points
    sizes = [size for size in divisors(local) if size <= points[-1].micro_batch]
    layouts = (Layout(learners, 0, size, local // size) for size in reversed(sizes))
    fitting = (each.micro_batch for each in layouts if _fits(planner, method, each, rules))
    return next(fitting, 1)


def _fits(planner: Planner, method: str, layout: Layout, rules: Rules) -> bool:
    return rules.memory is None or planner.device_bytes(method, layout) <= rules.memory


def _splits(micro_batches: int, most: int, fixed: int | None) -> Iterable[int]:
    """Attack ranks that differ in the largest share, ceil(micro_batches / M); the fewest of each.

    More attack ranks with the same share make no step faster, so they need not be looked at.
    """
    counts = range(most, 0, -1) if fixed is None else [fixed] * (0 < fixed <= most)
    return {-(-micro_batches // count): count for count in counts}.values()


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
