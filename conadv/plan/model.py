"""The step-time model: what a step of a method takes by a layout of ranks. Pure functions of a profile.

Symbols: N learners, M attack ranks, n clean images per learner and step in a micro-batches of b images, tau staleness.
The equations are in docs/plan.md, in this order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from conadv.errors import ConadvError, unknown
from conadv.plan.curve import Curve
from conadv.plan.overlap import Ends, Message, beside
from conadv.plan.profile import Bucket, Link, Measured, Profile

LOSSES_BYTES = 16  # the last all-reduce of a step: one float per view


@dataclass(frozen=True)
class Kind:
    """How a method's step is composed of what was measured.

    measured: the method in the profile whose points it uses. attack: "none"; "before" the gradient, on the critical
    path; "beside" the network, after it. lookahead: the weights are predicted first.
    """

    measured: str
    attack: str
    lookahead: bool = False

    @property
    def stale(self) -> bool:
        """Whether attack ranks can do the attack: it must not need this step's weights."""
        return self.measured == "conadv" and self.attack == "beside"


KINDS = {
    "vanilla": Kind("vanilla", "none"),
    "multiview": Kind("noise", "none"),
    "noise": Kind("noise", "before"),
    "disadv": Kind("conadv", "before"),
    "conadv": Kind("conadv", "beside"),
    "conadv-lookahead": Kind("conadv", "beside", lookahead=True),
    "recycle": Kind("recycle", "beside"),
}
MEASURED = ("vanilla", "noise", "conadv", "conadv-lookahead", "recycle")


def kind_of(method: str) -> Kind:
    if method not in KINDS:
        raise unknown("method", method, KINDS)
    return KINDS[method]


