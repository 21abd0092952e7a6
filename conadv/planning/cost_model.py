"""The cost model: seconds and bytes of a step of a method on a layout of ranks.

Pure functions of a measured profile. Symbols: N learners, M attack ranks, n clean images per
learner and step in a micro-batches of b images, staleness tau. The equations are in docs/plan.md,
in this order. ``step_bytes`` also serves dry runs and micro_batch_size auto.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from conadv.errors import ConadvError, unknown
from conadv.planning.profile import Link, Measured, Point, Profile, Sizes

LOSSES_BYTES = 16  # the last all-reduce of a step: one float per view


@dataclass(frozen=True)
class Kind:
    """How a method's step is composed of what was measured.

    measured: the method in the profile whose points it uses. attack: "none"; "before" the gradient,
    on the critical path; "beside" the network, after it. lookahead: it predicts weights first.
    """

    measured: str
    attack: str
    lookahead: bool = False

    @property
    def stale(self) -> bool:
        """Whether attack ranks can make the attack: it must not need this step's weights."""
        return self.measured == "conadv" and self.attack == "beside"


KINDS = {
    "vanilla": Kind("vanilla", "none"),
    "multiview": Kind("noise", "none"),
    "noise": Kind("noise", "before"),
    "disadv": Kind("conadv", "before"),
    "conadv": Kind("conadv", "beside"),
    "conadv-lookahead": Kind("conadv", "beside", lookahead=True),
    "recycle": Kind("recycle", "beside"),
    # As many gradients as plain training, and the input gradient of the first layer.
    "recycle-replace": Kind("vanilla", "none"),
}
MEASURED = ("vanilla", "noise", "conadv", "conadv-lookahead", "recycle")


def kind_of(method: str) -> Kind:
    if method not in KINDS:
        raise unknown("method", method, KINDS)
    return KINDS[method]


