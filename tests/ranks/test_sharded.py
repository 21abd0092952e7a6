"""LARS and LAMB on parameters that are sharded over processes (DTensor, FSDP2)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from conadv import LAMB, LARS, Comm, TrainStep

from .pool import Ranks

F64 = torch.float64
FORMS = ({}, {"foreach": False}, {"foreach": True})
KINDS = [
    (LARS, {"trust_coefficient": 0.05}),
    (LARS, {"variant": "nus", "maximize": True}),
    (LAMB, {"weight_decay": 0.1}),
    (LAMB, {"capturable": True}),
]


def network() -> nn.Module:
    """7 and 3 rows do not divide by 2 or 3 ranks, and one row leaves all ranks but one empty."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3), nn.GELU(), nn.Linear(3, 1))
    return net.to(F64)


def optimizer_of(kind: Any, settings: dict[str, Any], model: nn.Module) -> Any:
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1]}]
    return kind([*groups, {"params": plain, "adapt": False}], 0.1, **settings)


def whole(x: Any) -> Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def train(model: nn.Module, optimizer: Any, steps: range) -> list[Tensor]:
    """The weights and the state after steps on data that all ranks share."""
    for step in steps:
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step), dtype=F64)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = [whole(p) for p in model.parameters()]
    for p in model.parameters():
        found += [whole(value) for _, value in sorted(optimizer.state[p].items())]
    return found


def against_whole(comm: Comm, shape: tuple[int, ...]) -> list[tuple[str, list[Any], list[Any]]]:
    """(what, sharded, whole) after six steps, with the state saved and loaded in the middle."""
    names = ("replicate", "shard")[-len(shape) :]
    mesh, pairs = init_device_mesh("cpu", shape, mesh_dim_names=names), []
    for kind, settings in KINDS:
        for form in FORMS:
            model, sharded = network(), fully_shard(network(), mesh=mesh)
            one, two = (optimizer_of(kind, {**settings, **form}, m) for m in (model, sharded))
            train(model, one, range(3))
            train(sharded, two, range(3))
            saved = copy.deepcopy(two.state_dict())
            two = optimizer_of(kind, {**settings, **form}, sharded)
            two.load_state_dict(saved)
            rest = range(3, 6)
            name = f"{kind.__name__} {settings} {form}"
            pairs.append((name, train(sharded, two, rest), train(model, one, rest)))
    return pairs


@pytest.mark.parametrize("shape", [(2,), (2, 1), (3,)], ids=str)
def test_a_sharded_update_is_the_whole_one(
    shape: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    # Red when: norms are those of each part; a replicated dim is summed over; the state is not a
    # DTensor like its parameter.
    pool: Ranks = request.getfixturevalue({2: "two", 3: "three"}[shape[0]])
    for pairs in pool.run(against_whole, shape):
        for name, sharded, plain in pairs:
            torch.testing.assert_close(sharded, plain, rtol=1e-9, atol=1e-12, msg=name)


def other_placements(comm: Comm) -> list[tuple[Tensor, Tensor]]:
    """A gradient that is cut otherwise than its parameter, as under tensor parallelism."""
    mesh = init_device_mesh("cpu", (comm.ranks,))
    w, g = torch.arange(1.0, 16).view(5, 3), torch.linspace(-1, 1, 15).view(5, 3)
    found = []
    for placement in (Replicate(), Shard(1), Partial()):
        p = nn.Parameter(distribute_tensor(w.clone(), mesh, [Shard(0)]))
        if placement.is_partial():
            p.grad = DTensor.from_local(g / comm.ranks, mesh, [placement])
        else:
            p.grad = distribute_tensor(g, mesh, [placement])
        q = nn.Parameter(w.clone())
        q.grad = g.clone()
        LARS([p], 1.0).step()
        LARS([q], 1.0).step()
        found.append((whole(p), whole(q)))
    return found


def test_a_gradient_with_other_placements(two: Ranks) -> None:
    # Red when: the local parts are taken as they come.
    for found in two.run(other_placements):
        for sharded, plain in found:
            torch.testing.assert_close(sharded, plain)


def flat(comm: Comm, original: bool) -> None:
    model = FullyShardedDataParallel(network(), use_orig_params=original, device_id=comm.device)
    LAMB(model.parameters(), 0.1)


def fused(comm: Comm) -> None:
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (comm.ranks,)))
    LARS(model.parameters(), 0.1, fused=True)


def engine(comm: Comm) -> None:
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (comm.ranks,)))
    TrainStep(model, LARS(model.parameters(), 0.1), comm=comm)


def flat_engine(comm: Comm) -> None:
    model = FullyShardedDataParallel(network(), use_orig_params=True, device_id=comm.device)
    TrainStep(model, torch.optim.SGD(model.parameters(), 0.1), comm=comm)


def test_what_is_not_supported_says_so(two: Ranks) -> None:
    # Red when: FSDP1's flat parameters pass as tensors; TrainStep takes a sharded model.
    for job, args, message in (
        (flat, (False,), "Use torch.distributed.fsdp.fully_shard"),
        (flat, (True,), "Use torch.distributed.fsdp.fully_shard"),
        (fused, (), "fused=True is the form for whole parameters"),
        (engine, (), "'0.weight' is sharded"),
        (flat_engine, (), "is sharded"),
    ):
        for said in two.errors(job, *args):
            assert message in said
