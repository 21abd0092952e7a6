"""What each method's attack costs per step, by executor, local batch and ranks.

Beside ``noise``; where extra images replace clean ones, beside ``vanilla``.

An adversarial batch for step t is made during step t - tau, so single steps cannot be interleaved.
A case is timed in bursts of consecutive steps of one engine, which goes on where its last burst
ended. Attack ranks serve the burst that the learners run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch

from conadv.config.schema import Config
from conadv.distributed.teams import Teams
from conadv.engine.attack_ranks.executor import Ranks
from conadv.engine.executors import Executor, Inline, Stream
from conadv.errors import ConadvError
from conadv.planning.timing import WARMUP, Case, Row, Sample, burst, mean, measure
from conadv.planning.trial import Shape, Trial, with_method
from conadv.types import Span

EXECUTORS: dict[str, Callable[[Teams], Executor]] = {
    "inline": lambda teams: Inline(),
    "stream": lambda teams: Stream(),
    "ranks": Ranks,
}


def attack_cost(
    config: Config,
    shape: Shape,
    teams: Teams,
    rounds: int,
    *,
    methods: Sequence[str],
    batches: Sequence[int],
    executors: Sequence[str] = ("inline",),
    overlaps: Sequence[bool] = (True,),
    steps: int = 4,
) -> list[Row]:
    """Time a step of each method, batch (clean images per rank) and executor.

    executors: those of conadv; other methods run inline. overlaps: whether gradients leave for the
    other ranks while backward still runs. steps: of a burst, after WARMUP others.
    Ranks: all of ``teams.world`` call it; rank 0 gets the rows.
    """
    if False in overlaps and len(teams.learners) == 1:
        raise ConadvError(
            "--overlap has no effect on one learner: nothing is sent during backward."
        )
    for needed, by in (("noise", ""), ("vanilla", "-replace")):
        if needed not in methods and any(name.endswith(by) for name in methods):
            raise ConadvError(f"--methods needs {needed!r} too: others are compared with it.")
    torch.backends.cudnn.benchmark = True  # shapes are fixed: the fastest kernels, for all cases
    cases: dict[str, Case] = {}
    opened: list[Executor] = []
    for size, method in product(batches, methods):
        # What replaces clean images computes as many gradients as plain training, not as noise.
        replaces = method.endswith("-replace")
        stale = method.startswith("conadv") and not replaces
        for how in executors if stale else ("inline",):
            opened.append(EXECUTORS[how](teams))
            numbers, learners = teams.micro_batches(1), len(teams.learners)
            trial = Trial(with_method(config, method), shape, teams.comm, size, numbers, opened[-1])
            run = _burst(trial, teams, how, steps)
            labels = {
                "method": method,
                "executor": how,
                "local_batch_size": size,
                "images": size * learners,
                "learners": learners,
                "ranks": learners + (len(teams.attackers) if how == "ranks" else 0),
                "gradient_bytes": sum(p.nbytes for p in trial.engine.trainable().values()),
            }
            for overlap in overlaps:
                other = name_of("vanilla" if replaces else "noise", "inline", size, overlap)
                about = labels | {"overlap": overlap and learners > 1}
                case = Case(partial(run, overlap), other, about)
                cases[name_of(method, how, size, overlap)] = case
    rows = measure(cases, rounds, teams.world)
    for executor in opened:
        executor.close()
    return rows


def name_of(method: str, how: str, size: int, overlap: bool) -> str:
    """The name of a case: its method, batch, and what differs from an inline step with overlap."""
    words = [method.replace("-lookahead", " + look-ahead"), f"batch {size}"]
    words += [how] if how != "inline" else []
    return ", ".join([*words, *([] if overlap else ["no overlap"])])


def _burst(trial: Trial, teams: Teams, how: str, steps: int) -> Callable[[bool], Sample]:
    """What this rank does in a burst: learn, serve the learners, or nothing."""
    engine, count = trial.engine, WARMUP + steps
    served = 0

    def learn(overlap: bool) -> Sample:
        if engine.gradients.reducer is not None:
            engine.gradients.reducer.overlap = overlap
        return burst(trial.phases, steps)

    def serve(overlap: bool) -> Sample:
        nonlocal served
        first = served + engine.ahead
        served += count
        seen: list[list[Span]] = []
        batches = map(trial.batch, range(first, first + count))
        engine.serve(batches, lambda step, spans: seen.append(spans))
        return Sample(None, mean(map(seconds_of, seen[WARMUP:])))

    if not teams.attacking:
        return learn
    return serve if how == "ranks" else lambda overlap: Sample(None)


def seconds_of(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds per phase on an attack rank; transfers run beside the phases and are left out."""
    phases: dict[str, float] = {}
    for name, begin, end in spans:
        if name != "transfer":
            phases[name] = phases.get(name, 0.0) + end - begin
    return phases
