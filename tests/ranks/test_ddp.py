"""A loop of one's own on DistributedDataParallel, and SyncBatchNorm."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from conadv import FGSM, Comm, ConadvError, Sequential, split_batchnorm
from conadv.nn.split_batchnorm import check_sync, frozen_stats, route

from ..helpers import parameters, same, state, tiny_resnet, train_step
from ..test_methods import CASES, EPS, SEED, SPACE, as_batch, sgd
from . import jobs
from .pool import Ranks


class InPlaceDDP(DistributedDataParallel):
    """DDP before torch's fix of its issue 175024: autograd sees that it overwrites buffers."""

    def _sync_buffers(self) -> None:
        super()._sync_buffers()
        for buffer in self.module.buffers():
            buffer.copy_(buffer.clone())


def own_loop(comm: Comm, how: str, broadcast: bool, wrapper: Any) -> dict[str, Any]:
    """Three steps on DDP: attack the plain module, both views forward, one backward."""
    model = jobs.small_resnet()
    optimizer, attack, calls = sgd(model), FGSM(EPS, space=SPACE), []
    start = [buffer.clone() for buffer in model.buffers()]
    with warnings.catch_warnings():
        # torch 2.14 has another name for it, which 2.9 does not know
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = wrapper(model, broadcast_buffers=broadcast)

    def count(state, bucket):  # type: ignore[no-untyped-def]  # DDP takes no other annotations than its own
        calls.append(bucket.index())
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, count)
    during_attack = 0
    for t in range(3):
        micro = jobs.batch_of(comm, t).micro[0]
        x, y, before = micro.views["clean"], micro.y_N, len(calls)
        with route(model, "adv"), frozen_stats(model):
            x_adv = attack(model, x, y, torch.Generator())
        during_attack += len(calls) - before
        assert all(p.grad is None for p in model.parameters())
        own_loss(wrapped, how, x, x_adv, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = zip(model.buffers(), start, strict=True)
    moved = all(not torch.equal(after, before) for after, before in pairs)
    found = {"during attack": during_attack, "in all": len(calls), "statistics moved": moved}
    return {"weights": parameters(model), **found}


def own_loss(wrapped: nn.Module, how: str, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    if how == "fused":
        with route(wrapped, {"clean": len(y), "adv": len(y)}):
            return F.cross_entropy(wrapped(torch.cat([x, x_adv])), torch.cat([y, y]))
    with route(wrapped, "clean"):
        clean = F.cross_entropy(wrapped(x), y)
    with route(wrapped, "adv"):
        return (clean + F.cross_entropy(wrapped(x_adv), y)) / 2


def same_by_train_step(comm: Comm) -> dict[str, Tensor]:
    """What :func:`own_loop` trains, by TrainStep's own path."""
    model, method = jobs.small_resnet(), Sequential(FGSM(EPS, space=SPACE))
    engine = train_step(model, sgd(model), method, space=SPACE, seed=SEED, comm=comm)
    jobs.steps(engine, None, range(3))
    return parameters(model)


def wrapped_model(comm: Comm) -> None:
    jobs.make(comm, "conadv", DistributedDataParallel(jobs.small_resnet()))


def check_against_train_step(
    pool: Ranks, how: str, broadcast: bool, wrapper: type[nn.Module]
) -> None:
    """Each weight after three steps to 1e-11 of its size.

    DDP sums the same gradients in another order (views, ranks, buckets): 2^-53 per addition, a few
    thousand additions deep in these layers, so 1e-12 or less at a step; measured 1e-15 to 1e-13. A
    wrong factor or route shows at 1e-2.
    """
    want = pool.run(same_by_train_step)
    for found, wanted in zip(pool.run(own_loop, how, broadcast, wrapper), want, strict=True):
        for name, weight in wanted.items():
            assert torch.allclose(found["weights"][name], weight, rtol=1e-11, atol=1e-12), name
        assert found["during attack"] == 0
        assert found["in all"] >= 3
        assert found["statistics moved"]


@pytest.mark.parametrize(("how", "broadcast"), [("two", True), ("fused", False)])
def test_two_views_under_ddp_train_as_train_step_does(
    two: Ranks, how: str, broadcast: bool
) -> None:
    # Red when: the adversarial view goes through the clean route; the attack's gradient is taken by
    # backward(), which fills parameter gradients and starts DDP's sums.
    check_against_train_step(two, how, broadcast, DistributedDataParallel)


def test_buffers_that_ddp_overwrites_between_two_forward_passes(two: Ranks) -> None:
    # Red when: _statistics_apart does nothing, or shares version counters by detach() ("modified by
    # an inplace operation"); the layers' statistics are those of a copy, and do not move.
    check_against_train_step(two, "two", True, InPlaceDDP)


def test_a_wrapped_model_is_refused(two: Ranks) -> None:
    # Red when: gradients would be summed twice.
    for error in two.errors(wrapped_model):
        assert "pass the plain model (model.module)" in error


def trained(model: nn.Module, device: str) -> dict[str, torch.Tensor]:
    model = split_batchnorm(model, "adv").to(device)
    engine = train_step(model, sgd(model), CASES["disadv"](), space=SPACE, seed=SEED)
    for t in range(3):
        engine(as_batch(t))
    return state(model)


def test_on_one_process_sync_batchnorm_is_batchnorm() -> None:
    # Red when: check_sync refuses where there is no process group.
    assert same(
        trained(nn.SyncBatchNorm.convert_sync_batchnorm(tiny_resnet()), "cpu"),
        trained(tiny_resnet(), "cpu"),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_sync_batchnorm_in_a_process_group_of_one_gpu(tmp_path: Path) -> None:
    torch.cuda.set_device(0)
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        torch.backends.cudnn.deterministic = True
        found = trained(nn.SyncBatchNorm.convert_sync_batchnorm(tiny_resnet()), "cuda")
        wanted = trained(tiny_resnet(), "cuda")
        with pytest.raises(ConadvError, match="over 1 processes, but 2"):
            check_sync(nn.SyncBatchNorm.convert_sync_batchnorm(tiny_resnet()).cuda(), 2)
    finally:
        torch.distributed.destroy_process_group()
    assert all(
        torch.allclose(found[name], value, rtol=1e-4, atol=1e-5) for name, value in wanted.items()
    )
