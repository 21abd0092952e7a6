"""The cost model: seconds and bytes of a step of a method on a layout of ranks.

Pure functions of a measured profile, shared by `conadv plan` and the dry run. Symbols: N learners,
M attack ranks, n clean images per learner and step in a micro-batches of b images, staleness tau.
The equations are in docs/plan.md, in this order.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from conadv.errors import ConadvError, unknown
from conadv.planning.profile import Bucket, Link, Measured, Profile, Sizes

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
    """Seconds of one step. gradient, attack, wait, receive and rest are the learner's phases.

    They add up to ``step``; ``attack`` is what of it is on the learner. lower: for the Stream
    executor, the bound of perfect overlap; otherwise ``step`` itself.
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


class Curve:
    """Piecewise linear through measured (size, seconds) points, made non-decreasing.

    Beyond the largest point the last segment goes on. Below the smallest the first does, but never
    under that point's time per image: a smaller batch is not more efficient than a larger one.
    """

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self.sizes = [size for size, _ in points]
        self._seconds = list(accumulate((seconds for _, seconds in points), max))

    def __call__(self, size: float) -> float:
        if len(self.sizes) == 1:
            return self._seconds[0] * size / self.sizes[0]
        right = min(max(bisect_left(self.sizes, size), 1), len(self.sizes) - 1)
        x0, x1 = self.sizes[right - 1 : right + 1]
        y0, y1 = self._seconds[right - 1 : right + 1]
        value = y0 + (y1 - y0) * (size - x0) / (x1 - x0)
        return max(value, y0 * size / x0) if size < x0 else value


@dataclass(frozen=True)
class Message:
    """Something for the network. One message is under way at a time, in the order given.

    ready: seconds of the process's work after which it may leave. seconds: its time on an idle host.
    busy: seconds of the host's processor that it takes, 0 to ``seconds``; 0 where a device moves it.
    """

    ready: float
    seconds: float
    busy: float = 0.0


@dataclass(frozen=True)
class Ends:
    """Seconds after the start at which the work and the last message end."""

    work: float
    network: float

    @property
    def both(self) -> float:
        return max(self.work, self.network)


def beside(work: float, messages: Sequence[Message]) -> Ends:
    """Run ``work`` seconds of a process beside ``messages``.

    While both are under way they share the processor fairly: a message that alone uses a share
    u = busy / seconds of it gets min(u, 1/2). Work then runs at the rate 1 - min(u, 1/2) and the
    message at min(1, 1 / (2 u)): with u = 0 they do not affect each other, with u = 1 nothing is
    gained by running both at once.
    """
    clock = done = 0.0
    work_end: float | None = None
    for message in messages:
        idle = max(0.0, min(message.ready, work) - done)
        clock, done, left = clock + idle, done + idle, message.seconds
        if done < work and left > 0:
            share = min(1.0, message.busy / message.seconds)
            rate, speed = 1 - min(share, 0.5), min(1.0, 0.5 / share) if share else 1.0
            if (work - done) / rate <= left / speed:
                clock += (work - done) / rate
                left -= (work - done) / rate * speed
                done = work
            else:
                clock += left / speed
                done, left = done + left / speed * rate, 0.0
        if done >= work and work_end is None:
            work_end = clock
        clock += max(0.0, left)
    network_end = clock if messages else 0.0
    return Ends(clock + work - done if work_end is None else work_end, network_end)


