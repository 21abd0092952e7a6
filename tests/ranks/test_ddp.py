"""A loop of one's own on DistributedDataParallel, and SyncBatchNorm: what works, and what says why it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from conadv import ConadvError, TrainStep, split_batchnorm
from conadv.nn.split_batchnorm import check_sync

from ..helpers import same, state, tiny_resnet
from ..test_methods import CASES, SEED, SPACE, as_batch, sgd
from . import jobs
from .pool import Ranks


def check_against_train_step(
    pool: Ranks, how: str, broadcast: bool, wrapper: type[nn.Module]
) -> None:
    """Each weight after three steps to 1e-11 of its size.

    DDP sums the same gradients in another order (views, ranks, buckets): 2^-53 per addition, a few thousand additions
    deep in these layers, so 1e-12 or less at a step; measured 1e-15 to 1e-13. A wrong factor or route shows at 1e-2.
    """
    want = pool.run(jobs.same_by_train_step)
    for found, wanted in zip(pool.run(jobs.own_loop, how, broadcast, wrapper), want, strict=True):
        for name, weight in wanted.items():
            assert torch.allclose(found["weights"][name], weight, rtol=1e-11, atol=1e-12), name
        assert found["during attack"] == 0
        assert found["in all"] >= 3
        assert found["statistics moved"]


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("how", ["two", "fused"])
def test_two_views_under_ddp_train_as_train_step_does(
    two: Ranks, how: str, broadcast: bool
) -> None:
    # Red when: the adversarial view goes through the clean route; the attack's gradient is taken by backward(), which
    # fills parameter gradients and starts DDP's sums.
    check_against_train_step(two, how, broadcast, jobs.DistributedDataParallel)


def test_buffers_that_ddp_overwrites_between_two_forward_passes(two: Ranks) -> None:
    # Red when: _statistics_apart does nothing, or shares version counters by detach() ("modified by an inplace
    # operation"); the layers' statistics are those of a copy, and do not move.
    check_against_train_step(two, "two", True, jobs.InPlaceDDP)


def test_four_ranks() -> None:
    # Red when: TrainStep's loss is divided by two in place of the number of ranks.
    four = Ranks(4)
    try:
        for how in ("two", "fused"):
            check_against_train_step(four, how, True, jobs.DistributedDataParallel)
    finally:
        four.close()


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("wrapped_model", "pass the plain model (model.module)"),
        ("sync_batchnorm", "The layer 'bn1' is a SyncBatchNorm on the cpu"),
        ("no_comm", "every rank would train for itself"),
        ("environment_again", "takes init_process_group's place"),
    ],
)
def test_what_cannot_work_says_so_on_every_rank(two: Ranks, job: str, words: str) -> None:
    # Red when: _check_model lets it through (gradients summed twice, or torch's ValueError in the first step); without
    # a comm every rank is alone.
    for kind, (name, message, _) in two.answers(getattr(jobs, job)):
        assert (kind, name) == ("error", "ConadvError")
        assert words in message


def test_sync_batchnorm_is_for_just_the_ranks_that_run_the_model(two: Ranks) -> None:
    # Red when: a team within the world (learners beside attack ranks) may use layers that wait for the whole world.
    two.run(jobs.sync_over, 2)
    for kind, (_, message, _) in two.answers(jobs.sync_over, 1):
        assert kind == "error"
        assert "over 2 processes, but 1 of them" in message


def trained(model: nn.Module, device: str) -> dict[str, torch.Tensor]:
    model = split_batchnorm(model, "adv").to(device)
    engine = TrainStep(model, sgd(model), CASES["disadv"](), space=SPACE, seed=SEED)
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
