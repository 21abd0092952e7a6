"""The gradient of a step: all views of all micro-batches, summed over the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conadv import rng
from conadv.attacks.loss import TrainedLoss
from conadv.distributed.clock import PhaseClock
from conadv.distributed.comm import Comm
from conadv.distributed.handle import Handle
from conadv.distributed.reducer import GradientReducer
from conadv.engine.forward import Network
from conadv.engine.inputs import Inputs, Views
from conadv.engine.stop import StopRequest
from conadv.errors import ConadvError
from conadv.types import Batch, ExtraBatch, MicroBatch


@dataclass(frozen=True)
class Shares:
    """How the losses of a step's views and micro-batches add up.

    factors: of a micro-batch's loss in the gradient. divisors: of a view's losses, summed over this
    rank's micro-batches, so that their mean over ranks is the view's loss. weights: of the views in
    the mean of their losses.
    """

    factors: Mapping[str, float | Tensor]
    divisors: Mapping[str, float | Tensor]
    weights: Mapping[str, float | Tensor]


@dataclass
class GradientPass:
    """Adds d/dtheta of the weighted mean over views of L(theta; view) to ``.grad``.

    Ranks: after :meth:`wait` gradients and ``losses`` are means over the global batch.
    In flight: from the last backward pass of :meth:`run` to :meth:`wait` the gradients' buckets and
    the losses.
    """

    network: Network
    inputs: Inputs
    loss: TrainedLoss
    view_weights: Mapping[str, float]
    seed: int
    comm: Comm
    stop: StopRequest
    replace: bool = False  # whether extra images stand for those of the batch that they came from

    def __post_init__(self) -> None:
        several = self.comm.ranks > 1
        self.reducer = GradientReducer(self.comm, self.network.model) if several else None
        self.losses: dict[str, Tensor] = {}
        self.weights: Mapping[str, float | Tensor] = {}  # of the views in the mean of their losses
        self.requests: Tensor | None = None  # sum over ranks of what they were asked for
        self._loss_sum: Handle | None = None
        self._changed = False  # whether this rank trains other parameters than in the last step
        self._images = 0  # of this rank in this step

    def run(
        self,
        batch: Batch,
        extra: ExtraBatch | None,
        scale: float,
        *,
        input_grad: bool = False,
        record: bool = True,
    ) -> list[Tensor]:
        """All passes of a step; returns each micro-batch's clean images where they get a gradient.

        ``scale``: factor on the gradient (fp16). ``input_grad``: whether the images get one too.
        ``record``: ``losses`` become those of this run.
        """
        totals: dict[str, Tensor] = {}
        clean = []
        shares = self._shares(batch, extra, scale)
        self._changed = self.reducer is not None and self.reducer.follow()
        self.weights, self._images = shares.weights, sum(len(m.y_N) for m in batch.micro)
        for m, micro in enumerate(batch.micro):
            views = self.inputs.views(m, micro, extra, self.replace)
            if input_grad:  # on a tensor of its own: what came in may be the caller's
                x_NCHW, y_N = views["clean"]
                x_NCHW = x_NCHW.detach().requires_grad_()
                views["clean"] = x_NCHW, y_N
                clean.append(x_NCHW)
            last = m == len(batch.micro) - 1
            self._micro_gradient(batch, micro, views, shares, totals, last, record)
        if self.reducer is not None:
            self.reducer.launch()
        if record:
            self.losses = {name: total / shares.divisors[name] for name, total in totals.items()}
        return clean

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
            means = (sums[:-3] / self.comm.ranks).unbind()
            self.losses = dict(zip(self.losses, means, strict=True))
            self.requests, self._loss_sum = sums[-3], None
            changed, images = sums[-2:].tolist()  # sync point
            # Every rank's mean counts alike, which is the mean over all images of equal batches.
            if images != self.comm.ranks * self._images and not self.loss.weighted:
                raise ConadvError(
                    f"Ranks have batches of different sizes: {self._images} images here, "
                    f"{images:g} on {self.comm.ranks} ranks. Give every rank as many, such as by "
                    "drop_last=True of its loader."
                )
            # A layer that was unfrozen has gradients that nobody has summed yet.
            if changed:
                self.reducer.regroup()

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The Euclidean norm of all gradients together."""
        take = torch.nn.utils.get_total_norm if self.reducer is None else self.reducer.norm
        return take(gradients)

    def _shares(self, batch: Batch, extra: ExtraBatch | None, scale: float) -> Shares:
        """Ranks: collective for a weighted loss, which divides by what all ranks have."""
        labels = [
            self.inputs.view_labels(m, micro, extra, self.replace)
            for m, micro in enumerate(batch.micro)
        ]
        weights = {name: self.view_weights.get(name, 1.0) for name in labels[0]}
        if self.loss.weighted:
            # Sums over images by the mass of the whole global batch: micro-batches and ranks with
            # heavier classes, or fewer labels to ignore, count for more.
            mine = [
                torch.stack([self.loss.mass(y[name]) for y in labels]).sum() for name in weights
            ]
            mass = self.comm.all_reduce(torch.stack(mine)).clamp_min(torch.finfo().tiny)
            by_view = dict(zip(weights, mass, strict=True))
            whole = {name: weight * by_view[name] for name, weight in weights.items()}
            one = scale / torch.stack(list(whole.values())).sum()
            return Shares(
                {name: one * weight for name, weight in weights.items()},
                {name: mass / self.comm.ranks for name, mass in by_view.items()},
                whole,
            )
        # Per image: a view of fewer images, such as a share that is attacked, weighs less.
        count = len(batch.micro[0].y_N)
        weights = {name: w * (len(labels[0][name]) / count) for name, w in weights.items()}
        share = scale / (len(batch.micro) * self.comm.ranks * sum(weights.values()))
        factors = {name: share * weight for name, weight in weights.items()}
        return Shares(factors, dict.fromkeys(weights, len(batch.micro)), weights)

    def _micro_gradient(
        self,
        batch: Batch,
        micro: MicroBatch,
        views: Views,
        shares: Shares,
        totals: dict[str, Tensor],
        last: bool,
        record: bool,
    ) -> None:
        """Backward of one micro-batch; adds its losses to ``totals``."""
        loss_of = self.loss.total if self.loss.weighted else self.loss
        path = ("gradient", batch.step, micro.index)
        passes = self.network.passes(views)
        for together in passes:
            launch = self.reducer is not None and last and together is passes[-1]
            if self.reducer is not None and launch:
                self.reducer.last_pass(tuple(views))
            # Route and randomness also cover backward: activation checkpointing runs forward again
            # there.
            with (
                rng.scope(self.network.device, self.seed, *path, *together),
                self.network.on_route(together),
            ):
                logits = self.network.logits(together)
                losses = {name: loss_of(logits[name], y) for name, (_, y) in together.items()}
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0.0) + loss.detach()
                if launch and record:
                    self._launch_losses(totals, shares)
                # The factors go in as gradients of the losses: no arithmetic of their own, forward
                # or backward.
                factors = [torch.ones_like(loss) * shares.factors[n] for n, loss in losses.items()]
                torch.autograd.backward(list(losses.values()), factors)

    def _launch_losses(self, totals: Mapping[str, Tensor], shares: Shares) -> None:
        """Start their sum before backward, so that it is ahead of the large messages."""
        means = torch.stack([total / shares.divisors[name] for name, total in totals.items()])
        more = means.new_tensor([self.stop.encoded(), float(self._changed), self._images])
        self._loss_sum = self.comm.all_reduce_async(torch.cat([means, more]))
