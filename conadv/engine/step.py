"""One training step in named phases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from conadv import rng
from conadv.attacks.space import PixelSpace
from conadv.distributed.clock import PhaseClock
from conadv.distributed.comm import Comm
from conadv.distributed.handle import Handle
from conadv.distributed.reducer import GradientReducer
from conadv.engine.executors import Executor, Inline, Served
from conadv.engine.guard import Guard, NonFiniteError
from conadv.engine.lookahead import LookAhead
from conadv.engine.pending import Expected, Pending
from conadv.engine.precision import LossScale, amplify, autocast, low_type
from conadv.engine.stop import TERMINATE
from conadv.engine.validate import check_count, check_keys
from conadv.errors import ConadvError, unknown
from conadv.methods.base import Method
from conadv.methods.vanilla import Vanilla
from conadv.nn import split_batchnorm as norm
from conadv.types import Attack, Batch, ExtraBatch, Forward, MicroBatch, Schedule, StepRecord

RawBatch = Batch | Sequence[Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class TrainStep:
    """Training of ``model`` by ``method``, one step per call.

        step = TrainStep(model, optimizer, Concurrent(FGSM(4 / 255, space=space), staleness=1))
        for batch, future in windows(loader, step.ahead):
            record = step(batch, future)

    A batch is a ``(x_NCHW, y_N)`` pair, or a :class:`conadv.types.Batch` with further views and micro-batches. A step
    minimises the weighted mean over views of L(theta; view), each view through its own batch-norm route.
    Instead of calling the step as a whole, a loop of one's own may call its phases: ``gradient(batch)`` in place of
    ``loss.backward()``, ``prepare(future)`` anywhere before the weights change, ``wait()`` for the other ranks, and
    ``update()``, or its own ``optimizer.step()`` followed by ``advance()``.

    Args:
        model: with a route for every view (:func:`conadv.split_batchnorm`).
        optimizer: over all trainable parameters of the model.
        method: what joins the clean view; default :class:`conadv.Vanilla`.
        loss: (logits_NK, y_N) -> mean over N; cross-entropy by default.
        adv_route: the batch-norm route of the extra view: "adv", or "clean" for no route of its own. Views that
            share a route go one pass each, so that each is normalised by its own batch.
        view_weights: weight of each view's loss, default 1.
        space: the model's normalisation, for uint8 images and uint8 pending; default: the method's.
        precision: "fp32"; "bf16" or "fp16" for autocast, fp16 with a loss scale (:class:`conadv.engine.precision.LossScale`).
        clip_norm: :meth:`update` scales the gradient, after unscaling, down to this norm; None does not.
        on_nonfinite, nonfinite_limit: what :meth:`update` does when a loss or gradient is infinite or NaN: "stop"
            raises NonFiniteError, "skip" leaves the update out, at most so many times in a row (:class:`Guard`).
        channels_last: the memory format of images (that of the model is the caller's).
        pending_dtype: how images wait, see :class:`Pending`; None keeps their own type.
        lr_at: the schedule; each update sets every group's learning rate by it.
        fuse_views: all views of a micro-batch in one forward pass, or one pass per view; equal up to rounding.
            Default: one pass on CUDA (fewer, larger kernels), one per view on the CPU, where a smaller batch stays
            in caches and needs less memory (docs/experiments.md).
        seed: keys every random draw, in the model (dropout) as in attacks; global generators are left as they were.
        executor: the order of the phases; default :class:`Inline`.
        comm: this process among several ranks; default: alone, which is an error inside a process group of several.
        compile: run the network through torch.compile, without graph breaks (an error otherwise): one graph for each
            route and for the attack, none after that. Gradients are then there all at once, so their sums over ranks
            overlap the attack but no longer backward.
        bucket_mib: size of the buckets in which gradients are summed over ranks, in MiB.

    Raises ConadvError where the model has batch norm without the routes that the views need, and where there is a
    process group of several ranks but no ``comm``.
    Ranks: each holds its share of the global batch and the same weights, which construction takes from rank 0.
    Gradients and losses are averaged over the global batch; batch statistics and images that wait stay local.
    In flight: from the last backward pass of ``gradient`` to ``wait`` the gradients' buckets are on the network.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: Method | None = None,
        *,
        loss: Loss = F.cross_entropy,
        adv_route: str = "adv",
        view_weights: Mapping[str, float] | None = None,
        space: PixelSpace | None = None,
        precision: str = "fp32",
        clip_norm: float | None = None,
        on_nonfinite: str = "stop",
        nonfinite_limit: int = 10,
        channels_last: bool = False,
        pending_dtype: str | None = None,
        lr_at: Schedule | None = None,
        fuse_views: bool | None = None,
        seed: int = 0,
        executor: Executor | None = None,
        comm: Comm | None = None,
        bucket_mib: float = 25.0,
        compile: bool = False,
    ) -> None:
        self.model = model
        self._compiled = compile
        self._network: Any = (
            torch.compile(model, fullgraph=True, dynamic=False) if compile else model
        )
        self.optimizer = optimizer
        self.method = method or Vanilla()
        self.loss = loss
        self.view_weights = _checked_weights(view_weights or {})
        self.space = _one_space(space, self.method.space)
        self.device = next(model.parameters()).device
        self.pending = Pending(self.space, pending_dtype)
        self.clock = PhaseClock(self.device)
        self.version = 0
        self._lr_at = lr_at
        self._seed = seed
        self._low = low_type(precision)
        self._clip_norm = clip_norm
        self._guard = Guard(
            model, on_nonfinite, nonfinite_limit, LossScale() if precision == "fp16" else None
        )
        self.stop_request: Callable[[], int] | None = None
        """Asked once per step whether this rank wants to stop (see conadv.training.signals); the answer is ``stop`` of all."""
        self.stop = 0
        self._heard = 0
        self._requests: Tensor | None = None
        self._batch: Batch | None = None
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._fuse_views = self.device.type == "cuda" if fuse_views is None else fuse_views
        self.executor = executor or Inline()
        self._lookahead: LookAhead | None = None
        if getattr(self.method, "lookahead", False) and not self.executor.attack_only:
            self._lookahead = LookAhead(model, optimizer, lr_at)
        self.comm = comm or _alone(self.device)
        self._reducer: GradientReducer | None = None
        self._loss_sum: Handle | None = None
        self._losses: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}  # of this step's views
        self._extra_version: int | None = None
        self._epoch = 0
        self._adv_route = adv_route
        self._has_batchnorm = norm.has_batchnorm(model)
        self._fuse_views &= adv_route == "adv" or not self._has_batchnorm
        self._has_routes = bool(norm.routes_of(model))
        self._gradient_version: int | None = None
        self._images_checked = False
        self._check_model()
        if self.comm.ranks > 1:
            self.comm.broadcast([*model.parameters(), *model.buffers()])
            self._reducer = GradientReducer(self.comm, model, bucket_mib)
        self.executor.attach(self)

    @property
    def ahead(self) -> int:
        """How far ahead of the batch the ``future`` batch is; 0 if the method needs none."""
        return self.method.ahead

    def __call__(self, batch: RawBatch, future: RawBatch | None = None) -> StepRecord:
        """Run one step and update the weights. Sync point: the losses are read back before the update."""
        ahead = None if future is None else self._as_batch(future, self.version + self.ahead)
        return self.executor(self, self._as_batch(batch, self.version), ahead)

    @property
    def views_fused(self) -> bool:
        """Whether all views of a micro-batch are in one forward pass."""
        return self._fuse_views

    # ---- phases

    def gradient(self, batch: RawBatch) -> dict[str, Tensor]:
        """Forward and backward of all views of all micro-batches; adds to ``.grad``. Returns the loss of each view.

        ``.grad`` holds the gradient of the mean over the global batch, with several ranks only after :meth:`wait`; on
        one rank a second call before the update adds to it. The losses are means over this rank's images.
        """
        batch = self._as_batch(batch, self.version)
        self._check_cleared()
        if self._gradient_version != self.version:
            self._guard.remember()
        self._gradient_version, self._batch = self.version, batch
        self.comm.at("gradient", self.version)
        with self.clock.phase("attack"):
            extra = self.method.extra(self, batch)
        self._extra_version = None if extra is None else extra.weight_version
        self._epoch = batch.epoch
        with self.clock.phase("gradient"):
            inputs, self._losses = self._gradient(batch, extra)
        if radius := self.method.ascent_radius:
            self._gradient_uphill(batch, extra, radius)
        if self.method.needs_input_gradient:
            with self.clock.phase("attack"):
                self.method.absorb(
                    self, batch, [x.detach() for x in inputs], [_gradient_of(x) for x in inputs]
                )
        return self._losses

    def prepare(self, future: RawBatch | None, *, early: bool = False) -> None:
        """The method's work for a later step, at the present weights; nothing for most methods.

        ``early``: before the step's gradient, not after it; the images are the same.
        Raises ConadvError after the update: the images would be attacked at other weights and for another step.
        """
        if future is not None and self._gradient_version != self.version and not early:
            raise ConadvError(
                "prepare(future) belongs between gradient(batch) and the update of the same step."
            )
        self.comm.at("attack", self.version)
        with self.clock.phase("attack"):
            self.method.prepare(
                self, None if future is None else self._as_batch(future, self.version + self.ahead)
            )
            self.remember()

    def serve(self, batches: Iterable[Batch], served: Served | None = None) -> None:
        """On an attack rank: attack ``batches`` for the learners until either ends, see conadv.engine.attack_ranks.executor.

        ``batches``: this rank's micro-batches of step ``ahead`` after the learners' first, and of those that follow.
        ``served`` hears of each batch: its step and spans.
        """
        self.executor.serve(batches, served)

    def remember(self) -> None:
        """Once per step, after the attack's weights were taken and before the update; for executors."""
        if self._lookahead is not None:
            self._lookahead.remember()

    def wait(self) -> None:
        """Wait until gradients and losses are summed over the ranks; on one rank there is nothing to wait for."""
        if self._reducer is None or not self._reducer.busy:
            return
        self.comm.at("wait", self.version)
        with self.clock.phase("wait"):
            self._reducer.wait(self.clock)
            if self._loss_sum is not None:
                sums = self._loss_sum.wait()
                self._losses = dict(
                    zip(self._losses, (sums[:-1] / self.comm.ranks).unbind(), strict=True)
                )
                self._requests = sums[-1]
        self._loss_sum = None

    def update(self) -> StepRecord:
        """Check that loss and gradient are finite, set the learning rate, unscale, clip, update, clear the gradients.

        Waits for the other ranks first if nobody has. Ranks: all see the same sums, so all make the update or none.
        Raises NonFiniteError, or leaves the update out and says so in the record (``on_nonfinite``).
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
            step, made_at = self.version, self._extra_version
            if skipped is None:
                self.optimizer.step()
            self._count_update()
            self.optimizer.zero_grad(set_to_none=True)
        phases, spans, seconds = self.clock.collect()
        record = StepRecord(
            step, self._epoch, lr, loss, losses, grad_norm, made_at, phases, seconds, spans
        )
        record.skipped = skipped
        return record

    def advance(self) -> None:
        """Count a new weight version; for loops that call their own ``optimizer.step()`` instead of :meth:`update`."""
        if self._reducer is not None and self._reducer.busy:
            raise ConadvError(
                "Call wait() before optimizer.step(): gradients were still being summed over the ranks."
            )
        if self._guard.scale is not None:
            raise ConadvError(
                "In fp16 gradients carry the loss scale: call update(), not optimizer.step()."
            )
        self._count_update()
        self.clock.discard()  # there is no record to put the phases in, and CUDA events would pile up

    def _count_update(self) -> None:
        self.version += 1
        self._gradient_version = self._batch = None

    # ---- what methods use

    def images(self, micro: MicroBatch, view: str) -> Tensor:
        """A view's images in model space on the model's device, (N, C, H, W)."""
        if view not in micro.views:
            raise ConadvError(
                f"The method {type(self.method).__name__} needs a view {view!r} in every batch."
            )
        x = micro.views[view].to(self.device, non_blocking=True)
        if x.dtype == torch.uint8:
            x = self.space.normalize(x)
        return x.contiguous(memory_format=self._format) if x.dim() == 4 else x

    def example(self, micro: MicroBatch) -> Tensor:
        """A tensor on the meta device like the clean view's images in model space."""
        x = micro.views["clean"].to("meta")
        x = self.space.normalize(x) if x.dtype == torch.uint8 else x
        return x.contiguous(memory_format=self._format) if x.dim() == 4 else x

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def labels(self, micro: MicroBatch) -> Tensor:
        return micro.y_N.to(self.device, non_blocking=True)

    def craft(
        self, attack: Attack, batch: Batch, weights: Mapping[str, Tensor] | None = None
    ) -> ExtraBatch:
        """Run ``attack`` on the clean view of every micro-batch at the present or given weights.

        Running statistics are left alone; modes, ``requires_grad`` and ``.grad`` of the model are untouched, and so
        are the global random generators. The method says how many images, on which route.
        """
        images, method = [], self.method
        labels = [
            self.labels(micro)[: method.num_attacked(len(micro.y_N))] for micro in batch.micro
        ]
        if not self._images_checked:
            self.space.check(self.images(batch.micro[0], "clean"))
            self._images_checked = True
        for micro, y_N in zip(batch.micro, labels, strict=True):
            with self.attack_pass(
                "attack",
                batch.step,
                micro.index,
                weights=weights,
                route=method.attack_route,
                running=method.attack_statistics == "running",
            ) as (forward, draws):
                images.append(attack(forward, self.images(micro, "clean")[: len(y_N)], y_N, draws))
        return ExtraBatch(tuple(images), tuple(labels), self.version)

    @contextmanager
    def attack_pass(
        self,
        *path: str | int,
        weights: Mapping[str, Tensor] | None = None,
        route: str = "adv",
        running: bool = False,
    ) -> Iterator[tuple[Forward, torch.Generator]]:
        """The mode in which attacks see the model: yields (x_NCHW -> logits_NK, the generator of the attack's draws).

        On the route of the view ``route``, with batch statistics, or the ``running`` ones, which are left alone either
        way, at the present or given weights. ``path`` keys the draws of the attack and of the model (dropout); outside
        of the block nothing has changed.
        """
        draws = rng.generator(self.device, self._seed, *path)
        statistics = norm.running_stats if running else norm.frozen_stats
        with (
            rng.scope(self.device, self._seed, *path),
            self._route(self._route_of(route)),
            statistics(self.model),
        ):
            yield self._forward(weights), draws

    def predicted_weights(self, num_steps: int) -> Mapping[str, Tensor]:
        """Look-ahead weights for ``num_steps`` updates from now; valid until the next call."""
        assert self._lookahead is not None
        return self._lookahead.predict(self.version, num_steps)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model's and the optimizer's state.

        Takes in what attack ranks have under way first: the state does not depend on the executor.
        """
        self.executor.settle()
        ahead = self._lookahead.state_dict() if self._lookahead else {}
        pending, guard = self.pending.state_dict(), self._guard.state_dict()
        return {"version": self.version, "pending": pending, "lookahead": ahead, "guard": guard}

    def load_state_dict(self, state: dict[str, Any], images: Expected | None = None) -> None:
        """Go on from a saved state. Raises ConadvError where it is none of this engine.

        ``images``: what those that wait must look like, for a state that somebody else may have written.
        """
        check_keys(state, ("version", "pending", "lookahead", "guard"), "its engine")
        self.version = check_count(state["version"], "its engine's version")
        if images is not None:
            images.check(state["pending"], self.version, self.pending.dtype)
        self.pending.load_state_dict(state["pending"], self.device)
        self._guard.load_state_dict(state["guard"])
        if self._lookahead is not None:
            self._lookahead.load_state_dict(state["lookahead"])
        else:
            check_keys(state["lookahead"], (), "its look-ahead")

    @property
    def has_updated(self) -> bool:
        """Whether there was an update for certain: not every step so far may have been left out."""
        return self._guard.scale is None and self.version > self._guard.in_a_row

    # ---- internals

    def _gradient(
        self, batch: Batch, extra: ExtraBatch | None, *, sum_losses: bool = True
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """All passes of a step; returns each micro-batch's clean images, and the losses on this rank."""
        totals: dict[str, Tensor] = {}
        inputs = [
            self._micro_gradient(batch, m, micro, extra, totals, sum_losses)
            for m, micro in enumerate(batch.micro)
        ]
        if self._reducer is not None:
            self._reducer.launch()
        return inputs, {name: total / len(batch.micro) for name, total in totals.items()}

    def _gradient_uphill(self, batch: Batch, extra: ExtraBatch | None, radius: float) -> None:
        """Replace the gradient g by that at theta + radius g / |g|; leaves theta with the bits that it had."""
        self.wait()  # g is the gradient of the global batch
        self.comm.at("gradient", self.version)
        with self.clock.phase("gradient"), torch.no_grad():
            params: list[Tensor] = [p for p in self.model.parameters() if p.grad is not None]
            gradients = [p.grad for p in params if p.grad is not None]
            kept = [p.detach().clone() for p in params]
            torch._foreach_mul_(gradients, radius / self._norm(gradients).clamp_min(1e-12))
            torch._foreach_add_(params, gradients)
            for p in params:
                p.grad = None
            try:
                with torch.enable_grad(), norm.frozen_stats(self.model):
                    self._gradient(batch, extra, sum_losses=False)
            finally:  # gradients may still be on the network, but nothing needs these weights any more
                torch._foreach_copy_(params, kept)

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        total: Tensor = (
            self._reducer.norm(gradients)
            if self._reducer
            else torch.nn.utils.get_total_norm(gradients)
        )
        return total

    def _micro_gradient(
        self,
        batch: Batch,
        m: int,
        micro: MicroBatch,
        extra: ExtraBatch | None,
        totals: dict[str, Tensor],
        sum_losses: bool,
    ) -> Tensor:
        """Backward of one micro-batch; adds its losses to ``totals`` and returns the clean images that it used."""
        clean, views = self._views(m, micro, extra)
        path = ("gradient", batch.step, micro.index)
        # per image: a view of fewer images, such as a share that is attacked, weighs less
        self._weights = {
            name: self._weight(name) * (len(y) / len(micro.y_N)) for name, (_, y) in views.items()
        }
        share = self._scale / (len(batch.micro) * self.comm.ranks * sum(self._weights.values()))
        passes = [views] if self._fuse_views else [{name: view} for name, view in views.items()]
        for together in passes:
            last = m == len(batch.micro) - 1 and together is passes[-1]
            if self._reducer is not None and last:
                self._reducer.last_pass(tuple(views))
            # route and randomness also cover backward: activation checkpointing runs forward again there
            with (
                rng.scope(self.device, self._seed, *path, *together),
                self._route(self._route_spec(together)),
            ):
                losses = self._forward_views(together)
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0.0) + loss.detach()
                if (
                    self._reducer is not None and last and sum_losses
                ):  # before the large messages, not behind them
                    means = torch.stack(list(totals.values())) / len(batch.micro)
                    request = means.new_full((1,), self._encoded_request())
                    self._loss_sum = self.comm.all_reduce_async(torch.cat([means, request]))
                # the factors go in as gradients of the losses: no arithmetic of their own, in forward or backward
                factors = [
                    torch.full_like(loss, share * self._weights[name])
                    for name, loss in losses.items()
                ]
                torch.autograd.backward(list(losses.values()), factors)
        return clean

    def _check_cleared(self) -> None:
        why = "on several ranks" if self._reducer is not None else ""
        why = "of sharpness-aware minimisation" if self.method.ascent_radius else why
        if why and any(p.grad is not None for p in self.model.parameters()):
            raise ConadvError(
                f"gradient() {why} starts from cleared gradients: what is there already would be counted twice. "
                "Call it once per update, and optimizer.zero_grad() after an optimizer.step() of your own."
            )

    def _forward_views(self, views: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The loss of each view, from one forward pass."""
        images = [x for x, _ in views.values()]
        with self._autocast():
            logits = self._call(torch.cat(images) if len(images) > 1 else images[0])
        if self._low is not None:
            logits = logits.float()
        parts = logits.split([len(y) for _, y in views.values()]) if len(views) > 1 else [logits]
        return {
            name: self.loss(part, y)
            for part, (name, (_, y)) in zip(parts, views.items(), strict=True)
        }

    def _call(self, x_NCHW: Tensor) -> Tensor:
        try:
            logits: Tensor = self._network(x_NCHW)
        except Exception as error:
            if not (self._compiled and type(error).__module__.startswith("torch._dynamo")):
                raise
            raise _not_compiled(error) from error
        return logits

    def _views(
        self, m: int, micro: MicroBatch, extra: ExtraBatch | None
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        y_N = self.labels(micro)
        clean = self.images(micro, "clean")
        if self.method.needs_input_gradient:
            clean = clean.detach().requires_grad_()
        views = {"clean": (clean, y_N)}
        if "aug" in micro.views:
            views["aug"] = (self.images(micro, "aug"), y_N)
        if extra is not None:
            views["adv"] = (extra.images[m], extra.labels[m])
        return clean, views

    def _weight(self, view: str) -> float:
        return self.view_weights.get(view, 1.0)

    def _forward(self, weights: Mapping[str, Tensor] | None) -> Callable[[Tensor], Tensor]:
        def forward(x_NCHW: Tensor) -> Tensor:
            with self._autocast():
                if self._compiled:
                    logits: Tensor = torch.func.functional_call(self._network, fixed, (x_NCHW,))
                elif weights is None:
                    logits = self.model(x_NCHW)
                else:
                    logits = torch.func.functional_call(self.model, dict(weights), (x_NCHW,))
            return amplify(logits, self._low)

        # A compiled backward pass computes all gradients that its graph has, asked for or not: the attack's graph gets
        # weights that need none, the same graph for present and other weights.
        now = self.trainable() if self._compiled and weights is None else weights
        fixed = {f"_orig_mod.{name}": w.detach() for name, w in (now or {}).items()}
        return forward

    def _route_of(self, view: str) -> str:
        return self._adv_route if view == "adv" else view

    def _route_spec(self, views: Mapping[str, tuple[Tensor, Tensor]]) -> norm.RouteSpec:
        """One route's name, or the number of images of each in the order of the batch."""
        if len(views) > 1 and self._has_batchnorm:
            return {self._route_of(name): len(y) for name, (_, y) in views.items()}
        return self._route_of(next(iter(views)))

    def _route(self, spec: norm.RouteSpec) -> AbstractContextManager[None]:
        needed = self._has_routes or (self._has_batchnorm and spec != norm.CLEAN)
        return norm.route(self.model, spec) if needed else nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self._low)

    def _read_back(self) -> tuple[float, dict[str, float], float]:
        gradients = self._gradients()
        if not self._losses or not gradients:
            raise ConadvError("update() without gradient(): there is no gradient to apply.")
        requests = [] if self._requests is None else [self._requests]
        read = torch.stack(
            [*self._losses.values(), self._norm(gradients), *requests]
        ).tolist()  # sync point
        losses, grad_norm = (
            dict(zip(self._losses, read, strict=False)),
            read[len(self._losses)] / self._scale,
        )
        self.stop = self._decoded_request(read[-1]) if requests else self._request()
        weights = self._weights
        loss = sum(weights[name] * value for name, value in losses.items()) / sum(weights.values())
        return loss, losses, grad_norm

    def _gradients(self) -> list[Tensor]:
        return [
            p.grad
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]

    # ---- numbers that are not finite, scaling and clipping

    @property
    def _scale(self) -> float:
        return 1.0 if self._guard.scale is None else self._guard.scale.scale

    def _judge(self, losses: Mapping[str, float], grad_norm: float) -> str | None:
        """Unscale and clip the gradient if the update may be made; otherwise undo the step and say why."""
        scale = self._scale
        try:
            skipped = self._guard.judge(self.version, losses, grad_norm)
        except NonFiniteError as error:
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"{error} {self._likely_cause()}") from None
        if skipped is None:
            self._unscale_and_clip(scale, grad_norm)
            return None
        self._guard.restore()
        if self.method.needs_input_gradient:  # made of a gradient that is as bad as the rest
            self.pending.pop(self.version + 1)
        return skipped

    def _unscale_and_clip(self, scale: float, grad_norm: float) -> None:
        """One multiplication for both: the clip's threshold is for the gradient without the scale."""
        clip = 1.0 if self._clip_norm is None else min(1.0, self._clip_norm / (grad_norm + 1e-6))
        if (factor := clip / scale) != 1.0:
            torch._foreach_mul_(self._gradients(), factor)

    def _likely_cause(self) -> str:
        """What to do about a number that is not finite. Ranks: collective; all of them are here."""
        assert self._batch is not None
        views = sorted(self._batch.micro[0].views)
        bad = [
            any(not bool(self.images(m, v).isfinite().all()) for m in self._batch.micro)
            for v in views
        ]
        found = [
            view
            for view, flag in zip(views, self.comm.any(torch.tensor(bad)).tolist(), strict=True)
            if flag
        ]
        if found:
            return f"The images of the {found[0]} view hold infinite or NaN values: check the data."
        return "The images are finite: lower the learning rate, lengthen the warm-up, or clip (optim.clip_norm)."

    # ---- requests to stop: what all ranks want rides on the sum of the losses

    def hear(self, request: int) -> None:
        """Take in a request to stop from a rank that takes no part in the sum (an attack rank)."""
        self._heard = max(self._heard, request)

    def _request(self) -> int:
        return max(self._heard, self.stop_request() if self.stop_request is not None else 0)

    def _encoded_request(self) -> int:
        """A number whose sum over ranks tells what the strongest request was."""
        request = self._request()
        return self.comm.ranks + 1 if request == TERMINATE else request

    def _decoded_request(self, total: float) -> int:
        return TERMINATE if total > self.comm.ranks else int(total > 0)

    def _as_batch(self, raw: RawBatch, step: int) -> Batch:
        if isinstance(raw, Batch):
            if len({len(micro.y_N) for micro in raw.micro}) != 1:
                raise ConadvError(
                    "A batch needs micro-batches of one size: a step takes the mean of their means."
                )
            return raw
        if not (
            isinstance(raw, (tuple, list))
            and len(raw) == 2
            and all(isinstance(part, Tensor) for part in raw)
        ):
            raise ConadvError(
                f"A batch is a pair (images, labels) of tensors or a conadv.Batch, not {type(raw)}."
            )
        x_NCHW, y_N = raw
        return Batch(step, (MicroBatch(self.comm.rank, y_N, {"clean": x_NCHW}),))

    def _check_model(self) -> None:
        if isinstance(self.model, nn.DataParallel):
            raise ConadvError(
                "nn.DataParallel copies the model in every pass, which breaks routes. Use one process."
            )
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            raise ConadvError(
                "The model is wrapped in DistributedDataParallel. TrainStep sums gradients over ranks itself: pass the "
                "plain model (model.module) and comm=Comm.from_environment(), in place of init_process_group."
            )
        norm.check_sync(self.model, self.comm.ranks)
        if self._adv_route not in ("adv", "clean"):
            raise unknown("adv_route", self._adv_route, ("adv", "clean"))
        own = self.method.route if self._adv_route == "adv" else None
        norm.check_routes(self.model, [own] if own else [])
        rates = {float(group["lr"]) for group in self.optimizer.param_groups}
        if self._lr_at is not None and len(rates) > 1:
            raise ConadvError(
                f"lr_at sets one learning rate for all groups, which start with {sorted(rates)}."
            )
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        orphans = [
            name
            for name, p in self.model.named_parameters()
            if p.requires_grad and id(p) not in known
        ]
        if orphans:
            raise ConadvError(
                f"The optimizer does not have {len(orphans)} parameter(s), such as {orphans[0]!r}. "
                "Split the batch norm before you build the optimizer, and give it all parameters."
            )


