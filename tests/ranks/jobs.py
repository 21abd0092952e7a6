"""What the ranks of the tests run.

Every function gets the Comm first and returns plain values and tensors.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conadv import EMA, FGSM, LARS, Batch, Comm, ConadvError, TrainStep, split_batchnorm, windows
from conadv.config.schema import Config
from conadv.distributed import reducer
from conadv.distributed.handle import Handle
from conadv.engine.execution import Execution
from conadv.engine.pending import gather
from conadv.nn.split_batchnorm import check_sync
from conadv.training.evaluate import evaluate
from conadv.training.loop import train
from conadv.training.precise_bn import recalibrate
from conadv.training.signals import Stopped

from ..helpers import images, no_norm_net, state, tiny_resnet, train_step
from ..test_methods import CASES, EPS, SEED, SPACE, as_batch, sgd
from ..test_training import config

F64 = torch.float64
Answer = tuple[list[dict[str, Any]], dict[str, Tensor]]
OPTIMIZERS = {"sgd": sgd, "lars": lambda model: LARS(model.parameters(), 5.0)}


def small_resnet(seed: int = 0) -> nn.Module:
    return tiny_resnet("adv", seed=seed, dtype=F64)


def batch_of(comm: Comm, step: int, count: int | None = None) -> Batch:
    """This rank's micro-batches of the global batch of ``count``."""
    batch = as_batch(step, count=count or comm.ranks, dtype=F64)
    mine = len(batch.micro) // comm.ranks
    return replace(batch, micro=batch.micro[comm.rank * mine : (comm.rank + 1) * mine])


def make(
    comm: Comm, case: str, model: nn.Module, optimizer: str = "sgd", **options: Any
) -> TrainStep:
    """``bucket_mib``: size of the reducer's buckets."""
    bucket_mib = options.pop("bucket_mib", reducer.BUCKET_MIB)
    options |= {"space": SPACE, "seed": SEED, "comm": comm}
    with mock.patch.object(reducer, "BUCKET_MIB", bucket_mib):
        return train_step(model, OPTIMIZERS[optimizer](model), CASES[case](), **options)


