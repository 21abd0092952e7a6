"""What the ranks of the tests run. Every function gets the Comm first and returns plain values and tensors."""

from __future__ import annotations

import os
import signal
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from conadv import (
    FGSM,
    LARS,
    Batch,
    Comm,
    ConadvError,
    Sequential,
    TrainStep,
    split_batchnorm,
    windows,
)
from conadv.config.schema import Config
from conadv.distributed import reducer
from conadv.distributed.handle import Handle
from conadv.engine.execution import Execution
from conadv.engine.pending import gather
from conadv.nn.split_batchnorm import check_sync, frozen_stats, route
from conadv.training.evaluate import evaluate
from conadv.training.loop import train
from conadv.training.precise_bn import recalibrate
from conadv.training.signals import Stopped

from ..helpers import images, no_norm_net, parameters, state, tiny_resnet, train_step
from ..test_methods import CASES, EPS, SEED, SPACE, as_batch, sgd
from ..test_training import config

Answer = tuple[list[dict[str, Any]], dict[str, Tensor]]
OPTIMIZERS = {"sgd": sgd, "lars": lambda model: LARS(model.parameters(), 5.0)}


def share(batch: Batch, comm: Comm) -> Batch:
    """This rank's micro-batches of a global batch, as the data order deals them out."""
    count = len(batch.micro) // comm.ranks
    return replace(batch, micro=batch.micro[comm.rank * count : (comm.rank + 1) * count])


def make(
    comm: Comm, case: str, model: nn.Module, optimizer: str = "sgd", **options: Any
) -> TrainStep:
    """``bucket_mib``: size of the reducer's buckets."""
    bucket_mib = options.pop("bucket_mib", reducer.BUCKET_MIB)
    with mock.patch.object(reducer, "BUCKET_MIB", bucket_mib):
        return train_step(
            model,
            OPTIMIZERS[optimizer](model),
            CASES[case](),
            space=SPACE,
            seed=SEED,
            comm=comm,
            **options,
        )


def steps(
    engine: TrainStep, count: int, num_steps: int, dtype: torch.dtype = torch.float64
) -> list[dict[str, Any]]:
    """Train on this rank's share of global batches of ``count`` micro-batches."""
    stream = [share(as_batch(t, count=count, dtype=dtype), engine.comm) for t in range(num_steps)]
    return [asdict(engine(batch, future)) for batch, future in windows(stream, engine.ahead)]


def without_statistics(
    comm: Comm, case: str, count: int, options: dict[str, Any], optimizer: str = "sgd"
) -> Answer:
    """Five float64 steps of a network without batch statistics; rank 1's own weights must not matter."""
    engine = make(comm, case, no_norm_net(seed=comm.rank), optimizer, **options)
    return steps(engine, count, 5), state(engine.model)


def with_batchnorm(comm: Comm, case: str, options: dict[str, Any]) -> tuple[Answer, Any]:
    """Four steps with batch norm, this rank's state after them, and the evaluation."""
    model = tiny_resnet("adv", seed=comm.rank, dtype=torch.float64)
    engine = make(comm, case, model, **options)
    records = steps(engine, 2 * comm.ranks, 4)
    own = state(model)
    comm.broadcast(model.buffers())
    return (records, own), evaluation(comm, model)


def evaluation(comm: Comm, model: nn.Module, batch: int = 5, attack: Any = None) -> Any:
    x, y = images(23, 5, torch.float64)
    all_batches = list(zip(x.split(batch), y.split(batch), strict=True))
    return evaluate(
        model, all_batches[comm.rank :: comm.ranks], SPACE, attack=attack, seed=SEED, comm=comm
    )


def recalibration(comm: Comm, batch: int) -> dict[str, Tensor]:
    model = tiny_resnet("adv", dtype=torch.float64)
    x, y = images(4 * batch, 5, torch.float64)
    all_batches = list(zip(x.split(batch), y.split(batch), strict=True))
    for name, attack in (("clean", None), ("adv", FGSM(EPS, space=SPACE))):
        recalibrate(
            model, all_batches[comm.rank :: comm.ranks], SPACE, route=name, attack=attack, comm=comm
        )
    return state(model)


