"""What learners and attack ranks run in the tests. Every function gets the world's Comm first."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from conadv import Batch, Comm, Concurrent, TrainStep, windows
from conadv.distributed.offset import clock_offset
from conadv.distributed.teams import Teams, make_teams
from conadv.engine.attack_ranks.executor import Ranks
from conadv.engine.execution import Execution
from conadv.engine.executors import Inline
from conadv.training.loop import train

from ..helpers import no_norm_net, state, tiny_resnet, train_step
from ..test_methods import ATTACK, CASES, SEED, SPACE, as_batch, sgd
from ..test_training import config

MODELS = {
    "batchnorm": lambda seed: tiny_resnet("adv", seed=seed),
    "channels_last": lambda seed: tiny_resnet("adv", seed=seed).to(
        memory_format=torch.channels_last
    ),
    "no norm": lambda seed: no_norm_net(seed=seed),
}
Answer = tuple[list[dict[str, Any]], dict[str, Tensor]] | list[int]


def method(tau: int, lookahead: bool | str) -> Concurrent:
    return Concurrent(ATTACK, tau, bool(lookahead))


def optimizer(net: nn.Module, lookahead: bool | str) -> torch.optim.Optimizer:
    """SGD; for the look-ahead "last-update" without momentum, which it has no closed form for."""
    return torch.optim.SGD(net.parameters(), 0.05) if lookahead == "last-update" else sgd(net)


def engine_for(
    teams: Teams, model: str, tau: int, lookahead: bool | str, late: str = "wait", **options: Any
) -> TrainStep:
    """The engine of one process; ranks other than 0 begin with other weights, which must not matter."""
    net: nn.Module = MODELS[model](teams.world.rank)
    executor = Ranks(teams, late) if teams.attackers else Inline()
    made = method(tau, lookahead)
    return train_step(
        net,
        optimizer(net, lookahead),
        made,
        space=SPACE,
        seed=SEED,
        comm=teams.comm,
        executor=executor,
        **options,
    )


def stream(teams: Teams, model: str, micro: int, steps: range) -> Iterator[Batch]:
    """Global batches of ``micro`` micro-batches, of which this process takes its own."""
    dtype = torch.float64 if model == "no norm" else torch.float32
    mine = teams.micro_batches(micro // len(teams.learners))
    for t in steps:
        batch = as_batch(t, count=micro, dtype=dtype)
        yield replace(batch, micro=tuple(batch.micro[index] for index in mine))


def learn(
    engine: TrainStep, teams: Teams, model: str, micro: int, steps: int, first: int = 0
) -> list[dict[str, Any]]:
    batches = stream(teams, model, micro, range(first, steps))
    return [asdict(engine(batch, future)) for batch, future in windows(batches, engine.ahead)]


def training(
    world: Comm,
    attack_ranks: int,
    model: str,
    tau: int,
    lookahead: bool | str,
    micro: int,
    options: dict[str, Any],
) -> Answer:
    """Six steps; a learner returns records and state, an attack rank the steps that it served."""
    teams = make_teams(world, attack_ranks)
    engine = engine_for(teams, model, tau, lookahead, **options)
    if teams.attacking:
        served: list[int] = []
        engine.serve(
            stream(teams, model, micro, range(tau, 6)), lambda step, _: served.append(step)
        )
        engine.executor.close()
        return served
    records = learn(engine, teams, model, micro, 6)
    engine.executor.close()
    return records, state(engine.model)


def shared(world: Comm, attack_ranks: int, late: str) -> Answer:
    """As ``training`` with staleness 1, where half of each micro-batch is attacked."""
    teams, micro = make_teams(world, attack_ranks), 2
    net = MODELS["batchnorm"](teams.world.rank)
    made = Concurrent(ATTACK, 1, share=0.5)
    executor = Ranks(teams, late) if teams.attackers else Inline()
    engine = train_step(
        net, sgd(net), made, space=SPACE, seed=SEED, comm=teams.comm, executor=executor
    )
    if teams.attacking:
        served: list[int] = []
        engine.serve(
            stream(teams, "batchnorm", micro, range(1, 8)), lambda step, _: served.append(step)
        )
        engine.executor.close()
        return served
    records = learn(engine, teams, "batchnorm", micro, 8)
    engine.executor.close()
    return records, state(engine.model)


def interrupted(world: Comm, tau: int, at: int) -> Any:
    """Save after ``at`` steps, while images are under way, and go on; then resume from the saved state, inline."""
    teams = make_teams(world, 1)
    engine = engine_for(teams, "batchnorm", tau, True)
    if teams.attacking:
        engine.serve(stream(teams, "batchnorm", 1, range(tau, 6)))
        engine.executor.close()
        return None
    batches = windows(stream(teams, "batchnorm", 1, range(6)), tau)
    records = [asdict(engine(*next(batches))) for _ in range(at)]
    saved = engine.state_dict()
    model, optimizer = state(engine.model), deepcopy(engine.optimizer.state_dict())
    records += [asdict(engine(batch, future)) for batch, future in batches]
    engine.executor.close()
    return records, state(engine.model), (saved, model, optimizer)


def slow_attacker(world: Comm, attack_ranks: int, late: str, seconds: float) -> Answer:
    """As ``training``, but the attack of step 3 takes ``seconds``, and every learner's step a little."""
    teams, micro = make_teams(world, attack_ranks), 2
    engine = engine_for(teams, "no norm", 1, False, late)
    if teams.attacking:
        craft = engine.attack_batch

        def slow(attack: Any, batch: Batch, weights: Any) -> Any:
            time.sleep(seconds if batch.step == 3 else 0.0)
            return craft(attack, batch, weights)

        with mock.patch.object(engine, "attack_batch", slow):
            engine.serve(stream(teams, "no norm", micro, range(1, 12)))
        engine.executor.close()
        return []
    records = []
    for batch, future in windows(stream(teams, "no norm", micro, range(12)), 1):
        time.sleep(0.05)
        records.append(asdict(engine(batch, future)))
    engine.executor.close()
    return records, state(engine.model)


