"""What each method's attack costs per step, beside ``noise``: by executor, local batch and ranks.

An adversarial batch for step t is made during step t - tau, so single steps cannot be interleaved. A
case is timed in bursts of consecutive steps of one engine, which goes on where its last burst ended.
Attack ranks serve the burst that the learners run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from conadv.config.schema import Config
from conadv.distributed.teams import Teams
from conadv.engine.attack_ranks.executor import Ranks
from conadv.engine.executors import Executor, Inline, Stream
from conadv.errors import ConadvError
from conadv.planning.timing import WARMUP, Case, Row, Sample, burst, mean, measure
from conadv.planning.trial import (
    Shape,
    Trial,
    with_method,
)
from conadv.types import Span

CONCURRENT = ("conadv", "conadv-lookahead")
EXECUTORS: dict[str, Callable[[Teams], Executor]] = {
    "inline": lambda teams: Inline(),
    "stream": lambda teams: Stream(),
    "ranks": Ranks,
}
Burst = Callable[[bool], Sample]
"""Run a burst on this rank, with backward overlap or without."""


@dataclass(frozen=True)
class Question:
    """What to time. batches: clean images per rank and step. steps: of a burst, after WARMUP others.

    executors: "inline", "stream" or "ranks", for conadv; other methods run inline. overlap: "on", "off"
    or "both": whether gradients leave for the other ranks while backward still runs.
    """

    config: Config
    shape: Shape
    methods: Sequence[str]
    batches: Sequence[int]
    executors: Sequence[str] = ("inline",)
    overlap: str = "on"
    steps: int = 4


def attack_cost(question: Question, rounds: int, teams: Teams) -> list[Row]:
    """Time the cases. Ranks: all of ``teams.world`` call it; rank 0 gets the rows."""
    with teams.world.agreed():
        _check(question, teams)
    torch.backends.cudnn.benchmark = True  # shapes are fixed: the fastest kernels, for all cases
    cases: dict[str, Case] = {}
    closing: list[Callable[[], object]] = []
    for size in question.batches:
        for method in question.methods:
            for how in question.executors if method in CONCURRENT else ("inline",):
                cases |= _cases(question, teams, method, how, size, closing)
    with teams.world.agreed():
        for name, case in cases.items():
            if case.yardstick not in cases:
                raise ConadvError(
                    f"{name!r} is compared with {case.yardstick!r}: add that to --methods."
                )
    rows = measure(cases, rounds, teams.world)
    for close in closing:
        close()
    return rows


def _check(question: Question, teams: Teams) -> None:
    if "ranks" in question.executors and not teams.attackers:
        raise ConadvError("--executors ranks needs --attack-ranks M, under torchrun.")
    if "stream" in question.executors and teams.comm.device.type != "cuda":
        raise ConadvError("--executors stream needs a CUDA device: give --device cuda.")
    if question.overlap != "on" and len(teams.learners) == 1:
        raise ConadvError(
            f"--overlap {question.overlap} has no effect on one learner: nothing is sent during backward."
        )


def _cases(
    question: Question,
    teams: Teams,
    method: str,
    how: str,
    size: int,
    closing: list[Callable[[], object]],
) -> dict[str, Case]:
    """One engine, with and without backward overlap as the question says."""
    learners = len(teams.learners)
    config = with_method(question.config, method)
    executor = EXECUTORS[how](teams)
    numbers = teams.micro_batches(1)
    trial = Trial(config, question.shape, teams.comm, size, numbers, executor)
    closing.append(executor.close)
    run = _burst(question, trial, teams, how)
    gradient_bytes = sum(p.nbytes for p in trial.engine.trainable().values())
    made = {}
    for overlap in (True, False) if question.overlap == "both" else (question.overlap == "on",):
        labels = {
            "method": method,
            "executor": how,
            "local_batch_size": size,
            "images": size * learners,
            "learners": learners,
            "ranks": learners + (len(teams.attackers) if how == "ranks" else 0),
            "overlap": overlap and learners > 1,
            "gradient_bytes": gradient_bytes,
        }
        yardstick = name_of("noise", "inline", size, overlap)
        made[name_of(method, how, size, overlap)] = Case(partial(run, overlap), yardstick, labels)
    return made


def name_of(method: str, how: str, size: int, overlap: bool) -> str:
    """The name of a case: whatever differs from an inline step with backward overlap is in it."""
    words = [method.replace("-lookahead", " + look-ahead"), f"batch {size}"]
    words += [how] if how != "inline" else []
    return ", ".join([*words, *([] if overlap else ["no overlap"])])


def _burst(question: Question, trial: Trial, teams: Teams, how: str) -> Burst:
    """What this rank does in a burst: learn, serve the learners, or nothing."""
    engine, steps = trial.engine, WARMUP + question.steps
    served = 0

    def learn(overlap: bool) -> Sample:
        if engine.reducer is not None:
            engine.reducer.overlap = overlap
        return burst(trial.phases, question.steps)

    def serve(overlap: bool) -> Sample:
        nonlocal served
        first = served + engine.ahead
        served += steps
        seen: list[list[Span]] = []
        batches = (trial.batch(step) for step in range(first, first + steps))
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