def adopted(comm: Comm) -> tuple[int, int, float]:
    """A Comm of the process group that is there."""
    mine = Comm.from_process_group("cpu")
    return mine.rank, mine.ranks, float(mine.all_reduce(torch.tensor([comm.rank + 1.0])))


def evaluate_only(comm: Comm, batch: int, attack: Any) -> Any:
    return evaluation(comm, tiny_resnet("adv", dtype=torch.float64), batch, attack)


def launches(comm: Comm, case: str, count: int, options: dict[str, Any]) -> dict[str, int]:
    """Counts from the last of four steps, by what the reducer has done when."""
    engine = make(comm, case, tiny_resnet("adv", dtype=torch.float64), **options)
    stream = [share(as_batch(t, count=count, dtype=torch.float64), comm) for t in range(4)]
    reducer, seen = engine.reducer, dict[str, int]()
    assert reducer is not None
    launch, prepare, wait = reducer.launch, engine.prepare, Handle.wait

    def watched_launch() -> None:
        seen["left during backward"] = len(reducer._handles)
        launch()
        seen["buckets"] = len(reducer._handles)

    def watched_prepare(future: Any) -> None:
        seen["on the way while attacking"] = len(reducer._handles)
        prepare(future)

    def counted_wait(handle: Handle) -> Tensor:
        seen["waits"] = seen.get("waits", 0) + 1
        return wait(handle)

    with (
        mock.patch.object(reducer, "launch", watched_launch),
        mock.patch.object(engine, "prepare", watched_prepare),
        mock.patch.object(Handle, "wait", counted_wait),
    ):
        for batch, future in windows(stream, engine.ahead):
            seen.clear()
            engine(batch, future)
    return seen