def someone_dies(world: Comm, who: int) -> None:
    """Rank ``who`` ends in the middle of training."""
    teams = make_teams(world, 1)
    engine = engine_for(teams, "no norm", 1, False)
    micro = len(teams.learners)

    def until_death(batches: Iterator[Batch]) -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            if world.rank == who and number == 3:
                os._exit(7)
            yield batch

    batches = until_death(stream(teams, "no norm", micro, range(1 if teams.attacking else 0, 100)))
    if teams.attacking:
        engine.serve(batches)
    else:
        for batch, future in windows(batches, 1):
            engine(batch, future)


def losing(
    world: Comm,
    attack_ranks: int,
    model: str,
    tau: int,
    lookahead: bool | str,
    options: dict[str, Any],
    how: str,
) -> Any:
    """Eight steps of two micro-batches; the last rank, an attack rank, is lost in its third attack.

    ``how``: "killed", "stopped" (hangs for good) or "kept" (it is not lost). A learner returns records, final state,
    what it has lost, and what a checkpoint after five steps would hold; an attack rank the steps that it served.
    """
    teams = make_teams(world, attack_ranks, may_lose=True)
    engine = engine_for(teams, model, tau, lookahead, **options)
    if teams.attacking:
        served: list[int] = []

        def until_lost(batches: Iterator[Batch]) -> Iterator[Batch]:
            for number, batch in enumerate(batches):
                if world.rank == world.ranks - 1 and number == 2:
                    _be_lost(how)
                yield batch

        batches = until_lost(stream(teams, model, 2, range(tau, 8)))
        engine.serve(batches, lambda step, _: served.append(step))
        engine.executor.close()
        return served
    pairs = windows(stream(teams, model, 2, range(8)), tau)
    records = [asdict(engine(*next(pairs))) for _ in range(5)]
    saved = deepcopy((engine.state_dict(), state(engine.model), engine.optimizer.state_dict()))
    for batch, future in pairs:
        time.sleep(
            1.5 if how == "stopped" and options.get("late") == "skip" else 0.0
        )  # nobody waits otherwise
        records.append(asdict(engine(batch, future)))
    losses = engine.executor.failed_ranks()
    engine.executor.close()
    return records, state(engine.model), losses, saved


