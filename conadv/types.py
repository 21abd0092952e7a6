"""The contracts of conadv on one page.

Shape suffixes: N images, C channels, H height, W width, K classes. ``x_NCHW`` is *model space*:
what the model takes, normally pixels normalised by mean and standard deviation. Pixels are uint8
0..255 or floats in [0, 1]; ``eps`` and ``step_size`` are always in [0, 1] pixel units (see
:class:`conadv.PixelSpace`).

Steps are counted from 0. The *weight version* t names the weights theta_t after t updates, so step
t trains theta_t and an adversarial batch with version t - tau has staleness tau.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from conadv.errors import ConadvError

Forward = Callable[[Tensor], Tensor]
"""x_NCHW -> the model's output, logits_NK for most. The engine has already set the route and frozen
the statistics; its forward names the loss that is trained (conadv.attacks.targets.trained_loss)."""

Span = tuple[str, float, float]
"""(phase, start, end) in seconds on one clock (see conadv.distributed.clock)."""

Schedule = Callable[[int], float]
"""step (0-based) -> value. Pure: no state, so that look-ahead may ask for future steps."""


class Attack(Protocol):
    """Makes adversarial images. Pure: changes no ``.grad`` and no global generator.

    What ``forward`` does to a module's buffers is the caller's: a module in train mode moves its
    running statistics in every pass. The engine puts all buffers back; a loop of one's own that
    calls an attack itself does so in eval mode or, for batch norm, in ``conadv.frozen_stats``.

    Returns a tensor like ``x_NCHW`` (same shape, dtype, device; detached) whose distance to it is
    at most ``eps``.
    Ranks: attacks its own images only; nothing is reduced.
    """

    def __call__(
        self, forward: Forward, x_NCHW: Tensor, y_N: Tensor, generator: torch.Generator
    ) -> Tensor: ...


@dataclass(frozen=True)
class MicroBatch:
    """The images of one forward pass.

    ``views`` maps a view's name to images of the same N samples: "clean" always, "aug" for the
    third route, "second" for the multi-view control. uint8 images are pixels, which the engine
    moves to the device and normalises; floating-point images are taken as model space.
    ``index`` is this micro-batch's place in the global batch, rank * accumulation + m: it keys the
    randomness, so that N ranks draw what one rank with N-fold accumulation draws.
    ``y_N``: classes (int64), or probabilities (N, K; float) where images are mixed.
    """

    index: int
    y_N: Tensor
    views: Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One rank's share of the global batch of one step: ``accumulation`` micro-batches."""

    step: int
    micro: tuple[MicroBatch, ...]
    epoch: int = 0


@dataclass(frozen=True)
class ExtraBatch:
    """The images that join the clean ones in a step: adversarial ones, or a control's.

    images, labels: one entry per micro-batch. weight_version: the weights that made them; None
    where no weights did.
    """

    images: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    weight_version: int | None = None


@dataclass
class StepRecord:
    """What one step did. Losses are means over the *global* batch; times are seconds.

    ``staleness`` is measured (step - weight_version), not configured. ``phases`` maps a phase
    (data, attack, gradient, send, receive, wait, update) to seconds on this rank. They took
    ``seconds`` together, less than their sum where the attack has a stream of its own. ``spans``
    says when they ran, and when the network was busy beside them ("network": a bucket of gradients;
    "transfer": weights or images). ``late``: the extra images did not arrive in time and the step
    went without them. ``skipped``: why the update was not made (a loss or gradient was not finite,
    or overflowed in fp16); such numbers are then NaN or infinite here.
    """

    step: int
    epoch: int
    lr: float
    loss: float
    losses: dict[str, float]
    grad_norm: float
    weight_version: int | None = None
    phases: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    spans: list[Span] = field(default_factory=list)
    late: bool = False
    skipped: str | None = None

    @property
    def staleness(self) -> int | None:
        return None if self.weight_version is None else self.step - self.weight_version


class Waiting(Protocol):
    """The extra batches that wait for their steps (:class:`conadv.engine.pending.Pending`)."""

    def put(self, step: int, extra: ExtraBatch) -> None: ...

    def pop(self, step: int) -> ExtraBatch | None:
        """Take out the batch of ``step``; None if nobody put one."""

    def skips(self, step: int) -> bool:
        """Whether ``step`` has to go without: attack ranks were late."""


