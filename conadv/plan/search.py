"""The best executor and split of a number of devices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from conadv.errors import ConadvError
from conadv.plan.memory import device_bytes
from conadv.plan.model import Layout, Planner, Prediction, kind_of


@dataclass(frozen=True)
class Rules:
    """What the user fixed. micro_batch: clean images per forward pass, which batch norm sees; None: chosen.

    executor: "auto", "inline" or "ranks". attack_ranks: M; None: any. memory: bytes of a device; None: no limit.
    objective: "speed", the shortest step, or "cost", the fewest device-seconds per image.
    """

    micro_batch: int | None = None
    executor: str = "auto"
    attack_ranks: int | None = None
    memory: int | None = None
    objective: str = "speed"

    def cost_of(self, choice: Choice) -> tuple[float, int]:
        """What :func:`best` minimises; of equal layouts it takes the one with fewer devices."""
        prediction = choice.prediction
        seconds = (
            prediction.step if self.objective == "speed" else prediction.device_seconds_per_image
        )
        return float(
            f"{seconds:.9g}"
        ), prediction.layout.devices  # times that differ by rounding only are equal


DEFAULT = Rules()


@dataclass(frozen=True)
class Choice:
    """The fastest prediction, its memory, and whether memory made the micro-batch smaller than it could have been."""

    prediction: Prediction
    memory: int
    short_of_memory: bool


def best(
    planner: Planner, method: str, devices: int, global_batch: int, rules: Rules = DEFAULT
) -> Choice:
    """The layout of at most ``devices`` with the most images per second, or the fewest device-seconds per image.

    Devices may be left over, where the batch does not divide into all of them or fewer are faster; with the executor
    fixed to "inline" all of them learn. Raises ConadvError with the reason where nothing fits.
    """
    found: list[Choice] = []
    reasons: list[str] = []
    for learners, attacked in _teams(method, devices, global_batch, rules):
        try:
            micro, short = _micro_batch(planner, method, learners, global_batch, rules)
        except ConadvError as error:
            reasons.append(str(error))
            continue
        accumulation = global_batch // learners // micro
        most = min(devices - learners, learners * accumulation) if attacked else 0
        for attack_ranks in (
            _splits(learners * accumulation, most, rules.attack_ranks) if attacked else (0,)
        ):
            layout = Layout(learners, attack_ranks, micro, accumulation)
            needed = device_bytes(planner, method, layout)
            if rules.memory is None or needed <= rules.memory:
                found.append(Choice(planner.predict(method, layout), needed, short))
    if not found:
        raise ConadvError(reasons[0] if reasons else _nothing(method, devices, global_batch, rules))
    return min(found, key=rules.cost_of)


def _teams(
    method: str, devices: int, global_batch: int, rules: Rules
) -> Iterator[tuple[int, bool]]:
    """(learners, whether attack ranks stand beside them) that the rules and the batch allow."""
    stale = kind_of(method).stale
    if not stale and (rules.executor == "ranks" or rules.attack_ranks):
        raise ConadvError(
            f"Attack ranks have nothing to do with {method}: only conadv attacks ahead of its step."
        )
    fewest = rules.attack_ranks or 1
    for learners in (count for count in divisors(global_batch) if count <= devices):
        if (
            rules.executor != "ranks"
            and not rules.attack_ranks
            and (rules.executor == "auto" or learners == devices)
        ):
            yield learners, False
        if (
            rules.executor != "inline"
            and stale
            and rules.attack_ranks != 0
            and learners + fewest <= devices
        ):
            yield learners, True


def _splits(micro_batches: int, most: int, fixed: int | None) -> Iterator[int]:
    """Numbers of attack ranks that differ in the largest share, ceil(micro_batches / M); the fewest ranks of each.

    Nothing in a prediction falls with more attack ranks of the same share, so the others need not be looked at.
    """
    if fixed is not None:
        if fixed <= most:
            yield fixed
        return
    count = 1
    while count <= most:
        yield count
        share = -(-micro_batches // count)
        if share == 1:
            return
        count = -(-micro_batches // (share - 1))


def _micro_batch(
    planner: Planner, method: str, learners: int, global_batch: int, rules: Rules
) -> tuple[int, bool]:
    """Clean images per forward pass and whether memory made them fewer.

    The largest divisor of the local batch that was measured and fits into memory, unless the user fixed it.
    """
    local = global_batch // learners
    if rules.micro_batch is not None:
        if local % rules.micro_batch:
            raise ConadvError(
                f"The local batch {local} ({global_batch} on {learners} rank(s)) is not a multiple of the micro-batch "
                f"{rules.micro_batch}."
            )
        return rules.micro_batch, False
    largest = planner.measured(method).points[-1].micro_batch
    sizes = [size for size in divisors(local) if size <= largest]
    fits = [
        size
        for size in sizes
        if _fits(planner, method, Layout(learners, 0, size, local // size), rules.memory)
    ]
    if not fits:
        raise ConadvError(
            f"memory: even a micro-batch of one image needs more than {rules.memory} bytes per device."
        )
    return fits[-1], fits[-1] < sizes[-1]


def _fits(planner: Planner, method: str, layout: Layout, memory: int | None) -> bool:
    return memory is None or device_bytes(planner, method, layout) <= memory


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _nothing(method: str, devices: int, global_batch: int, rules: Rules) -> str:
    wanted = f" with {rules.attack_ranks} attack rank(s)" if rules.attack_ranks else ""
    if rules.executor == "inline" and global_batch % devices:
        return f"The global batch {global_batch} does not divide into {devices} rank(s)."
    if rules.executor == "ranks" or rules.attack_ranks:
        return f"{method}: no split of {devices} device(s) into learners and attack ranks{wanted} fits the batch."
    return (
        f"memory: {method} needs more than {rules.memory} bytes per device on {devices} device(s)."
    )