@dataclass(frozen=True)
class Planner:
    """Predicts by a profile and a network.

    link: between any two ranks; None is enough for one device. staleness: tau of conadv.
    arithmetic, attacks: factors on all computation and on that of attacks, 0 to ask what is left where
    it is free. processors: how many all ranks of a layout share, where they do not have one each: no
    step is shorter than their work divided by it.
    """

    profile: Profile
    link: Link | None = None
    staleness: int = 1
    arithmetic: float = 1.0
    attacks: float = 1.0
    processors: int | None = None

    def predict(self, method: str, layout: Layout) -> Prediction:
        """The step of ``method`` by ``layout``. Raises ConadvError without the link that it needs."""
        kind = kind_of(method)
        if layout.attack_ranks:
            return self._with_attack_ranks(method, kind, layout)
        return self._inline(method, kind, layout)

    def _inline(self, method: str, kind: Kind, layout: Layout) -> Prediction:
        """Attack before, gradient, attack beside the network, wait, update."""
        attack = self._attack_seconds(kind, layout)
        first, later = (attack, 0.0) if kind.attack == "before" else (0.0, attack)
        gradient = self._seconds(kind.measured, "gradient", layout) * layout.accumulation
        rest = self._seconds(kind.measured, "rest", layout)
        ends = self._learn(kind, layout, gradient, later)
        step = max(first + ends.both + rest, self._crowded(layout, first + ends.work + rest))
        free = self._learn(kind, layout, gradient, 0.0).both
        lower = min(step, max(free, attack) + rest)
        wait = max(0.0, step - first - ends.work - rest)
        stretched = ends.work - later
        return Prediction(method, layout, step, stretched, attack, wait, 0.0, rest, lower)

    def _with_attack_ranks(self, method: str, kind: Kind, layout: Layout) -> Prediction:
        """A learner sends weights, trains and takes images; an attack rank works beside it."""
        sizes = self.profile.sizes
        begin = self._predict_seconds(kind, layout) + self._copy(sizes.weights)
        gradient = self._seconds(kind.measured, "gradient", layout) * layout.accumulation
        receivers = -(-layout.attack_ranks // layout.learners)
        weights = self._message(sizes.weights * receivers, ready=begin)
        ends = self._learn(kind, layout, gradient, 0.0, before=begin, sent=[weights])
        taken = self._copy(layout.local_batch * sizes.image)
        rest = self._seconds(kind.measured, "rest", layout) + taken
        learner = ends.both + rest
        # weights out, attack and images back have tau steps; an attack rank has one for its share
        own, images = self._share_seconds(kind, layout), self._share_bytes(layout)
        travel = self._message(sizes.weights).seconds + self._message(images).seconds
        chain = max(own, (begin + travel + own) / self.staleness)
        step = max(learner, chain, self._crowded(layout, ends.work + rest, own))
        wait = max(0.0, ends.network - ends.work)
        return Prediction(method, layout, step, ends.work, 0.0, wait, step - learner, rest, step)

    def _crowded(self, layout: Layout, learner: float, attacker: float = 0.0) -> float:
        """Work of all ranks over the processors that they share."""
        if self.processors is None or self.processors >= layout.devices:
            return 0.0
        return (layout.learners * learner + layout.attack_ranks * attacker) / self.processors

    def _share_bytes(self, layout: Layout) -> int:
        return layout.share * layout.micro_batch * self.profile.sizes.image

    def _share_seconds(self, kind: Kind, layout: Layout) -> float:
        """An attack rank's work per step: its attacks, and packing the images."""
        attack = layout.share * self._seconds(kind.measured, "attack", layout) * self.attacks
        return attack + self._copy(self._share_bytes(layout))

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
        """gradient, with copies into buckets, and ``later``, beside the messages they release."""
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
        losses = Bucket(bytes=LOSSES_BYTES, ready=1.0)
        messages.append(self.all_reduce(losses, layout.learners, work))
        return beside(work + later, messages)

    # ---- the network

    def all_reduce(self, bucket: Bucket, ranks: int, ready: float = 0.0) -> Message:
        """Sum of a bucket over ranks, by the faster of the backend's algorithms.

        ring: 2 (N - 1) steps, 2 (N - 1) / N of the bytes out of every rank (Patarasuk and Yuan 2009;
        gloo's only one). tree: 2 ceil(log2 N) steps, twice the bytes (NCCL's double binary tree).
        """
        link = self._link()
        steps, sent = 2 * (ranks - 1), 2 * (ranks - 1) / ranks * bucket.bytes
        seconds = steps * link.latency + sent * link.seconds_per_byte
        if link.algorithm == "ring-or-tree" and ranks > 2:
            steps = 2 * math.ceil(math.log2(ranks))
            tree = steps * link.latency + 2 * bucket.bytes * link.seconds_per_byte
            seconds = min(seconds, tree)
        return Message(
            ready, seconds, min(seconds, sent * self.arithmetic * link.busy_seconds_per_byte)
        )

    def _message(self, size: float, ready: float = 0.0) -> Message:
        """From one rank to another."""
        link = self._link()
        seconds = link.point_latency + size * link.point_seconds_per_byte
        return Message(
            ready, seconds, min(seconds, size * self.arithmetic * link.busy_seconds_per_byte)
        )

    def _link(self) -> Link:
        if self.link is None:
            raise ConadvError(
                "The profile has no link, and more than one device needs one. Measure it with "
                "--measure link, or give --link-gbit and --latency-us."
            )
        return self.link

    # ---- the processor

    def _seconds(self, measured: str, phase: str, layout: Layout) -> float:
        """A phase of one micro-batch."""
        return self.arithmetic * self._curve(measured, phase)(layout.micro_batch)

    def _attack_seconds(self, kind: Kind, layout: Layout) -> float:
        if kind.attack == "none":
            return 0.0
        attack = layout.accumulation * self._seconds(kind.measured, "attack", layout)
        return self.attacks * attack + self._predict_seconds(kind, layout)

    def _predict_seconds(self, kind: Kind, layout: Layout) -> float:
        """Look-ahead predicts weights once per step: what its attack takes longer than a plain one."""
        if not kind.lookahead:
            return 0.0
        longer = self._seconds("conadv-lookahead", "attack", layout)
        return max(0.0, longer - self._seconds(kind.measured, "attack", layout))

    def _copy(self, size: float) -> float:
        return self.arithmetic * size * self.profile.copy_seconds_per_byte

    @cached_property
    def _curves(self) -> dict[tuple[str, str], Curve]:
        return {
            (name, phase): Curve([(p.micro_batch, getattr(p, phase)) for p in measured.points])
            for name, measured in self.profile.methods.items()
            for phase in ("gradient", "attack", "rest")
        }

    def _curve(self, name: str, phase: str) -> Curve:
        self.profile.measured(name)
        return self._curves[name, phase]

    # ---- questions about a prediction

    def measured(self, method: str) -> Measured:
        """The points behind a method."""
        return self.profile.measured(kind_of(method).measured)

    def overhead(self, prediction: Prediction) -> float:
        """Step time over that of ``noise`` on as many learners, Inline: what the attack costs."""
        plain = replace(prediction.layout, attack_ranks=0)
        return prediction.step / self.predict("noise", plain).step

    def hidden(self, prediction: Prediction) -> float | None:
        """The share of the attack's time that the step does not pay for; None without an attack."""
        kind, layout = kind_of(prediction.method), prediction.layout
        if kind.measured not in ("conadv", "recycle"):
            return None
        free = replace(self, attacks=0.0).predict(prediction.method, layout)
        count = layout.share or layout.accumulation
        attack = count * self._seconds(kind.measured, "attack", layout)
        return max(0.0, 1 - (prediction.step - free.step) / attack) if attack else None

    def limit(self, prediction: Prediction) -> str:
        """The step's bottleneck: "arithmetic", "link" or "latency"."""
        link = self.link
        if link is None or prediction.layout.devices == 1:
            return "arithmetic"
        fast = {"seconds_per_byte": 1e-18, "point_seconds_per_byte": 1e-18}
        near = {"latency": 0.0, "point_latency": 0.0}
        free = {
            "arithmetic": replace(self, arithmetic=0.0),
            "link": replace(self, link=link.model_copy(update=fast)),
            "latency": replace(self, link=link.model_copy(update=near)),
        }
        steps = {
            name: planner.predict(prediction.method, prediction.layout).step
            for name, planner in free.items()
        }
        return min(steps, key=lambda name: steps[name])

    def extrapolated(self, prediction: Prediction, link_given: bool) -> tuple[str, ...]:
        """What lies outside of what was measured: "batch", "ranks", "link"."""
        layout, points = prediction.layout, self.measured(prediction.method).points
        several = layout.devices > 1 and self.link is not None
        found = {
            "batch": not points[0].micro_batch <= layout.micro_batch <= points[-1].micro_batch,
            "ranks": several and self.link is not None and layout.learners > self.link.ranks,
            "link": several and link_given,
        }
        return tuple(name for name, outside in found.items() if outside)

    # ---- memory

    def device_bytes(self, method: str, layout: Layout) -> int:
        """The most that any rank of the layout needs at least; as float32."""
        kind, sizes = kind_of(method), self.profile.sizes
        views = 1 if method == "vanilla" else 2
        learner = step_bytes(
            sizes,
            copies=2 + (layout.learners > 1) + kind.lookahead + (layout.attack_ranks > 0),
            local_batch=layout.local_batch,
            held=views + (self.staleness if kind.stale else int(method == "recycle")),
            micro_batch=layout.micro_batch,
            views_per_pass=views // self.measured(method).passes or 1,
        )
        return max(learner, self.attack_rank_bytes(layout)) if layout.attack_ranks else learner

    def attack_rank_bytes(self, layout: Layout) -> int:
        """Weights, two buffers to receive them, a micro-batch's activations, images twice."""
        sizes = self.profile.sizes
        activations = layout.micro_batch * sizes.activations_per_image
        return 3 * sizes.weights + 2 * self._share_bytes(layout) + activations


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

    copies: of the weights (themselves, gradients, buckets, ...). held: images kept at a time per clean
    image of the local batch, views and those that wait, as float32. views_per_pass: of a micro-batch
    in one forward pass, of which autograd keeps the activations.
    """
    images = int(local_batch * held * sizes.image)
    activations = micro_batch * views_per_pass * sizes.activations_per_image
    return sizes.weights * copies + sizes.optimizer_state + images + activations
