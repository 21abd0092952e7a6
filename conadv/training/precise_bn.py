"""Precise batch norm: running statistics computed anew, over many images at the weights as they
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conadv.attacks.space import PixelSpace
from conadv.distributed.comm import Comm
from conadv.errors import ConadvError
from conadv.nn import split_batchnorm as norm
from conadv.training.evaluate import eval_mode, forward_pass, model_inputs
from conadv.types import Attack


def recalibrate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    space: PixelSpace,
    *,
    route: str = norm.CLEAN,
    attack: Attack | None = None,
    seed: int = 0,
    precision: str = "fp32",
    channels_last: bool = False,
    comm: Comm | None = None,
) -> None:
    """Replace the running mean and variance of every batch-norm layer on ``route`` by those of all
    ``batches``.

    mean = sum_b n_b mean_b / n, var = (sum_b n_b (var_b + mean_b^2) / n - mean^2) n / (n - 1), with
    n_b values per channel in batch b and n in all: mean and unbiased variance of what reaches the
    layer over all images. Each batch is normalised by its own statistics on the way (so take the
    micro-batch of training); all else, dropout for one, is in eval mode, since that is what the
    statistics are for. Weights, modes and other routes stay as they are.

    ``batches``: (images_NCHW, y_N), uint8 pixels or model space. ``attack``: images are attacked
    first, on this route and in this mode, with draws keyed by (seed, a batch's number in the whole
    list). Reduces to: a training pass with momentum 1 for a single batch.
    Raises ConadvError without a batch norm that keeps statistics, or without images.
    Ranks: with ``comm``, ``batches`` are every ``comm.ranks``-th of the whole list, beginning with
    number ``comm.rank``; sums in float64 go over the ranks, so all get the same statistics.

    Source: Wu and Johnson, "Rethinking Batch in BatchNorm", arXiv 2105.07576, section 3
    (PreciseBN).
    """
    comm = comm or Comm()
    layers = [layer for layer in norm.layers_on(model, route) if layer.running_mean is not None]
    if not layers:
        raise ConadvError(
            f"recalibrate: no batch norm of the model keeps statistics on the route {route!r}."
        )
    device, forward = next(model.parameters()).device, forward_pass(model, precision)
    sums = [
        torch.zeros(2, layer.num_features + 1, dtype=torch.float64, device=device)
        for layer in layers
    ]
    draws = (seed, "recalibrate")
    inputs = model_inputs(
        batches, space, device, forward, attack, comm, draws, channels_last=channels_last
    )
    with _normalising_by_batch(model), norm.route(model, route), torch.no_grad():
        for x, _ in inputs:
            with ExitStack() as hooks:
                for layer, total in zip(layers, sums, strict=True):
                    hook = layer.register_forward_pre_hook(partial(_observe, total))
                    hooks.callback(hook.remove)
                forward(x)
    _write(layers, sums, comm)


@contextmanager
def _normalising_by_batch(model: nn.Module) -> Iterator[None]:
    """Eval mode, but for batch norm, which normalises by the batch and leaves its running
    statistics alone.
    """
    with eval_mode(model):
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.training = True
        with norm.frozen_stats(model):
            yield


def _observe(total: Tensor, layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Add the count and the first two moments of a layer's input to ``total``: rows are moments,
    then the count.
    """
    x = args[0].detach()
    x = x if x.dtype == torch.float64 else x.float()
    var, mean = torch.var_mean(x, [dim for dim in range(x.dim()) if dim != 1], correction=0)
    count = x.numel() // x.shape[1]
    mean = mean.double()
    total[0, :-1] += count * mean
    total[1, :-1] += count * (var.double() + mean.square())
    total[:, -1] += count


def _write(layers: list[_BatchNorm], sums: list[Tensor], comm: Comm) -> None:
    flat = comm.all_reduce(torch.cat([total.flatten() for total in sums]))
    if not flat.any():
        raise ConadvError("recalibrate: there is no batch to take statistics over.")
    for layer, total in zip(layers, flat.split([t.numel() for t in sums]), strict=True):
        first, second = total.view(2, -1)
        count = first[-1]
        if count > 1:  # a layer that no image went through keeps what it has
            assert layer.running_mean is not None
            assert layer.running_var is not None
            mean = first[:-1] / count
            var = (second[:-1] / count - mean.square()) * count / (count - 1)
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var.clamp_min(0))
