"""The gradient of a step: forward and backward of all views of all micro-batches, summed over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from conadv import rng
from conadv.distributed.clock import PhaseClock
from conadv.distributed.comm import Comm
from conadv.distributed.handle import Handle
from conadv.distributed.reducer import GradientReducer
from conadv.engine.forward import Network
from conadv.engine.inputs import Inputs, Views
from conadv.engine.stop import StopRequest
from conadv.types import Batch, ExtraBatch, MicroBatch

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits_NK, y_N) -> mean over N."""


class GradientPass:
    """Adds d/dtheta of the weighted mean over views of L(theta; view) to ``.grad``.

    Ranks: after :meth:`wait` gradients and ``losses`` are means over the global batch.
    In flight: from the last backward pass of :meth:`run` to :meth:`wait` the gradients' buckets and the losses.
    """

    def __init__(
        self,
        network: Network,
        inputs: Inputs,
        loss: Loss,
        view_weights: Mapping[str, float],
        seed: int,
        comm: Comm,
        stop: StopRequest,
    ) -> None:
        self._network, self._inputs, self._loss = network, inputs, loss
        self._view_weights, self._seed = view_weights, seed
        self._comm, self._stop = comm, stop
        self.reducer = GradientReducer(comm, network.model) if comm.ranks > 1 else None
        self.losses: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}  # of this step's views, in the mean of their losses
        self.requests: Tensor | None = None  # sum over ranks of what they were asked for
        self._loss_sum: Handle | None = None

    def run(
        self, batch: Batch, extra: ExtraBatch | None, scale: float, input_grad: bool
    ) -> list[Tensor]:
        """All passes of a step; returns each micro-batch's clean images, with their gradient if ``input_grad``.

        ``scale``: factor on the gradient (fp16).
        """
        self.losses, images = self._passes(batch, extra, scale, input_grad, sum_losses=True)
        return images

    def run_again(self, batch: Batch, extra: ExtraBatch | None, scale: float) -> None:
        """The same at other weights: the recorded losses stay those of the first run."""
        self._passes(batch, extra, scale, input_grad=False, sum_losses=False)

    @property
    def busy(self) -> bool:
        """Whether gradients are on their way."""
        return self.reducer is not None and self.reducer.busy

    def wait(self, clock: PhaseClock) -> None:
        """Wait until gradients and losses are summed over the ranks."""
        assert self.reducer is not None
        self.reducer.wait(clock)
        if self._loss_sum is not None:
            sums = self._loss_sum.wait()
            means = (sums[:-1] / self._comm.ranks).unbind()
            self.losses = dict(zip(self.losses, means, strict=True))
            self.requests = sums[-1]
            self._loss_sum = None

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The Euclidean norm of all gradients together."""
        if self.reducer is not None:
            return self.reducer.norm(gradients)
        total: Tensor = torch.nn.utils.get_total_norm(gradients)
        return total

    def _passes(
        self,
        batch: Batch,
        extra: ExtraBatch | None,
        scale: float,
        input_grad: bool,
        sum_losses: bool,
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        totals: dict[str, Tensor] = {}
        images = []
        for m, micro in enumerate(batch.micro):
            views = self._inputs.views(m, micro, extra)
            if input_grad:  # on a tensor of its own: what came in may be the caller's
                x_NCHW, y_N = views["clean"]
                views["clean"] = x_NCHW.detach().requires_grad_(), y_N
            images.append(views["clean"][0])
            self._micro_gradient(batch, m, micro, views, scale, totals, sum_losses)
        if self.reducer is not None:
            self.reducer.launch()
        return {name: total / len(batch.micro) for name, total in totals.items()}, images

    def _micro_gradient(
        self,
        batch: Batch,
        m: int,
        micro: MicroBatch,
        views: Views,
        scale: float,
        totals: dict[str, Tensor],
        sum_losses: bool,
    ) -> None:
        """Backward of one micro-batch; adds its losses to ``totals``."""
        # Per image: a view of fewer images, such as a share that is attacked, weighs less.
        self.weights = {
            name: self._view_weights.get(name, 1.0) * (len(y) / len(micro.y_N))
            for name, (_, y) in views.items()
        }
        parts = len(batch.micro) * self._comm.ranks
        share = scale / (parts * sum(self.weights.values()))
        path = ("gradient", batch.step, micro.index)
        passes = [views] if self._network.fuses_views else [{name: views[name]} for name in views]
        for together in passes:
            last = m == len(batch.micro) - 1 and together is passes[-1]
            if self.reducer is not None and last:
                self.reducer.last_pass(tuple(views))
            # Route and randomness also cover backward: activation checkpointing runs forward again there.
            with (
                rng.scope(self._network.device, self._seed, *path, *together),
                self._network.on_route(together),
            ):
                logits = self._network.logits(together)
                losses = {name: self._loss(logits[name], y) for name, (_, y) in together.items()}
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0.0) + loss.detach()
                if self.reducer is not None and last and sum_losses:
                    self._launch_losses(totals, len(batch.micro))
                # The factors go in as gradients of the losses: no arithmetic of their own, forward or backward.
                factors = [
                    torch.full_like(loss, share * self.weights[name])
                    for name, loss in losses.items()
                ]
                torch.autograd.backward(list(losses.values()), factors)

    def _launch_losses(self, totals: Mapping[str, Tensor], count: int) -> None:
        """Start their sum before backward: a short message ahead of the large ones, not behind them."""
        means = torch.stack(list(totals.values())) / count
        request = means.new_full((1,), self._stop.encoded())
        self._loss_sum = self._comm.all_reduce_async(torch.cat([means, request]))