class Engine(Protocol):
    """What a method may ask of the step that runs it (:class:`conadv.TrainStep`)."""

    version: int

    @property
    def pending(self) -> Waiting: ...

    def images(self, micro: MicroBatch, view: str) -> Tensor:
        """A view's images (N, C, H, W) in model space, on the model's device."""

    def labels(self, micro: MicroBatch) -> Tensor: ...

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that training changes, by name."""

    def attack_batch(
        self, attack: Attack, batch: Batch, weights: Mapping[str, Tensor] | None = None
    ) -> ExtraBatch:
        """The attacked images of a batch, made at the present weights or at ``weights``."""

    def predicted_weights(self, num_steps: int) -> Mapping[str, Tensor]:
        """Look-ahead: the weights of ``num_steps`` updates later, if momentum decides."""


class Method:
    """Which images join the clean ones, through which route, made at which weights.

    Derive from it and override what differs: the defaults are those of training on clean images
    alone. A method holds settings only. What waits between steps is in ``engine.pending``, so that
    checkpoints, records and executors treat all methods alike. Within step t, at weights theta_t,
    the step calls in this order:

    1. ``extra_view(engine, batch)``: the extra images of step t; on the critical path.
    2. ``second_gradient(engine, norm, again)``: only if ``two_gradients``; after the backward pass.
    3. ``on_input_grad(engine, batch, clean, gradients)``: only if ``needs_input_gradient``.
    4. ``prepare(engine, future)``: work for step t + ``ahead`` that needs nothing of this step's
       gradient, so an executor may run it beside backward or communication. ``future`` is B_{t +
       ahead}, None when training ends first.

    Ranks: each rank handles its own images; nothing is reduced.
    """

    route: ClassVar[str | None] = "adv"  # batch-norm route of the extra view, None without one
    data_views: ClassVar[tuple[str, ...]] = ()  # further views that the loader has to make
    needs_input_gradient: ClassVar[bool] = False
    two_gradients: ClassVar[bool] = False
    lookahead: bool = False  # whether it asks for engine.predicted_weights
    share: float = 1.0  # of every micro-batch, that gets an extra copy
    mix: str = "add"  # extra images beside the clean ones, or "replace": in the place of some
    reads_fewer: ClassVar[bool] = False  # with replace: its extra images are of another batch
    attack_route: str = "adv"  # the view, adv or clean, on whose route attacks take their gradient
    attack_statistics: str = "batch"  # what batch norm normalises by in attacks, or running

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for old, new in {"extra": "extra_view", "absorb": "on_input_grad"}.items():
            if old in cls.__dict__:  # nobody would call it: training would be on clean images alone
                raise ConadvError(f"{cls.__name__}.{old} is called {new} since version 0.2.")

    @property
    def ahead(self) -> int:
        """How many steps ahead ``prepare`` must see the data; 0 when it does nothing."""
        return 0

    @property
    def space(self) -> Any:
        """The PixelSpace that the method's perturbation lives in; None without one."""
        return None

    @property
    def future_attack(self) -> Attack | None:
        """The attack that ``prepare`` runs, which attack ranks can run instead.

        ``extra_view`` of such a method returns None where ``engine.pending.skips(step)``.
        """
        return None

    def num_attacked(self, num_images: int) -> int:
        """How many of ``num_images`` images get an extra copy: the first ones."""
        if count := round(self.share * num_images):
            return count
        raise ConadvError(
            f"attack.share {self.share:g} of {num_images} images rounds to zero images; "
            "increase either."
        )

    def num_fresh(self, num_images: int) -> int:
        """How many images of the data a micro-batch reads, to train on ``num_images``."""
        if self.mix == "replace" and self.reads_fewer:
            return num_images - round(self.share * num_images)
        return num_images

    def attack_weights(self, engine: Engine) -> Mapping[str, Tensor] | None:
        """The weights for ``future_attack``; None for the present ones."""
        return None

    def extra_view(self, engine: Engine, batch: Batch) -> ExtraBatch | None:
        return None

    def second_gradient(self, engine: Engine, norm: Tensor, again: Callable[[], None]) -> None:
        """Replace the gradient, of this ``norm``, by another: ``again()`` computes it."""

    def on_input_grad(
        self, engine: Engine, batch: Batch, clean: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """``clean``: each micro-batch's images; ``gradients``: of the loss by them."""

    def prepare(self, engine: Engine, future: Batch | None) -> None:
        """``future``: B_{t + ahead}."""

    def attack_gradients(self) -> float:
        """Input gradients per attacked image (for counting cost)."""
        return 0.0

    def gradient_images(self, views: Collection[str], num_images: int) -> float:
        """What a step that trained on ``views`` cost in gradient images per image of its batch.

        A forward-backward of an image of any view counts 1, twice for two gradients; an input
        gradient counts 1. ``num_images``: the size of a micro-batch. Plain training costs 1.
        """
        extra = round(self.share * num_images)
        # What replaces images leaves fewer clean ones; late images leave all, unless fewer were
        # read.
        replaced = self.mix == "replace" and ("adv" in views or self.reads_fewer)
        sizes = {"adv": extra, "clean": num_images - extra * replaced}
        passes = sum(sizes.get(view, num_images) for view in views)
        gradients = (2 if self.two_gradients else 1) * passes + extra * self.attack_gradients()
        return gradients / num_images