def _checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if name not in ("clean", "aug", "adv"):
            raise unknown("view in view_weights", name, ("clean", "aug", "adv"))
        if not (weight > 0 and math.isfinite(weight)):
            raise ConadvError(f"view_weights[{name!r}] = {weight} must be above 0.")
    return dict(weights)


def _gradient_of(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def _alone(device: torch.device) -> Comm:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ConadvError(
            f"There is a process group of {dist.get_world_size()}, but TrainStep has no comm: every rank would train "
            "for itself. Pass comm=Comm.from_process_group(device), or comm=Comm(device=device) to mean just that."
        )
    return Comm(device=device)


def _not_compiled(error: Exception) -> ConadvError:
    if "RecompileLimit" in type(error).__name__:
        return ConadvError(
            "torch.compile has made as many graphs of this network as it keeps in a process "
            f"(torch._dynamo.config.recompile_limit): {str(error)[:300]} Give all micro-batches one shape, and call "
            "torch.compiler.reset() where an engine with another shape was there before."
        )
    return ConadvError(
        f"The network cannot be compiled as one graph: {str(error)[:500]}. Leave out compile, or change the network "
        "where torch names the break."
    )


def _one_space(given: PixelSpace | None, of_method: PixelSpace | None) -> PixelSpace:
    if given and of_method and given != of_method:
        raise ConadvError(
            f"The attack has {of_method}, the step {given}. Give the normalisation once."
        )
    return given or of_method or PixelSpace()