def _be_lost(how: str) -> None:
    if how == "killed":
        os._exit(7)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)


def lose_of_a_run(
    world: Comm, out: Path, settings: dict[str, Any], attack_ranks: int, lost: bool
) -> Any:
    """A whole run whose last attack rank dies in its third attack, if ``lost``."""
    craft, calls = TrainStep.attack_batch, [0]

    def counted(engine: TrainStep, *args: Any) -> Any:
        calls[0] += 1
        if lost and world.rank == world.ranks - 1 and calls[0] == 3:
            os._exit(7)
        return craft(engine, *args)

    execution = Execution(attack_ranks=attack_ranks, on_attack_loss="continue")
    with mock.patch.object(TrainStep, "attack_batch", counted):
        return train(config(**settings), out, auto_resume=True, comm=world, execution=execution)


def learner_fails(world: Comm) -> bool:
    """The learner ends with an error of its own and says so; returns what the attack rank makes of it."""
    teams = make_teams(world, 1)
    engine = engine_for(teams, "no norm", 1, False)
    if teams.attacking:
        engine.serve(stream(teams, "no norm", 1, range(1, 100)))
        return engine.executor.close()
    learn(engine, teams, "no norm", 1, 3)
    return engine.executor.close(failed=True)


def other_data(world: Comm, what: str) -> None:
    """The attack rank reads other steps, or other micro-batches, than the learner asks for."""
    teams = make_teams(world, 1)
    engine = engine_for(teams, "no norm", 1, False)
    if not teams.attacking:
        learn(engine, teams, "no norm", 2, 4)
        return
    batches = stream(teams, "no norm", 2, range(2 if what == "steps" else 1, 6))
    if what == "micro-batches":
        batches = (replace(batch, micro=batch.micro[:1]) for batch in batches)
    engine.serve(batches)


def wrong(world: Comm, what: str) -> None:
    """Mistakes that are found before anything is sent."""
    if what == "no learner":
        make_teams(world, 2)
    teams = make_teams(world, 1)
    if what == "no attack":
        model = no_norm_net()
        train_step(model, sgd(model), CASES["noise"](), comm=teams.comm, executor=Ranks(teams))
    if what == "running":
        net = no_norm_net()
        train_step(
            net,
            sgd(net),
            Concurrent(ATTACK, 1, attack_statistics="running"),
            comm=teams.comm,
            executor=Ranks(teams),
        )
    if what == "comm":
        net = no_norm_net()
        train_step(net, sgd(net), method(1, False), space=SPACE, comm=Comm(), executor=Ranks(teams))
    engine = engine_for(teams, "no norm", 1, False, "never" if what == "late" else "wait")
    if what == "roles" and teams.attacking:
        engine(as_batch(0))
    if what == "roles":
        engine.serve([])


def wrong_share(world: Comm) -> None:
    """The learner gives the micro-batch of another rank."""
    engine = engine_for(make_teams(world, 1), "no norm", 1, False)
    if world.rank == 0:
        engine(
            as_batch(0, dtype=torch.float64),
            replace(as_batch(1), micro=as_batch(1, count=2).micro[1:]),
        )


def offset(world: Comm, shift: float) -> float:
    """What rank 0 and 1 take for their difference if rank 1's clock is ahead by ``shift``."""
    monotonic = time.monotonic
    with mock.patch("time.monotonic", side_effect=lambda: monotonic() + shift * world.rank):
        return clock_offset(world)


def run(
    world: Comm, out: Path, changes: dict[str, Any], attack_ranks: int, resume: bool = False
) -> dict[str, Any]:
    execution = Execution(attack_ranks=attack_ranks, timeline_steps=4)
    return train(config(**changes), out, resume=resume, comm=world, execution=execution)
