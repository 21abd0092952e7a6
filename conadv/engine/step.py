"""One training step in named phases: gradient, prepare, wait, update.

    gradient    g_t = d/dtheta mean over views of L(theta_t; view); launches its sum over the ranks
    prepare     B_{t + tau} is attacked at theta_t, or at a prediction, beside that sum
    wait        all ranks have g_t
    update      theta_{t + 1} = optimizer(theta_t, g_t)

Executors order the phases (conadv.engine.executors); the method says what is computed
(conadv.methods). What a phase needs is a collaborator each: inputs, forward, gradient, attack_pass,
pending, lookahead, guard, stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conadv.attacks.loss import Loss, TrainedLoss
from conadv.attacks.space import PixelSpace
from conadv.distributed.clock import PhaseClock
from conadv.distributed.comm import Comm
from conadv.engine import check
from conadv.engine.attack_pass import AttackPass
from conadv.engine.executors import Executor, Inline, Served
from conadv.engine.forward import Network
from conadv.engine.gradient import GradientPass
from conadv.engine.guard import Guard, NonFiniteError
from conadv.engine.inputs import Inputs, RawBatch
from conadv.engine.lookahead import LookAhead
from conadv.engine.numerics import DEFAULT, Numerics
from conadv.engine.pending import Expected, Pending
from conadv.engine.stop import StopRequest
from conadv.engine.validate import check_count, check_keys
from conadv.errors import ConadvError
from conadv.nn.buffers import state_left_alone
from conadv.types import Attack, Batch, ExtraBatch, Method, MicroBatch, Schedule, StepRecord


class _CleanOnly(Method):
    """No extra images: what :class:`conadv.Vanilla` is by name."""

    route: ClassVar[str | None] = None


class TrainStep:
    """Training of ``model`` by ``method``, one step per call.

        step = TrainStep(model, optimizer, Concurrent(FGSM(4 / 255, space=space), staleness=1))
        for batch, future in windows(loader, step.ahead):
            record = step(batch, future)

    A batch is a ``(x_NCHW, y_N)`` pair, or a :class:`conadv.types.Batch` with further views and
    micro-batches. A step minimises the weighted mean over views of L(theta; view), each view
    through its own batch-norm route. Instead of calling the step as a whole, a loop of one's own
    may call its phases: ``gradient(batch)`` in place of ``loss.backward()``, ``prepare(future)``
    anywhere before the weights change, ``wait()`` for the other ranks, and ``update()``, or its own
    ``optimizer.step()`` followed by ``advance()``.

    Args:
        model: with a route for every view (:func:`conadv.split_batchnorm`).
        optimizer: over all trainable parameters of the model.
        method: what joins the clean view; by default nothing does.
        loss: (output, y_N) -> mean over N, a scalar; cross-entropy by default. Attacks ascend it
            too (:class:`conadv.attacks.loss.TrainedLoss`).
        lr_at: the schedule; each update sets every group's learning rate by it.
        numerics: precision, clipping, non-finite numbers, memory formats, compilation.
        view_weights: weight of each view's loss, default 1.
        adv_route: the batch-norm route of the extra view: "adv", or "clean" for no route of its
            own. Views that share a route go one pass each, so that each is normalised by its own
            batch.
        space: the model's normalisation, for uint8 images and uint8 pending; default: the method's.
        seed: keys every random draw, in the model (dropout) as in attacks; global generators are
            left as they were.
        comm: this process among several ranks; default: alone, which is an error inside a process
            group of several.
        executor: the order of the phases; default :class:`Inline`.

    Raises ConadvError where the model has batch norm without the routes that the views need, and
    where there is a process group of several ranks but no ``comm``.
    Ranks: each holds its share of the global batch and the same weights, which construction takes
    from rank 0. Gradients and losses are averaged over the global batch; batch statistics and
    images that wait stay local.
    In flight: from the last backward pass of ``gradient`` to ``wait`` the gradients' buckets are on
    the network.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Method | None = None,
        *,
        loss: Loss = F.cross_entropy,
        lr_at: Schedule | None = None,
        numerics: Numerics = DEFAULT,
        view_weights: Mapping[str, float] | None = None,
        adv_route: str = "adv",
        space: PixelSpace | None = None,
        seed: int = 0,
        comm: Comm | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, TrainedLoss(loss)
        self.method = _CleanOnly() if method is None else method
        check.check_kinds(model, optimizer, self.method)
        self.device = next(model.parameters()).device
        self.comm = comm or check.alone(self.device)
        self.space = check.one_space(space, self.method.space)
        self.view_weights = check.checked_weights(view_weights or {})
        check.check_model(model, self.method, adv_route, self.comm.ranks)
        check.check_optimizer(optimizer, model, scheduled=lr_at is not None)
        self.executor = executor or Inline()

        self.version = 0
        self.clock = PhaseClock(self.device)
        self.pending = Pending(self.space, numerics.pending_dtype)
        self.stop = 0  # what all ranks agreed on in the last step
        self.stop_request = StopRequest(self.comm.ranks)
        self.inputs = inputs = Inputs(self.space, next(model.parameters()), numerics.channels_last)
        replace = self.method.mix == "replace"
        self.network = network = Network(model, adv_route, numerics, replace=replace)
        statistics = self.method.attack_statistics
        self.attacks = AttackPass(network, inputs, self.loss, seed, statistics)
        weights, stop = self.view_weights, self.stop_request
        self.gradients = GradientPass(network, inputs, self.loss, weights, seed, self.comm, stop)
        self.gradients.replace = replace and not self.method.reads_fewer
        self._lr_at, self._guard = lr_at, Guard(model, numerics)
        # An attack rank is sent predicted weights; it has no optimizer state to predict them from.
        looks_ahead = self.method.lookahead and not self.executor.attack_only
        self._lookahead = LookAhead(model, optimizer, lr_at) if looks_ahead else None
        self._batch: Batch | None = None  # of the gradient that has not been applied yet
        self._gradient_version: int | None = None
        self._prepared: int | None = None  # the version at which a future batch was attacked
        self._begun: int | None = None  # the version whose step has begun
        self._trained = check.trained(model, optimizer)
        self._extra_version: int | None = None
        self._epoch = 0
        if self.comm.ranks > 1:
            self.comm.broadcast([*model.parameters(), *model.buffers()])
        self.executor.attach(self)

    @property
    def ahead(self) -> int:
        """How far ahead of the batch the ``future`` batch is; 0 if the method needs none."""
        return self.method.ahead

    def __call__(self, batch: RawBatch, future: RawBatch | None = None) -> StepRecord:
        """Run one step and update the weights. Sync point: reads the losses back."""
        return self.executor(self, self._as_batch(batch), self._as_future(future))

    # ---- phases

    def begin(self) -> None:
        """The first thing in a step; :meth:`gradient` and :meth:`prepare` see to it themselves.

        Keeps the buffers that an update left out gives back, and those that the step's attacks see.
        """
        if self._begun != self.version:
            trained = check.trained(self.model, self.optimizer)
            if trained != self._trained:
                check.check_optimizer(self.optimizer, self.model, scheduled=self._lr_at is not None)
            self._trained, self._begun = trained, self.version
            self._guard.snapshot()
            self.attacks.begin()

    def gradient(self, batch: RawBatch) -> dict[str, Tensor]:
        """Forward and backward of all views; adds to ``.grad`` and returns each view's loss.

        ``.grad`` holds the gradient of the mean over the global batch, with several ranks only
        after :meth:`wait`; on one rank a second call before the update adds to it. The losses are
        means over this rank's images.
        """
        batch, method = self._as_batch(batch), self.method
        self._check_cleared()
        self.begin()
        self._gradient_version, self._batch, self._epoch = self.version, batch, batch.epoch
        self.comm.at("gradient", self.version)
        # What the step needs now, on the critical path; what it needs later is prepare()'s.
        with self.clock.phase("attack"):
            extra = method.extra_view(self, batch)
        self._extra_version = None if extra is None else extra.weight_version
        scale, input_grad = self._guard.factor, method.needs_input_gradient
        with self.clock.phase("gradient"):
            clean = self.gradients.run(batch, extra, scale, input_grad=input_grad)
        if method.two_gradients:
            self._second_gradient(batch, extra)
        if input_grad:  # these gradients are this rank's own: no sum over ranks is needed
            with self.clock.phase("attack"):
                grads = [x.grad for x in clean if x.grad is not None]
                method.on_input_grad(self, batch, [x.detach() for x in clean], grads)
        return self.gradients.losses

    def prepare(self, future: RawBatch | None, *, early: bool = False) -> None:
        """The method's work for a later step, at the present weights; nothing for most methods.

        ``early``: before the step's gradient, not after it; the images are the same.
        Raises ConadvError after the update: the images would be attacked at other weights and for
        another step.
        """
        if future is not None and self._gradient_version != self.version and not early:
            raise ConadvError(
                "prepare(future) belongs between gradient(batch) and the update of the same step."
            )
        if future is not None and self._prepared == self.version:
            raise ConadvError(
                "prepare(future) was called twice in one step, for one place. Call it once; give "
                "several micro-batches as one conadv.Batch."
            )
        self.comm.at("attack", self.version)
        self.begin()
        self._prepared = self.version if future is not None else None
        with self.clock.phase("attack"):
            self.method.prepare(self, self._as_future(future))
            self.snapshot()

    def wait(self) -> None:
        """Wait until gradients and losses are summed over the ranks."""
        if self.gradients.busy:
            self.comm.at("wait", self.version)
            with self.clock.phase("wait"):
                self.gradients.wait(self.clock)

    def update(self) -> StepRecord:
        """Check for finite numbers, set the learning rate, unscale, clip, update, clear.

        Waits for the other ranks first if nobody has. Ranks: all see the same sums, so all make the
        update or none.
        Raises NonFiniteError, or leaves the update out and says so in the record
        (``on_nonfinite``).
        """
        self.wait()
        self.comm.at("update", self.version)
        with self.clock.phase("update"):
            loss, losses, grad_norm = self._read_back()
            skipped = self._judge(losses, grad_norm)
            if self._lr_at is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] = self._lr_at(self.version)
            lr = float(self.optimizer.param_groups[0]["lr"])
            if skipped is None:  # otherwise the step counts as an update by zero
                self.optimizer.step()
            record = StepRecord(self.version, self._epoch, lr, loss, losses, grad_norm)
            record.weight_version, record.skipped = self._extra_version, skipped
            self._count_update()
            self.optimizer.zero_grad(set_to_none=True)
        record.phases, record.spans, record.seconds = self.clock.collect()
        return record

    def advance(self) -> None:
        """Count a new weight version; for loops with an ``optimizer.step()`` of their own."""
        if self.gradients.busy:
            raise ConadvError(
                "Call wait() before optimizer.step(): gradients were still being summed over the "
                "ranks."
            )
        if self._guard.scale is not None:
            raise ConadvError(
                "In fp16 gradients carry the loss scale: call update(), not optimizer.step()."
            )
        self._count_update()
        # There is no record to put the phases in, and CUDA events would pile up.
        self.clock.discard()

    def serve(self, batches: Iterable[Batch], served: Served | None = None) -> None:
        """On an attack rank: attack ``batches`` for the learners until either ends.

        ``batches``: this rank's micro-batches of step ``ahead`` after the learners' first, and of
        those that follow.
        ``served`` hears of each batch: its step and spans.
        """
        self.executor.serve(batches, served)

    # ---- what methods and executors use

    def images(self, micro: MicroBatch, view: str) -> Tensor:
        """A view's images in model space on the model's device, (N, C, H, W)."""
        return self.inputs.images(micro, view)

    def labels(self, micro: MicroBatch) -> Tensor:
        return self.inputs.labels(micro)

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that training changes, by name."""
        return self.network.trainable()

    def attack_batch(
        self, attack: Attack, batch: Batch, weights: Mapping[str, Tensor] | None = None
    ) -> ExtraBatch:
        """Run ``attack`` on the clean view, at the present weights or at ``weights``."""
        return self.attacks.attack_batch(self.method, attack, batch, weights, self.version)

    def attack_state(self) -> dict[str, Tensor]:
        """What an attack of this step on another rank reads of the model, by name."""
        return {**self.trainable(), **self.attacks.buffers()}

    def predicted_weights(self, num_steps: int) -> Mapping[str, Tensor]:
        """Look-ahead weights for ``num_steps`` updates from now; valid until the next call."""
        assert self._lookahead is not None
        return self._lookahead.predict(self.version, num_steps)

    def snapshot(self) -> None:
        """For executors: once per step, between the attack and the update."""
        # After the attack: a predictor without momentum writes its prediction over this memory.
        if self._lookahead is not None:
            self._lookahead.snapshot()

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model's and the optimizer's state.

        Takes in what attack ranks have under way first: the state does not depend on the executor.
        """
        self.executor.settle()
        # Weights and optimizer state are the caller's to save: torch has formats for those.
        return {
            "version": self.version,
            "pending": self.pending.state_dict(),
            "lookahead": self._lookahead.state_dict() if self._lookahead else {},
            "guard": self._guard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], images: Expected | None = None) -> None:
        """Go on from a saved state. Raises ConadvError where it is none of this engine.

        ``images``: what those that wait must look like, for a state that somebody else may have
        written.
        """
        check_keys(state, ("version", "pending", "lookahead", "guard"), "its engine")
        self.version = check_count(state["version"], "its engine's version")
        self._begun = self._prepared = None
        self.attacks.end()
        if images is not None:
            images.check(state["pending"], self.version, self.pending.dtype)
        self.pending.load_state_dict(state["pending"], self.device)
        self._guard.load_state_dict(state["guard"])
        if self._lookahead is None:
            check_keys(state["lookahead"], (), "its look-ahead")
        else:
            self._lookahead.load_state_dict(state["lookahead"])

    # ---- internals

    def _as_batch(self, raw: RawBatch) -> Batch:
        return self.inputs.as_batch(raw, self.version, self.comm.rank)

    def _as_future(self, raw: RawBatch | None) -> Batch | None:
        step, rank = self.version + self.ahead, self.comm.rank
        return None if raw is None else self.inputs.as_batch(raw, step, rank)

    def _check_cleared(self) -> None:
        why = "on several ranks" if self.comm.ranks > 1 else ""
        why = "of a method with two gradients" if self.method.two_gradients else why
        if why and any(p.grad is not None for p in self.model.parameters()):
            raise ConadvError(
                f"gradient() {why} starts from cleared gradients: what is there already would be "
                "counted twice. Call it once per update, and optimizer.zero_grad() after an "
                "optimizer.step() of your own."
            )

    def _second_gradient(self, batch: Batch, extra: ExtraBatch | None) -> None:
        """Have the method replace the gradient of the global batch by another."""
        self.wait()
        self.comm.at("gradient", self.version)
        first = [p.grad for p in self.trainable().values() if p.grad is not None]

        def again() -> None:
            with torch.enable_grad(), state_left_alone(self.model):
                self.gradients.run(batch, extra, self._guard.factor, record=False)

        with self.clock.phase("gradient"):
            self.method.second_gradient(self, self.gradients.norm(first), again)

    def _all_gradients(self) -> list[Tensor]:
        params = (p for group in self.optimizer.param_groups for p in group["params"])
        return [p.grad for p in params if p.grad is not None]

    def _read_back(self) -> tuple[float, dict[str, float], float]:
        """The loss, each view's, and the norm of the unscaled gradient. Takes in ``stop``."""
        passed, gradients = self.gradients, self._all_gradients()
        if not passed.losses or not gradients:
            raise ConadvError("update() without gradient(): there is no gradient to apply.")
        requests = [] if passed.requests is None else [passed.requests]
        values = [*passed.losses.values(), passed.norm(gradients), *requests]
        read = torch.stack(values).tolist()  # sync point
        stop = self.stop_request
        self.stop = stop.decoded(read[-1]) if requests else stop.mine()
        losses = dict(zip(passed.losses, read, strict=False))
        weights = {view: float(weight) for view, weight in passed.weights.items()}
        loss = sum(weights[view] * value for view, value in losses.items())
        grad_norm = read[len(losses)] / self._guard.factor
        return loss / sum(weights.values()), losses, grad_norm

    def _judge(self, losses: Mapping[str, float], grad_norm: float) -> str | None:
        """Unscale and clip the gradient for an update; or undo the step and say why."""
        factor = self._guard.factor  # judging may change it, for the next step
        try:
            skipped = self._guard.judge(self.version, losses, grad_norm)
        except NonFiniteError as error:
            assert self._batch is not None
            self.optimizer.zero_grad(set_to_none=True)  # whoever goes on starts from none
            self._prepared = None
            cause = self.inputs.likely_cause(self._batch, self.comm)
            raise NonFiniteError(f"{error} {cause}") from None
        if skipped is None:
            if (multiplier := self._guard.multiplier(factor, grad_norm)) != 1.0:
                torch._foreach_mul_(self._all_gradients(), multiplier)
            return None
        self._guard.restore()
        if self.method.needs_input_gradient:  # made of a gradient that is as bad as the rest
            self.pending.pop(self.version + 1)
        return skipped

    def _count_update(self) -> None:
        self.version += 1
        self._gradient_version = self._batch = None
        self.attacks.end()