@dataclass(frozen=True)
class Layout:
    """N learners, M attack ranks (0: the Inline executor), and the micro-batches of a learner's step."""

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
    def executor(self) -> str:
        return "ranks" if self.attack_ranks else "inline"

    @property
    def share(self) -> int:
        """Micro-batches per step of the attack rank that has most of them; 0 without attack ranks."""
        return (
            -(-self.learners * self.accumulation // self.attack_ranks) if self.attack_ranks else 0
        )


@dataclass(frozen=True)
class Prediction:
    """One step. ``gradient``, ``attack``, ``wait``, ``receive`` and ``rest`` are the learner's phases and add up to
    ``step``; ``attack`` is what of it is on the learner. Seconds.

    lower: for the Stream executor, the bound of perfect overlap; otherwise ``step`` itself.
    """

    method: str
    layout: Layout
    step: float
    gradient: float
    attack: float
    wait: float
    receive: float
    rest: float
    lower: float

    @property
    def images_per_second(self) -> float:
        return self.layout.global_batch / self.step

    @property
    def device_seconds_per_image(self) -> float:
        return self.layout.devices * self.step / self.layout.global_batch


@dataclass(frozen=True)
class Planner:
    """Predicts by a profile and a network.

    link: between any two ranks; None is enough for one device. staleness: tau of conadv.
    arithmetic: factor on all computation, 0 to ask what an infinitely fast processor would leave. processors: how many
    all ranks of a layout share, where they have not one each: no step is shorter than their work divided by it.
    """

    profile: Profile
    link: Link | None = None
    staleness: int = 1
    arithmetic: float = 1.0
    processors: int | None = None

    def predict(self, method: str, layout: Layout) -> Prediction:
        """The step of ``method`` by ``layout``. Raises ConadvError where they do not fit each other."""
        kind = kind_of(method)
        self._check(method, kind, layout)
        if layout.attack_ranks:
            return self._with_attack_ranks(method, kind, layout)
        return self._inline(method, kind, layout)

    def _inline(self, method: str, kind: Kind, layout: Layout) -> Prediction:
        """attack before, gradient, attack beside the network, wait, update."""
        attack = self._attack_seconds(kind, layout) if kind.attack != "none" else 0.0
        first, later = (attack, 0.0) if kind.attack == "before" else (0.0, attack)
        gradient = self._gradient_seconds(kind, layout)
        ends = self._learn(kind, layout, gradient, later)
        rest = self._rest_seconds(kind, layout)
        step = max(first + ends.both + rest, self._crowded(layout, first + ends.work + rest))
        lower = min(step, max(self._learn(kind, layout, gradient, 0.0).both, attack) + rest)
        stretched = ends.work - later
        wait = max(0.0, step - first - ends.work - rest)
        return Prediction(method, layout, step, stretched, attack, wait, 0.0, rest, lower)

    def _with_attack_ranks(self, method: str, kind: Kind, layout: Layout) -> Prediction:
        """A learner sends its weights, trains, and takes images; an attack rank's chain runs beside it."""
        gradient = self._gradient_seconds(kind, layout)
        predicted = self._predict_seconds(kind, layout)
        copy = self._copy(self.profile.sizes.weights)
        sends = -(-layout.attack_ranks // layout.learners)
        weights = self._point_to_point(self.profile.sizes.weights * sends, ready=predicted + copy)
        ends = self._learn(kind, layout, gradient, 0.0, before=predicted + copy, sent=[weights])
        taken = self._copy(layout.local_batch * self.profile.sizes.image)
        rest = self._rest_seconds(kind, layout) + taken
        learner = ends.both + rest
        attack = self._share_seconds(kind, layout)
        step = max(
            learner,
            self._chain(kind, layout, predicted, attack),
            self._crowded(layout, ends.work + rest, attack),
        )
        return Prediction(
            method, layout, step, ends.work, 0.0, ends.wait, step - learner, rest, step
        )

    def _crowded(self, layout: Layout, learner: float, attacker: float = 0.0) -> float:
        """Work of all ranks over the processors that they share."""
        if self.processors is None or self.processors >= layout.devices:
            return 0.0
        return (layout.learners * learner + layout.attack_ranks * attacker) / self.processors

    def _share_seconds(self, kind: Kind, layout: Layout) -> float:
        """What an attack rank works per step: its attacks, out of the buffer of weights, and packing images."""
        images = layout.share * layout.micro_batch * self.profile.sizes.image
        attack = layout.share * self._scaled(
            self._curve(kind.measured, "attack")(layout.micro_batch)
        )
        return attack + self._copy(images)

    def _chain(self, kind: Kind, layout: Layout, predicted: float, own: float) -> float:
        """Seconds per step that the attack ranks need.

        Weights out, attack and images back must be through in tau steps; the attack rank has one step for its share.
        """
        sizes = self.profile.sizes
        images = layout.share * layout.micro_batch * sizes.image
        travel = self._point_to_point(sizes.weights).seconds + self._point_to_point(images).seconds
        sent = predicted + self._copy(sizes.weights)
        return max(own, (sent + travel + own) / self.staleness)

    def _learn(
        self,
        kind: Kind,
        layout: Layout,
        gradient: float,
        later: float,
        *,
        before: float = 0.0,
        sent: Sequence[Message] = (),
    ) -> Ends:
        """gradient (with copies into buckets) and ``later``, beside the messages that they release."""
        if layout.learners == 1:
            return beside(before + gradient + later, sent)
        measured = self.profile.measured(kind.measured)
        last = gradient / (layout.accumulation * measured.passes)
        copied, messages = before, list(sent)
        for bucket in measured.buckets:
            copied += self._copy(bucket.bytes)
            ready = gradient - last * (1 - bucket.ready) + copied
            messages.append(self.all_reduce(bucket, layout.learners, ready))
        work = gradient + copied
        messages.append(
            self.all_reduce(Bucket(bytes=LOSSES_BYTES, ready=1.0), layout.learners, work)
        )
        return beside(work + later, messages)

    # ---- the network

    def all_reduce(self, bucket: Bucket, ranks: int, ready: float = 0.0) -> Message:
        """Sum of a bucket over ranks, by the faster of the backend's algorithms.

        ring: 2 (N - 1) steps, 2 (N - 1) / N of the bytes out of every rank (Patarasuk and Yuan 2009; gloo's only one).
        tree: 2 ceil(log2 N) steps, twice the bytes (NCCL's double binary tree).
        """
        link = self._link()
        steps, sent = 2 * (ranks - 1), 2 * (ranks - 1) / ranks * bucket.bytes
        seconds = steps * link.latency + sent * link.seconds_per_byte
        if link.algorithm == "ring-or-tree" and ranks > 2:
            tree = (
                2 * math.ceil(math.log2(ranks)) * link.latency
                + 2 * bucket.bytes * link.seconds_per_byte
            )
            seconds = min(seconds, tree)
        return Message(ready, seconds, min(seconds, sent * self._busy(link)))

    def _point_to_point(self, size: float, ready: float = 0.0) -> Message:
        link = self._link()
        seconds = link.point_latency + size * link.point_seconds_per_byte
        return Message(ready, seconds, min(seconds, size * self._busy(link)))

    def _busy(self, link: Link) -> float:
        return self.arithmetic * link.busy_seconds_per_byte

    def _link(self) -> Link:
        if self.link is None:
            raise ConadvError(
                "The profile has no link, and more than one device needs one. Measure it (torchrun with 2 or more "
                "processes ... conadv plan PROFILE.json --measure link), or give --link-gbit and --latency-us."
            )
        return self.link

    # ---- the processor

    def _gradient_seconds(self, kind: Kind, layout: Layout) -> float:
        return self._scaled(
            layout.accumulation * self._curve(kind.measured, "gradient")(layout.micro_batch)
        )

    def _attack_seconds(self, kind: Kind, layout: Layout) -> float:
        attack = layout.accumulation * self._curve(kind.measured, "attack")(layout.micro_batch)
        return self._scaled(attack) + self._predict_seconds(kind, layout)

    def _predict_seconds(self, kind: Kind, layout: Layout) -> float:
        """Look-ahead predicts weights once per step: what its attack takes more than a plain one."""
        if not kind.lookahead:
            return 0.0
        more = self._curve("conadv-lookahead", "attack")(layout.micro_batch)
        return self._scaled(
            max(0.0, more - self._curve(kind.measured, "attack")(layout.micro_batch))
        )

    def _rest_seconds(self, kind: Kind, layout: Layout) -> float:
        return self._scaled(self._curve(kind.measured, "rest")(layout.micro_batch))

    def _copy(self, size: float) -> float:
        return self._scaled(size * self.profile.copy_seconds_per_byte)

    def _scaled(self, seconds: float) -> float:
        return self.arithmetic * seconds

    @cached_property
    def _curves(self) -> dict[tuple[str, str], Curve]:
        return {
            (name, phase): Curve(
                [(point.micro_batch, getattr(point, phase)) for point in measured.points]
            )
            for name, measured in self.profile.methods.items()
            for phase in ("gradient", "attack", "rest")
        }

    def _curve(self, name: str, phase: str) -> Curve:
        self.profile.measured(name)
        return self._curves[name, phase]

    # ---- rules

    def _check(self, method: str, kind: Kind, layout: Layout) -> None:
        if layout.attack_ranks and not kind.stale:
            raise ConadvError(
                f"Attack ranks have nothing to do with {method}: only conadv attacks ahead of its step. "
                "Leave out --attack-ranks, or choose conadv."
            )
        if layout.attack_ranks > layout.learners * layout.accumulation:
            raise ConadvError(
                f"{layout.attack_ranks} attack ranks for {layout.learners * layout.accumulation} micro-batch(es) per "
                "step: some would have nothing to do. Choose a smaller --micro-batch-size, or fewer attack ranks."
            )

    def measured(self, method: str) -> Measured:
        """The points behind a method."""
        return self.profile.measured(kind_of(method).measured)

    def in_range(self, method: str, micro_batch: int) -> bool:
        """Whether a micro-batch lies within the measured points."""
        return self._curve(kind_of(method).measured, "gradient").covers(micro_batch)

    def overhead(self, prediction: Prediction) -> float:
        """Step time over that of ``noise`` on as many learners, Inline: what the attack costs."""
        plain = replace(prediction.layout, attack_ranks=0)
        return prediction.step / self.predict("noise", plain).step

    def limit(self, prediction: Prediction) -> str:
        """What the step would lose most of its time by, were it free: "arithmetic", "link" or "latency"."""
        link = self.link
        if link is None or prediction.layout.devices == 1:
            return "arithmetic"
        fast = link.model_copy(update={"seconds_per_byte": 1e-18, "point_seconds_per_byte": 1e-18})
        near = link.model_copy(update={"latency": 0.0, "point_latency": 0.0})
        free = {
            "arithmetic": replace(self, arithmetic=0.0),
            "link": replace(self, link=fast),
            "latency": replace(self, link=near),
        }
        steps = {
            name: planner.predict(prediction.method, prediction.layout).step
            for name, planner in free.items()
        }
        return min(steps, key=lambda name: steps[name])