def non_finite(comm: Comm, what: str) -> None:
    """Rank 1 has a NaN in the images, or in a gradient, of step 2."""
    engine = make(comm, "vanilla", no_norm_net())
    steps(engine, 2, 2)
    batch = share(as_batch(2, count=2, dtype=torch.float64), comm)
    if comm.rank == 1 and what == "loss":
        batch.micro[0].views["clean"][0, 0, 0, 0] = float("nan")
    if comm.rank == 1 and what == "gradient":
        engine.model[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    engine(batch)


def dies(comm: Comm, how: str) -> None:
    """Rank 1 ends, or falls silent, after the second step."""
    engine = make(comm, "conadv", no_norm_net())
    for t in range(100):
        if comm.rank == 1 and t == 2:
            if how == "exit":
                os._exit(7)
            time.sleep(60)
        batch, future = (share(as_batch(s, count=2, dtype=torch.float64), comm) for s in (t, t + 1))
        engine(batch, future)


def gone(comm: Comm, culprit: int, how: str) -> None:
    """Rank ``culprit`` is killed, stopped, held up in its own work, or leaves, in step 2."""
    engine = make(comm, "conadv", no_norm_net())
    for t in range(100):
        if comm.rank == culprit and t == 2:
            comm.at("data", t)
            if how == "leaves":
                comm.close()
                return
            if how == "held up":
                time.sleep(60)
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        batch, future = (
            share(as_batch(s, count=comm.ranks, dtype=torch.float64), comm) for s in (t, t + 1)
        )
        engine(batch, future)


def fails_alone(comm: Comm) -> None:
    """Rank 1 leaves in the middle of step 1, its gradients under way, as after an unreadable image."""
    engine = make(comm, "conadv", no_norm_net())
    steps(engine, 2, 1)
    batch = share(as_batch(1, count=2, dtype=torch.float64), comm)
    engine.gradient(batch)
    if comm.rank == 1:
        comm.close()
        return
    engine.wait()
    engine.update()
    engine(share(as_batch(2, count=2, dtype=torch.float64), comm))


def gradient_twice(comm: Comm) -> None:
    engine = make(comm, "vanilla", no_norm_net())
    batch = share(as_batch(0, count=2, dtype=torch.float64), comm)
    engine.gradient(batch)
    engine.wait()
    engine.gradient(batch)


def thawed(comm: Comm, name: str) -> None:
    """A parameter that has no gradient in the first step and one in the second."""
    model = tiny_resnet("adv", dtype=torch.float64)
    engine = make(comm, "disadv", model)
    model.get_parameter(name).requires_grad_(False)
    steps(engine, 2, 1)
    model.get_parameter(name).requires_grad_(True)
    steps(engine, 2, 1)


class InPlaceDDP(DistributedDataParallel):
    """DistributedDataParallel before torch's fix of its issue 175024: autograd sees that it overwrites buffers."""

    def _sync_buffers(self) -> None:
        super()._sync_buffers()
        for buffer in self.module.buffers():
            buffer.copy_(buffer.clone())


def own_loop(
    comm: Comm, how: str, broadcast: bool, wrapper: Any = DistributedDataParallel
) -> dict[str, Any]:
    """Three steps of a loop of one's own on DDP: attack the plain module, both views forward, one backward."""
    model = tiny_resnet("adv", dtype=torch.float64)
    optimizer, attack, calls = sgd(model), FGSM(EPS, space=SPACE), []
    start = [buffer.clone() for buffer in model.buffers()]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # torch 2.14 has another name for it, which 2.9 does not know
        wrapped = wrapper(model, broadcast_buffers=broadcast)

    def count(state, bucket):  # type: ignore[no-untyped-def]  # DDP takes no other annotations than its own
        calls.append(bucket.index())
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, count)
    during_attack = 0
    for t in range(3):
        micro = share(as_batch(t, count=comm.ranks, dtype=torch.float64), comm).micro[0]
        x, y, before = micro.views["clean"], micro.y_N, len(calls)
        with route(model, "adv"), frozen_stats(model):
            x_adv = attack(model, x, y, torch.Generator())
        during_attack += len(calls) - before
        assert all(p.grad is None for p in model.parameters())
        optimizer.zero_grad()
        own_loss(wrapped, how, x, x_adv, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = all(
        not torch.equal(after, before) for after, before in zip(model.buffers(), start, strict=True)
    )
    return {
        "weights": parameters(model),
        "during attack": during_attack,
        "in all": len(calls),
        "statistics moved": moved,
    }


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
    model = tiny_resnet("adv", dtype=torch.float64)
    engine = train_step(
        model, sgd(model), Sequential(FGSM(EPS, space=SPACE)), space=SPACE, seed=SEED, comm=comm
    )
    steps(engine, comm.ranks, 3)
    return parameters(model)


def wrapped_model(comm: Comm) -> None:
    make(comm, "conadv", DistributedDataParallel(tiny_resnet("adv", dtype=torch.float64)))


def sync_batchnorm(comm: Comm) -> None:
    make(
        comm,
        "conadv",
        split_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(tiny_resnet()), "adv"),
    )


def sync_over(comm: Comm, ranks: int) -> None:
    """What is not on the CPU is checked for who takes part."""
    check_sync(nn.SyncBatchNorm.convert_sync_batchnorm(tiny_resnet()).to("meta"), ranks)


def no_comm(comm: Comm) -> None:
    model = tiny_resnet("adv")
    train_step(model, sgd(model), CASES["conadv"](), space=SPACE)


def environment_again(comm: Comm) -> None:
    Comm.from_environment("cpu")


def disagree(comm: Comm) -> None:
    """Rank 1 alone finds something wrong."""
    with comm.agreed():
        if comm.rank == 1:
            raise ConadvError("The folder /data is not here.")


def train_run(
    comm: Comm, out: Path, changes: dict[str, Any], resume: bool = False
) -> dict[str, Any]:
    return train(config(**changes), out, resume=resume, comm=comm)


def train_config(comm: Comm, out: Path, settings: Config) -> dict[str, Any]:
    return train(settings, out, comm=comm)