@dataclass(frozen=True)
class Layout:
    """N learners, M attack ranks (0: the Inline executor), and a learner's micro-batches."""

    learners: int
    attack_ranks: int
    micro_batch: int
    accumulation: int

    @property
    def devices(self) -> int:
        return self.learners + self.attack_ranks

    @property
    def local_batch(self) -> int:
        return self.micro_batch * self.accumulation

    @property
    def global_batch(self) -> int:
        return self.local_batch * self.learners

    @property
    def share(self) -> int:
        """Micro-batches per step of the busiest attack rank; 0 without attack ranks."""
        made = self.learners * self.accumulation
        return -(-made // self.attack_ranks) if self.attack_ranks else 0


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step. The learner's phases, gradient to rest, add up to it."""

    method: str
    layout: Layout
    step: float
    gradient: float
    attack: float
    wait: float
    receive: float
    rest: float

    @property
    def images_per_second(self) -> float:
        return self.layout.global_batch / self.step

    @property
    def device_seconds_per_image(self) -> float:
        return self.layout.devices * self.step / self.layout.global_batch


@lru_cache
def curve(points: tuple[Point, ...], phase: str) -> tuple[list[float], list[float]]:
    """Sizes and seconds of a phase between which times are interpolated; seconds never fall.

    The last segment goes on beyond the largest size. So does the first towards 0, but never under
    the smallest size's time per image: a smaller batch is not more efficient than a larger one.
    """
    x = [float(point.micro_batch) for point in points]
    y = np.maximum.accumulate([getattr(point, phase) for point in points]).tolist()
    slopes = (np.diff(y) / np.diff(x)).tolist() or [y[0] / x[0]]
    far = 1e3 * x[-1]
    return [0, *x, far], [max(0, y[0] - slopes[0] * x[0]), *y, y[-1] + slopes[-1] * (far - x[-1])]


class Message(NamedTuple):
    """Something for the link. ready: seconds of work before it may leave. seconds: on the link.

    busy: what work beside it loses, if all of it lies beside work; at most ``seconds``.
    """

    ready: float
    seconds: float
    busy: float = 0.0


def queue(work: float, messages: Sequence[Message]) -> tuple[float, float]:
    """When the last message has arrived, and what ``work`` seconds beside them lose.

    One message travels at a time, in this order.
    """
    end = lost = 0.0
    for ready, seconds, busy in messages:
        start = max(ready, end)
        end = start + seconds
        lost += busy * max(0.0, min(end, work) - start) / seconds
    return end, lost


@dataclass(frozen=True)
class Planner:
    """Predicts by a profile and a network.

    link: between any two ranks; None is enough for one device. staleness: tau of conadv.
    arithmetic, attacks: factors on all computation and on that of attacks; 0 asks what is left
    where it is free.
    """

    profile: Profile
    link: Link | None = None
    staleness: int = 1
    arithmetic: float = 1.0
    attacks: float = 1.0

    def predict(self, method: str, layout: Layout) -> Prediction:
        """The step of ``method`` by ``layout``. Raises ConadvError where a link is missing."""
        kind = kind_of(method)
        gradient, rest = (self._seconds(kind.measured, x, layout) for x in ("gradient", "rest"))
        gradient *= layout.accumulation
        predict, attack = self._attack(method, kind, layout)
        before, after = (
            (predict + attack, 0.0) if kind.attack == "before" else (0.0, predict + attack)
        )
        messages = self._sums(kind, layout, gradient) if layout.learners > 1 else []
        chain = 0.0
        if layout.attack_ranks:  # their work is not the learner's, which predicts and sends weights
            before, after = predict, 0.0
            weights = self.profile.sizes.weights
            receivers = -(-layout.attack_ranks // layout.learners)
            messages.insert(0, self._message(receivers * weights))
            own = layout.share * attack / layout.accumulation
            images = layout.share * layout.micro_batch * self.profile.sizes.image
            # Weights out, attack and images back have tau steps; a rank's own share has one.
            travel = self._message(weights).seconds + self._message(images).seconds
            chain = max(own, (predict + travel + own) / self.staleness)
        arrived, lost = queue(gradient + after, messages)
        wait = max(0.0, arrived - gradient - after)
        gradient += lost
        learner = before + gradient + after + wait + rest
        step = max(learner, chain)
        return Prediction(
            method, layout, step, gradient, before + after, wait, step - learner, rest
        )

    # ---- the processor

    def _seconds(self, measured: str, phase: str, layout: Layout) -> float:
        """A phase of one micro-batch."""
        points = self.profile.measured(measured).points
        return self.arithmetic * float(np.interp(layout.micro_batch, *curve(points, phase)))

    def _attack(self, method: str, kind: Kind, layout: Layout) -> tuple[float, float]:
        """Predicting weights, once per step, and attacking a learner's micro-batches."""
        if kind.attack == "none":
            return 0.0, 0.0
        one = self._seconds(kind.measured, "attack", layout)
        # predicting is what the attack with look-ahead takes longer than the one without
        longer = self._seconds(method, "attack", layout) - one if kind.lookahead else 0.0
        return max(0.0, longer), self.attacks * layout.accumulation * one

    # ---- the network

    def _sums(self, kind: Kind, layout: Layout, gradient: float) -> list[Message]:
        """The all-reduces that gradients release during the last pass, and that of the losses."""
        measured = self.profile.measured(kind.measured)
        last = gradient / (layout.accumulation * measured.passes)
        sums = [(each.bytes, gradient - last * (1 - each.ready)) for each in measured.buckets]
        sums.append((LOSSES_BYTES, gradient))
        return [self.all_reduce(size, layout.learners, ready) for size, ready in sums]

    def all_reduce(self, size: float, ranks: int, ready: float = 0.0) -> Message:
        """Sum of ``size`` bytes over ranks, by the faster of the backend's algorithms.

        ring: 2 (N - 1) steps, 2 (N - 1) / N of the bytes out of every rank (Patarasuk and Yuan
        2009; gloo's only one). tree: 2 ceil(log2 N) steps, twice the bytes (NCCL's double binary
        tree).
        """
        ring = self._message(2 * (ranks - 1) / ranks * size, 2 * (ranks - 1), ready)
        tree = self._message(2 * size, 2 * math.ceil(math.log2(ranks)), ready)
        trees = self.link is not None and self.link.algorithm == "ring-or-tree"
        return min(ring, tree, key=lambda message: message.seconds) if trees else ring

    def _message(self, sent: float, steps: int = 1, ready: float = 0.0) -> Message:
        """``sent`` bytes out of a rank in ``steps`` steps, each of which costs one latency."""
        link = self._link()
        seconds = steps * link.latency + sent * link.seconds_per_byte
        busy = sent * link.busy_seconds_per_byte * self.arithmetic
        return Message(ready, seconds, min(seconds, busy))

    def _link(self) -> Link:
        if self.link is None:
            raise ConadvError(
                "The profile has no link, and more than one device needs one. Measure it with "
                "--measure link, or give --link-gbit and --latency-us."
            )
        return self.link

    # ---- questions about a prediction

    def measured(self, method: str) -> Measured:
        """The points behind a method."""
        return self.profile.measured(kind_of(method).measured)

    def overhead(self, found: Prediction) -> float:
        """Step time over that of ``noise`` on as many learners, Inline: what the attack costs."""
        return found.step / self.predict("noise", replace(found.layout, attack_ranks=0)).step

    def hidden(self, found: Prediction) -> float | None:
        """The share of the attack's time that the step does not pay for; None without an attack."""
        kind, layout = kind_of(found.method), found.layout
        if kind.measured not in ("conadv", "recycle"):
            return None
        free = replace(self, attacks=0.0).predict(found.method, layout).step
        attack = self._seconds(kind.measured, "attack", layout)
        attack *= layout.share or layout.accumulation
        return max(0.0, 1 - (found.step - free) / attack) if attack else None

    def limit(self, found: Prediction) -> str:
        """The step's bottleneck: "arithmetic", "link" or "latency"."""
        if self.link is None or found.layout.devices == 1:
            return "arithmetic"
        free = {
            "arithmetic": replace(self, arithmetic=0.0),
            "link": replace(self, link=self.link.model_copy(update={"seconds_per_byte": 1e-18})),
            "latency": replace(self, link=self.link.model_copy(update={"latency": 0.0})),
        }
        return min(free, key=lambda name: free[name].predict(found.method, found.layout).step)

    def extrapolated(self, found: Prediction, link_given: bool) -> tuple[str, ...]:
        """What lies outside of what was measured: "batch", "ranks", "link"."""
        layout, points = found.layout, self.measured(found.method).points
        several = layout.devices > 1 and self.link is not None
        outside = {
            "batch": not points[0].micro_batch <= layout.micro_batch <= points[-1].micro_batch,
            "ranks": several and self.link is not None and layout.learners > self.link.ranks,
            "link": several and link_given,
        }
        return tuple(name for name, is_so in outside.items() if is_so)

    # ---- memory

    def device_bytes(self, method: str, layout: Layout) -> int:
        """The most that any rank of the layout needs at least; as float32."""
        kind, sizes = kind_of(method), self.profile.sizes
        views = 1 if kind.measured == "vanilla" else 2
        waiting = {"recycle": 1.0, "recycle-replace": 0.5}.get(method, 0.0)
        learner = step_bytes(
            sizes,
            copies=2 + (layout.learners > 1) + kind.lookahead + (layout.attack_ranks > 0),
            local_batch=layout.local_batch,
            held=views + (self.staleness if kind.stale else waiting),
            micro_batch=layout.micro_batch,
            views_per_pass=views // self.measured(method).passes or 1,
        )
        # an attack rank: weights, two buffers to receive them, one pass's activations, images twice
        images = 2 * layout.share * layout.micro_batch * sizes.image
        attacker = 3 * sizes.weights + images + layout.micro_batch * sizes.activations_per_image
        return max(learner, attacker) if layout.attack_ranks else learner


def step_bytes(
    sizes: Sizes,
    *,
    copies: int,
    local_batch: int,
    held: float,
    micro_batch: int,
    views_per_pass: int,
) -> int:
    """Bytes that a learner's step needs at least: no allocator reserve, no kernel workspaces.

    copies: of the weights (themselves, gradients, buckets, ...). held: images kept at a time per
    clean image of the local batch, views and those that wait, as float32. views_per_pass: of a
    micro-batch in one forward pass, of which autograd keeps the activations.
    """
    images = int(local_batch * held * sizes.image)
    activations = micro_batch * views_per_pass * sizes.activations_per_image
    return sizes.weights * copies + sizes.optimizer_state + images + activations
