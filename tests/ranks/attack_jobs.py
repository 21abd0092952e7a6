"""What learners and attack ranks run in the tests. Every function gets the world's Comm first."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from conadv import Batch, Comm, Concurrent, TrainStep, windows
from conadv.distributed.offset import clock_offset
from conadv.distributed.teams import Teams, make_teams
from conadv.engine.attack_ranks.executor import Ranks
from conadv.engine.attack_ranks.failed import FailedRank
from conadv.engine.attack_ranks.learner import Learner
from conadv.engine.execution import Execution
from conadv.engine.executors import Inline
from conadv.training.loop import train

from ..helpers import buffered_net, no_norm_net, state, tiny_resnet, train_step
from ..test_methods import ATTACK, CASES, SEED, SPACE, as_batch, sgd
from ..test_training import config
from .launch import until

LATE = 3  # with a gate, images of this step are late


@dataclass(frozen=True)
class Case:
    """One training run, on a single process or on learners and attack ranks.

    lost: (rank, "killed" or "stopped") in its third batch.
    save_at: a learner's state before this step is kept.
    gate: with late "skip", attack ranks hold the images of step LATE back until this file is there,
    which it is after the next step; otherwise learners give every message the time that it takes,
    so that nothing depends on it.
    """

    model: str = "batchnorm"
    tau: int = 1
    lookahead: bool | str = False
    micro: int = 2
    steps: int = 6
    share: float = 1.0
    mix: str = "add"
    late: str = "wait"
    options: Mapping[str, Any] = field(default_factory=dict)
    may_lose: bool = False
    lost: tuple[int, str] | None = None
    save_at: int | None = None
    gate: Path | None = None


class Trained(NamedTuple):
    records: list[dict[str, Any]]
    weights: dict[str, Tensor]
    failed: list[FailedRank]
    saved: Any


def engine_for(teams: Teams, case: Case) -> TrainStep:
    """The engine of one process; other ranks than 0 begin with weights that must not matter."""
    seed = teams.world.rank
    net: nn.Module = no_norm_net(seed=seed)
    if case.model == "buffers":
        net = buffered_net(seed)
    elif case.model != "no norm":
        net = tiny_resnet("adv", seed=seed)
    if case.model == "channels last":
        net = net.to(memory_format=torch.channels_last)
    # without momentum there is no closed form, and the look-ahead repeats the last update
    plain = case.lookahead == "last-update"
    optimizer = torch.optim.SGD(net.parameters(), 0.05) if plain else sgd(net)
    method = Concurrent(ATTACK, case.tau, bool(case.lookahead), share=case.share, mix=case.mix)
    executor = Ranks(teams, case.late) if teams.attackers else Inline()
    options = {"space": SPACE, "seed": SEED, "comm": teams.comm, "executor": executor}
    return train_step(net, optimizer, method, **options, **case.options)


def stream(teams: Teams, case: Case, first: int = 0) -> Iterator[Batch]:
    """Global batches of ``micro`` micro-batches, of which this process takes its own."""
    dtype = torch.float64 if case.model == "no norm" else torch.float32
    mine = teams.micro_batches(case.micro // len(teams.learners))
    for t in range(first, case.steps):
        batch = as_batch(t, count=case.micro, dtype=dtype)
        if case.lost and case.lost[0] == teams.world.rank and t == first + 2:
            if case.lost[1] == "killed":
                os._exit(7)
            os.kill(os.getpid(), signal.SIGSTOP)
        yield replace(batch, micro=tuple(batch.micro[index] for index in mine))


def training(world: Comm, attack_ranks: int, case: Case) -> Trained | list[int]:
    """All steps of a case; an attack rank returns the steps that it served."""
    teams = make_teams(world, attack_ranks, case.may_lose)
    engine = engine_for(teams, case)
    return attacked(engine, teams, case) if teams.attacking else trained(engine, teams, case)


def attacked(engine: TrainStep, teams: Teams, case: Case) -> list[int]:
    served: list[int] = []
    plain = engine.attack_batch

    def gated(attack: Any, batch: Batch, weights: Any) -> Any:
        if case.gate is not None and batch.step == LATE:
            until(case.gate.exists, 60, "the gate")
        return plain(attack, batch, weights)

    with mock.patch.object(engine, "attack_batch", gated):
        engine.serve(stream(teams, case, case.tau), lambda step, _: served.append(step))
    engine.executor.close()
    return served


def trained(engine: TrainStep, teams: Teams, case: Case, first: int = 0) -> Trained:
    records, saved = [], None
    pairs = windows(stream(teams, case, first), case.tau)
    for t, (batch, future) in enumerate(pairs, first):
        if t == case.save_at:
            parts = (engine.state_dict(), state(engine.model), engine.optimizer.state_dict())
            saved = deepcopy(parts)
        if case.late == "skip" and teams.attackers:
            give_time(engine.executor._side, case, t)  # type: ignore[attr-defined]
        records.append(asdict(engine(batch, future)))
        if case.gate is not None and t == LATE + 1:
            case.gate.touch()
    failed = engine.executor.failed_ranks()
    engine.executor.close()
    return Trained(records, state(engine.model), failed, saved)


def give_time(learner: Learner, case: Case, step: int) -> None:
    """Wait for what the step needs, but for what the gate holds back."""
    handles = [] if case.gate and step == LATE + 1 else list(learner._sent.values())
    if step in learner._incoming and not (case.gate and step in (LATE, LATE + 1)):
        handles += [arrival.handle for arrival in learner._incoming[step].arrivals]
    for handle in handles:
        until(lambda h=handle: h.done, 60, "a message")


def resumed(case: Case, saved: Any) -> Trained:
    """What one process makes of a saved state."""
    assert case.save_at is not None
    teams = make_teams(Comm(), 0)
    engine = engine_for(teams, case)
    for part, values in zip((engine, engine.model, engine.optimizer), saved, strict=True):
        part.load_state_dict(values)
    return trained(engine, teams, case, case.save_at)


SMALL = Case("no norm")


def learner_fails(world: Comm) -> bool:
    """The learner ends with an error of its own and says so; what the attack rank returns then."""
    teams = make_teams(world, 1)
    engine = engine_for(teams, SMALL)
    if teams.attacking:
        engine.serve(stream(teams, replace(SMALL, steps=100), 1))
        return engine.executor.close()
    for batch, future in windows(stream(teams, SMALL), 1):
        engine(batch, future)
    return engine.executor.close(failed=True)


def other_data(world: Comm, what: str) -> None:
    """The attack rank reads other steps, or other micro-batches, than the learner asks for."""
    teams = make_teams(world, 1)
    engine = engine_for(teams, SMALL)
    if not teams.attacking:
        trained(engine, teams, SMALL)
        return
    batches = stream(teams, SMALL, 2 if what == "steps" else 1)
    if what == "micro-batches":
        batches = (replace(batch, micro=batch.micro[:1]) for batch in batches)
    engine.serve(batches)


def frozen_learner(world: Comm) -> None:
    """The learner freezes a layer after its first step."""
    teams = make_teams(world, 1)
    engine = engine_for(teams, SMALL)
    if teams.attacking:
        engine.serve(stream(teams, SMALL, 1))
    for batch, future in windows(stream(teams, SMALL), 1):
        engine(batch, future)
        engine.model[0].requires_grad_(False)


def wrong(world: Comm, what: str) -> None:
    """Mistakes that are found before anything is sent."""
    teams = make_teams(world, 2 if what == "no learner" else 1)
    net = no_norm_net()
    method = {
        "no attack": CASES["noise"],
        "running": lambda: Concurrent(ATTACK, 1, attack_statistics="running"),
    }.get(what, lambda: Concurrent(ATTACK, 1))()
    executor = Ranks(teams, "never" if what == "late" else "wait")
    comm = Comm() if what == "comm" else teams.comm
    engine = train_step(net, sgd(net), method, space=SPACE, comm=comm, executor=executor)
    if teams.attacking:
        engine(as_batch(0, dtype=torch.float64))
    engine.serve([])


def wrong_share(world: Comm) -> None:
    """The learner gives the micro-batch of another rank."""
    engine = engine_for(make_teams(world, 1), SMALL)
    if world.rank == 0:
        other = as_batch(1, count=2).micro[1:]
        engine(as_batch(0, dtype=torch.float64), replace(as_batch(1), micro=other))


def offset(world: Comm, shift: float) -> float:
    """What rank 0 and 1 take for their difference if rank 1's clock is ahead by ``shift``."""
    monotonic = time.monotonic
    with mock.patch("time.monotonic", side_effect=lambda: monotonic() + shift * world.rank):
        return clock_offset(world)


def one_agent(world: Comm) -> None:
    """All ranks say that one torchrun has started them."""
    with mock.patch.dict(os.environ, TORCHELASTIC_RUN_ID="x", GROUP_RANK="0"):
        make_teams(world, 1, may_lose=True)


def lose_of_a_run(
    world: Comm, out: Path, settings: dict[str, Any], attack_ranks: int, lost: bool
) -> Any:
    """A whole run whose last attack rank dies in its third attack, if ``lost``."""
    plain, calls = TrainStep.attack_batch, [0]

    def counted(engine: TrainStep, *args: Any) -> Any:
        calls[0] += 1
        if lost and world.rank == world.ranks - 1 and calls[0] == 3:
            os._exit(7)
        return plain(engine, *args)

    execution = Execution(attack_ranks=attack_ranks, on_attack_loss="continue")
    with mock.patch.object(TrainStep, "attack_batch", counted):
        return train(config(**settings), out, auto_resume=True, comm=world, execution=execution)