def steps(engine: TrainStep, count: int | None, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """Train on this rank's share of global batches of ``count`` micro-batches."""
    stream = [batch_of(engine.comm, t, count) for t in numbers]
    return [asdict(engine(batch, future)) for batch, future in windows(stream, engine.ahead)]


# ---- training


def without_statistics(
    comm: Comm, case: str, count: int, options: dict[str, Any], optimizer: str = "sgd"
) -> Answer:
    """Five float64 steps without batch statistics; rank 1's own weights must not matter."""
    engine = make(comm, case, no_norm_net(seed=comm.rank), optimizer, **options)
    return steps(engine, count, range(5)), state(engine.model)


def with_batchnorm(comm: Comm, case: str, options: dict[str, Any]) -> tuple[Answer, Any]:
    """Four steps with batch norm, this rank's state after them, and the evaluation."""
    engine = make(comm, case, small_resnet(comm.rank), **options)
    records = steps(engine, 2 * comm.ranks, range(4))
    own = state(engine.model)
    comm.broadcast(engine.model.buffers())
    return (records, own), evaluation(comm, engine.model, 5, None)


def mine_of(comm: Comm, batch: int, count: int) -> list[tuple[Tensor, Tensor]]:
    x, y = images(count, 5, F64)
    return list(zip(x.split(batch), y.split(batch), strict=True))[comm.rank :: comm.ranks]


def evaluation(comm: Comm, model: nn.Module | None, batch: int, attack: Any) -> Any:
    model, data = model or small_resnet(), mine_of(comm, batch, 23)
    return evaluate(model, data, SPACE, attack=attack, seed=SEED, comm=comm)


def recalibration(comm: Comm, batch: int) -> dict[str, Tensor]:
    model, data = small_resnet(), mine_of(comm, batch, 4 * batch)
    for name, attack in (("clean", None), ("adv", FGSM(EPS, space=SPACE))):
        recalibrate(model, data, SPACE, route=name, attack=attack, comm=comm)
    return state(model)


def launches(comm: Comm, case: str, count: int, options: dict[str, Any]) -> dict[str, int]:
    """Counts from the last of four steps, by what the reducer has done when."""
    engine, seen = make(comm, case, small_resnet(), **options), dict[str, int]()
    buckets = engine.gradients.reducer
    assert buckets is not None

    def watch(owner: Any, name: str, key: str, value: Callable[[], int]) -> Any:
        original = getattr(owner, name)

        def watched(*args: Any) -> Any:
            seen[key] = value()
            return original(*args)

        return mock.patch.object(owner, name, watched)

    def on_the_way() -> int:
        return len(buckets._handles)

    wait = Handle.wait

    def counted_wait(handle: Handle) -> Tensor:
        seen["waits"] = seen.get("waits", 0) + 1
        return wait(handle)

    stream = [batch_of(comm, t, count) for t in range(4)]
    with (
        watch(buckets, "launch", "left during backward", on_the_way),
        watch(engine, "prepare", "on the way while attacking", on_the_way),
        watch(buckets, "wait", "buckets", on_the_way),
        mock.patch.object(Handle, "wait", counted_wait),
    ):
        for batch, future in windows(stream, engine.ahead):
            seen.clear()
            engine(batch, future)
    return seen


def skipped(comm: Comm, policy: str) -> Any:
    """Four steps with batch norm, rank 1's images spoilt in the third; states around that step."""
    engine = make(comm, "conadv", small_resnet(), on_nonfinite=policy)
    found, states = [], []
    stream = [batch_of(comm, t) for t in range(4)]
    for t, (batch, future) in enumerate(windows(stream, engine.ahead)):
        if t == 2 and comm.rank == 1:
            batch.micro[0].views["clean"].fill_(float("nan"))
        found.append(engine(batch, future).skipped)
        states.append(state(engine.model))
    return found, states[1], states[2], states[3]


# ---- what cannot work


def non_finite(comm: Comm) -> None:
    """Rank 1 has an infinite gradient in step 2."""
    engine = make(comm, "vanilla", no_norm_net())
    steps(engine, None, range(2))
    if comm.rank == 1:
        engine.model[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    engine(batch_of(comm, 2))


def gone(comm: Comm, culprit: int, how: str) -> None:
    """In step 2 ``culprit`` is killed, stopped or held up, or leaves with gradients under way."""
    engine = make(comm, "conadv", no_norm_net())
    for t in range(100):
        batch, future = batch_of(comm, t), batch_of(comm, t + 1)
        if comm.rank == culprit and t == 2:
            comm.at("data", t)
            if how == "leaves":
                comm.close()
                return
            if how == "held up":
                time.sleep(120)
            os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        engine(batch, future)


def uneven(comm: Comm) -> None:
    """A loader that gives rank 0 seven images and rank 1 three."""
    make(comm, "vanilla", no_norm_net())(images(7 - 4 * comm.rank, dtype=F64))


def gradient_twice(comm: Comm) -> None:
    engine = make(comm, "vanilla", no_norm_net())
    for _ in range(2):
        engine.gradient(batch_of(comm, 0))
        engine.wait()


def switch(engine: TrainStep, t: int) -> None:
    """Unfreeze the first layer before step 2, and freeze the last one before step 4."""
    if t in (0, 2):
        engine.model[0].requires_grad_(t == 2)
    if t == 2:
        engine.optimizer.add_param_group({"params": list(engine.model[0].parameters())})
    if t == 4:
        engine.model[-1].requires_grad_(False)


def switched(comm: Comm, case: str, optimizer: str, options: dict[str, Any]) -> Answer:
    """Six steps in which what is trained changes twice."""
    options = {"clip_norm": 0.5, **options}
    net = no_norm_net(seed=comm.rank)
    net[0].requires_grad_(False)
    trained = nn.ModuleList(net[1:])
    bucket_mib = options.pop("bucket_mib", reducer.BUCKET_MIB)
    options |= {"space": SPACE, "seed": SEED, "comm": comm}
    with mock.patch.object(reducer, "BUCKET_MIB", bucket_mib):
        engine = train_step(net, OPTIMIZERS[optimizer](trained), CASES[case](), **options)
    average = EMA(net, 0.9)
    records, stream = [], [batch_of(comm, t, 2) for t in range(6)]
    for t, (batch, future) in enumerate(windows(stream, engine.ahead)):
        switch(engine, t)
        records.append(asdict(engine(batch, future)))
        average.update_parameters(net)
    return records, state(net) | state(average)


def switched_alone(comm: Comm, name: str, trains: bool) -> None:
    """Rank 1 alone trains a layer, or none, from step 1 on."""
    engine = make(comm, "disadv", no_norm_net())
    steps(engine, None, range(1))
    if comm.rank == 1:
        engine.model.get_submodule(name).requires_grad_(trains)
    steps(engine, None, range(1, 3))


def frozen_alone(comm: Comm) -> None:
    """Rank 1 alone has a frozen layer from the start."""
    net = no_norm_net()
    net[2].requires_grad_(comm.rank == 0)
    steps(make(comm, "vanilla", net), None, range(1))


class Reentrant(nn.Module):
    """One layer used in two segments that are recomputed: its gradient is finished twice."""

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
    steps(make(comm, "vanilla", Reentrant()), None, range(3))


def no_wait(comm: Comm) -> None:
    engine = make(comm, "vanilla", no_norm_net())
    engine.gradient(batch_of(comm, 0))
    engine.advance()


def disagree(comm: Comm) -> None:
    """Rank 1 alone finds something wrong."""
    with comm.agreed():
        if comm.rank == 1:
            raise ConadvError("The folder /data is not here.")


def sync_batchnorm(comm: Comm) -> None:
    model = split_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(tiny_resnet()), "adv")
    make(comm, "conadv", model)


def sync_over(comm: Comm, ranks: int) -> None:
    """What is not on the CPU is checked for who takes part."""
    check_sync(nn.SyncBatchNorm.convert_sync_batchnorm(tiny_resnet()).to("meta"), ranks)


def no_comm(comm: Comm) -> None:
    model = tiny_resnet("adv")
    train_step(model, sgd(model), CASES["conadv"](), space=SPACE)


def environment_again(comm: Comm) -> None:
    Comm.from_environment("cpu")


# ---- collectives


def adopted(comm: Comm) -> tuple[int, int, float]:
    """A Comm of the process group that is there."""
    mine = Comm.from_process_group("cpu")
    return mine.rank, mine.ranks, float(mine.all_reduce(torch.tensor([comm.rank + 1.0])))


def scattered(comm: Comm) -> str:
    values = [f"for {rank}" for rank in range(comm.ranks)]
    return comm.scatter_objects(values if comm.is_main else None)


def gathered_pending(comm: Comm) -> tuple[dict[str, Any], int]:
    """Two micro-batches per rank, gathered, and the largest tensor in a message of this rank."""
    mine = [torch.full((1000,), 10.0 * comm.rank + m) for m in range(2)]
    labels = [image[:1].long() for image in mine]
    waiting = {"5": {"images": mine, "labels": labels, "weight_version": 4}}
    plain = comm.gather_objects
    with mock.patch.object(comm, "gather_objects", side_effect=plain) as calls:
        gathered = gather(waiting, comm)
    return gathered, max(call.args[0].numel() for call in calls.call_args_list)


# ---- whole runs


def train_run(
    comm: Comm,
    out: Path,
    changes: dict[str, Any] | Config,
    resume: bool = False,
    **options: Any,
) -> dict[str, Any]:
    settings = changes if isinstance(changes, Config) else config(**changes)
    return train(settings, out, resume=resume, comm=comm, **options)


def train_on_data_of_its_own(comm: Comm, folder: Path) -> None:
    """Each rank's images lie in a folder of its own."""
    data = {"source": "folder", "dir": folder / f"data{comm.rank}", "image_size": 8}
    changes = {"global_batch_size": 8, "micro_batch_size": 4, "model__width": None}
    train(config(**changes, data=data), folder / "run", comm=comm)


def with_attack_ranks(
    comm: Comm, out: Path, changes: dict[str, Any], attack: int, resume: bool = False
) -> Any:
    execution = Execution(attack_ranks=attack, timeline_steps=4)
    return train_run(comm, out, changes, resume, execution=execution)


def other_settings(comm: Comm, out: Path) -> None:
    train_run(comm, out, {"seed": comm.rank})


def stopped_run(
    comm: Comm, out: Path, settings: dict[str, Any], rank: int, number: int, attack: int
) -> Any:
    """Train; ``rank`` alone gets a signal, in its fourth update or attack."""
    name = "attack_batch" if comm.rank >= comm.ranks - attack else "update"
    original, calls = getattr(TrainStep, name), [0]

    def counted(engine: TrainStep, *args: Any) -> Any:
        calls[0] += 1
        if comm.rank == rank and calls[0] == 4:
            os.kill(os.getpid(), number)
        return original(engine, *args)

    with mock.patch.object(TrainStep, name, counted):
        try:
            with_attack_ranks(comm, out, settings, attack)
        except Stopped as stopped:
            return stopped.code, str(stopped)
    return None


def train_again(comm: Comm, out: Path, settings: dict[str, Any], attack: int) -> None:
    """Start the run, or go on with it."""
    execution = Execution(attack_ranks=attack)
    train_run(comm, out, settings, auto_resume=True, execution=execution)