def clipped(comm: Comm) -> tuple[float, float, float]:
    """The norm that a step records if nobody touches the gradients, what torch makes of them, and after clipping."""
    engine = make(comm, "vanilla", no_norm_net())
    steps(engine, 2, 1)
    norms = []
    for t in (1, 2):
        engine.gradient(share(as_batch(t, count=2, dtype=torch.float64), comm))
        engine.wait()
        if t == 1:
            norms.append(
                float(torch.nn.utils.get_total_norm([p.grad for p in engine.model.parameters()]))
            )
        else:
            torch.nn.utils.clip_grad_norm_(engine.model.parameters(), 0.125)
        norms.insert(0, engine.update().grad_norm)
    return norms[1], norms[2], norms[0]


class Twice(nn.Module):
    """One layer in two reentrant checkpoints: its gradient comes in two portions of one backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 64, 5).double()
        self.shared = nn.Linear(5, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for _ in range(2):
            x = checkpoint(self.shared, x, use_reentrant=True)
        return x


def reentrant(comm: Comm) -> None:
    steps(make(comm, "vanilla", Twice()), 2, 2)


def no_wait(comm: Comm) -> None:
    engine = make(comm, "vanilla", no_norm_net())
    engine.gradient(share(as_batch(0, count=2, dtype=torch.float64), comm))
    engine.optimizer.step()
    engine.advance()


def other_settings(comm: Comm, out: Path) -> None:
    train(config(seed=comm.rank), out, comm=comm)


def stopped_run(
    comm: Comm, out: Path, settings: dict[str, Any], rank: int, step: int, number: int, attack: int
) -> Any:
    """Train; ``rank`` alone gets a signal, a learner in ``step`` and an attack rank in its ``step``-th attack."""
    original = {"update": TrainStep.update, "attack_batch": TrainStep.attack_batch}
    counts = {"update": 0, "attack_batch": 0}

    def counted(name: str) -> Any:
        def method(engine: TrainStep, *args: Any) -> Any:
            counts[name] += 1
            if comm.rank == rank and counts[name] == step + 1:
                os.kill(os.getpid(), number)
            return original[name](engine, *args)

        return method

    attacking = comm.rank >= comm.ranks - attack
    name = "attack_batch" if attacking else "update"
    with mock.patch.object(TrainStep, name, counted(name)):
        try:
            train(config(**settings), out, comm=comm, execution=Execution(attack_ranks=attack))
        except Stopped as stopped:
            return stopped.code, str(stopped)
    return None


def train_again(comm: Comm, out: Path, settings: dict[str, Any], attack: int) -> None:
    """Start the run, or go on with it."""
    train(
        config(**settings),
        out,
        auto_resume=True,
        comm=comm,
        execution=Execution(attack_ranks=attack),
    )


def skipped(comm: Comm, policy: str) -> Any:
    """Four steps of batch norm, rank 1's images spoilt in the third; this rank's state before and after that step."""
    engine = make(comm, "conadv", tiny_resnet("adv", dtype=torch.float64), on_nonfinite=policy)
    stream = [share(as_batch(t, count=2, dtype=torch.float64), comm) for t in range(4)]
    found, states = [], []
    for t, (batch, future) in enumerate(windows(stream, engine.ahead)):
        if t == 2 and comm.rank == 1:
            views = batch.micro[0].views
            micro = replace(batch.micro[0], views={**views, "clean": views["clean"] * float("nan")})
            batch = replace(batch, micro=(micro, *batch.micro[1:]))
        found.append(engine(batch, future).skipped)
        states.append(state(engine.model))
    return found, states[1], states[2], states[3]


def scattered(comm: Comm) -> str:
    return comm.scatter_objects(
        [f"for {rank}" for rank in range(comm.ranks)] if comm.is_main else None
    )


def gathered_pending(comm: Comm) -> tuple[dict[str, Any], int]:
    """Two micro-batches per rank, gathered; and the largest tensor that one message of this rank had."""
    sent: list[int] = []
    plain = comm.gather_objects

    def noted(value: Tensor) -> list[Tensor]:
        sent.append(value.numel())
        return plain(value)

    mine = [torch.full((1000,), 10.0 * comm.rank + m) for m in range(2)]
    waiting = {
        "5": {"images": mine, "labels": [image[:1].long() for image in mine], "weight_version": 4}
    }
    with mock.patch.object(comm, "gather_objects", noted):
        return gather(waiting, comm), max(sent)
