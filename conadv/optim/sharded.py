"""Parameters whose parts lie in several processes: DTensors, as FSDP2's ``fully_shard`` makes them.

An update of such a tensor is elementwise on this process's part, except for norms, which are of the
whole tensor. DTensors are recognised by what they have, not by their class: importing
``torch.distributed.tensor`` takes half a second, and most runs do without it.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from conadv.errors import ConadvError

Spread = tuple[tuple[Any, int], ...]
"""The mesh dims that a tensor is divided over, as (mesh, dim); empty for a whole tensor."""


def spread(x: Any) -> Spread:
    """Where the parts of ``x`` lie. A replicated tensor is whole in every process."""
    placements = getattr(x, "placements", ())
    return tuple((x.device_mesh, i) for i, how in enumerate(placements) if not how.is_replicate())


def local(x: Any) -> Tensor:
    """This process's part, on the same memory; a plain tensor as it is. Parts may be empty."""
    part: Tensor = x.to_local() if hasattr(x, "placements") else x
    return part


def local_grad(p: Any) -> Tensor:
    """This process's part of the gradient, cut like the parameter."""
    # Of fully_shard they are cut alike; tensor parallelism may leave sums or copies as gradients.
    if getattr(p.grad, "placements", None) == getattr(p, "placements", None):
        return local(p.grad)
    return local(p.grad.redistribute(placements=p.placements))


def whole_norms(norms: Tensor, where: Spread) -> Tensor:
    """The norms of whole tensors from those of their parts: one sum over the processes for all.

    Ranks: collective over the mesh.
    """
    if not where:
        return norms
    # Squares add up over parts, norms do not. In float64 from the caller, so the detour is exact
    # to far below float32's rounding.
    squares = norms.square()
    for mesh, dim in where:
        dist.all_reduce(squares, group=mesh.get_group(dim))
    return squares.sqrt_()


def refuse_flat(p: Tensor, optimizer: str) -> None:
    """Raise ConadvError for a part of FSDP1: it does not know where its tensor begins or ends."""
    # FSDP1 marks flat parameters, and the slices of them that pose as the original ones.
    if getattr(p, "_fsdp_flattened", False):
        raise ConadvError(
            f"{optimizer} needs the norm of every weight tensor, and FullyShardedDataParallel "
            "keeps flat parts that know none. Use torch.distributed.fsdp.fully_shard, whose "
            "parameters are DTensors."
        )
