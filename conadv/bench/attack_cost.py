"""What each method's attack costs per training step, beside ``noise``: by executor, local batch and ranks.

An adversarial batch for step t is made during step t - tau, so single steps cannot be interleaved. A case is timed in
bursts of consecutive steps of one engine, which goes on where its last burst ended; the first steps of a burst, with
cold caches and images of the last burst, are not timed. Attack ranks serve the burst that the learners run.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conadv.bench import output
from conadv.bench.harness import Case, Row, Sample, measure, nothing, synchronize
from conadv.bench.options import CONCURRENT, AttackCostArgs
from conadv.bench.workload import METHODS, SPACE, micro_batches, network, optimizer
from conadv.distributed.comm import Comm
from conadv.distributed.teams import Teams, make_teams, roles
from conadv.engine import Executor, Inline, Ranks, Stream, TrainStep
from conadv.errors import ConadvError
from conadv.types import Batch, MicroBatch, Span

OWN_LOOPS = ("plain", "ddp")  # vanilla without the engine
Burst = Callable[[bool], Sample]
"""Run a burst on this rank, with backward overlap or without."""


def command(options: AttackCostArgs) -> None:
    """Measure, print a table, write JSON. Ranks: all of torchrun's processes call it; rank 0 prints and writes."""
    world = Comm.from_environment(options.device, options.comm_timeout)
    try:
        with world.agreed():
            _check_ranks(options, world)
            output.prepare(options)
        teams = make_teams(world, options.attack_ranks)
        cases = build(options, teams)
        torch.backends.cudnn.benchmark = (
            True  # shapes are fixed: let it find the fastest kernels, for all cases alike
        )
        # one round to warm up: the reducer learns, and every burst has untimed steps of its own
        rows = measure(
            cases, options.rounds, seconds=options.seconds, seed=options.seed, warmup=1, world=world
        )
        if world.is_main:
            ranks = {
                "learners": len(teams.learners),
                "attack_ranks": len(teams.attackers),
                "backend": world.backend,
            }
            about = output.facts("attack-cost", options, world.device, ranks=ranks)
            output.say(f"{_headline(options, teams)}\n{table(rows)}")
            output.write(
                options.out, about, "attack-cost", [asdict(row) | rates(row) for row in rows]
            )
    finally:
        world.close()


def _check_ranks(options: AttackCostArgs, world: Comm) -> None:
    learners, attackers = roles(world.ranks, options.attack_ranks, world.ranks)
    if len(attackers) > len(learners):
        raise ConadvError(
            f"{len(attackers)} attack rank(s) for {len(learners)} learner(s), each with one batch: some attack ranks "
            "would have nothing to do. Give fewer --attack-ranks."
        )
    if "ddp" in options.methods and (attackers or world.ranks == 1):
        raise ConadvError(
            "ddp compares sums over ranks: it needs torchrun with 2 ranks or more, all of them learners."
        )
    if "plain" in options.methods and world.ranks > 1:
        raise ConadvError(
            "plain is a loop on one process, without sums over ranks: use ddp under torchrun."
        )
    if options.overlap != "on" and len(learners) == 1:
        raise ConadvError(
            f"--overlap {options.overlap} has no effect on one learner: nothing is sent during backward."
        )


# ---- the cases


def build(options: AttackCostArgs, teams: Teams) -> dict[str, Case]:
    """All cases by name. Ranks: collective; every rank has the same names in the same order."""
    cases: dict[str, Case] = {}
    for size in options.batches:
        micro = micro_batches(options, size, teams.micro_batches(1), teams.comm.device)
        for method in options.methods:
            for how in options.how() if method in CONCURRENT else ("inline",):
                cases |= _cases(options, teams, method, how, micro)
    for name, case in cases.items():
        if case.yardstick not in cases:
            raise ConadvError(
                f"{name!r} is compared with {case.yardstick!r}: add that to --methods and --executors."
            )
    return cases


def _cases(
    options: AttackCostArgs, teams: Teams, method: str, how: str, micro: tuple[MicroBatch, ...]
) -> dict[str, Case]:
    """One engine, with and without backward overlap as the options say."""
    size, learners = len(micro[0].y_N), len(teams.learners)
    burst, gradient_bytes, end = _burst(options, teams, method, how, micro)
    made = {}
    for overlap in (True, False) if options.overlap == "both" else (options.overlap == "on",):
        if method in OWN_LOOPS and not overlap:
            continue  # they have no such switch
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
        yardstick = name_of("vanilla" if method in OWN_LOOPS else "noise", "inline", size, overlap)
        made[name_of(method, how, size, overlap)] = Case(
            partial(burst, overlap), yardstick, labels, end
        )
    return made


def name_of(method: str, how: str, size: int, overlap: bool) -> str:
    """The name of a case: what differs from an inline step with backward overlap is said."""
    words = [
        method.replace("-lookahead", " + look-ahead").replace("-busy", ", attack ranks busy"),
        f"batch {size}",
    ]
    return ", ".join(
        [*words, *([how] if how != "inline" else []), *([] if overlap else ["no overlap"])]
    )


def _burst(
    options: AttackCostArgs, teams: Teams, method: str, how: str, micro: tuple[MicroBatch, ...]
) -> tuple[Burst, int, Callable[[], object]]:
    """What this rank does in a burst of a case, the bytes that its gradients have, and what it does at the end."""
    if method in OWN_LOOPS:
        loop, model = _own_loop(options, teams.comm, micro[0])
        return (
            lambda overlap: _timed_steps(options, teams.comm.device, loop),
            _gradient_bytes(model),
            nothing,
        )
    engine = _engine(options, teams, "noise" if method == "noise-busy" else method, how)
    burst: Burst = LearnerBurst(options, engine, micro)
    if how == "ranks" and teams.attacking:
        burst = ServerBurst(options, engine, micro)
    elif method == "noise-busy":
        burst = BusyBurst(options, engine, micro, teams)
    elif teams.attacking:
        burst = _idle
    return burst, _gradient_bytes(engine.model), engine.executor.close


def _gradient_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def _engine(options: AttackCostArgs, teams: Teams, method: str, how: str) -> TrainStep:
    made = METHODS[method](options.staleness)
    model = network(options, made.route, teams.comm.device)
    executor: Executor = (
        Ranks(teams) if how == "ranks" else Stream() if how == "stream" else Inline()
    )
    return TrainStep(
        model,
        optimizer(options, model),
        made,
        space=SPACE,
        precision=options.precision,
        channels_last=options.channels_last,
        executor=executor,
        comm=teams.comm,
    )


# ---- bursts


@dataclass(frozen=True)
class LearnerBurst:
    """Consecutive steps of one engine."""

    options: AttackCostArgs
    engine: TrainStep
    micro: tuple[MicroBatch, ...]

    def __call__(self, overlap: bool) -> Sample:
        engine, phases = self.engine, dict[str, float]()
        if engine._reducer is not None:
            engine._reducer.overlap = overlap

        def step(counts: bool) -> None:
            t = engine.version
            record = engine(
                Batch(t, self.micro), Batch(t + engine.ahead, self.micro) if engine.ahead else None
            )
            for name, seconds in record.phases.items() if counts else ():
                phases[name] = phases.get(name, 0.0) + seconds

        return _timed_steps(self.options, engine.device, step, phases)


@dataclass
class ServerBurst:
    """An attack rank's side of a burst: it serves as many steps as the learners make."""

    options: AttackCostArgs
    engine: TrainStep
    micro: tuple[MicroBatch, ...]
    next_step: int = 0

    def __call__(self, overlap: bool) -> Sample:
        first = self.next_step + self.engine.ahead
        self.next_step += self.options.burst
        served: list[list[Span]] = []
        batches = (Batch(t, self.micro) for t in range(first, first + self.options.burst))
        self.engine.serve(batches, lambda step, spans: served.append(spans))
        return Sample(None, mean_phases(served[self.options.dropped :]))


def mean_phases(served: Sequence[Sequence[Span]]) -> dict[str, float]:
    """Seconds per phase and batch on an attack rank; what ran beside its phases is left out."""
    phases: dict[str, float] = {}
    for name, begin, end in (span for spans in served for span in spans):
        if name != "transfer":
            phases[name] = phases.get(name, 0.0) + (end - begin) / len(served)
    return phases


@dataclass
class BusyBurst:
    """Attack ranks attack for nobody, without a pause, for as long as the learners' burst lasts.

    What a busy neighbour alone costs a learner (caches, memory, clock rate), apart from messages and waiting.
    """

    options: AttackCostArgs
    engine: TrainStep
    micro: tuple[MicroBatch, ...]
    teams: Teams

    def __post_init__(self) -> None:
        self._channel = self.teams.world.new_channel()

    def __call__(self, overlap: bool) -> Sample:
        world, attackers = self.teams.world, self.teams.attackers
        end = torch.zeros(1, device=world.device)
        if self.teams.attacking:
            ended = world.receive(end, self.teams.learners[0], self._channel)
            while not ended.done:
                METHODS["disadv"](0).extra(self.engine, Batch(0, self.micro))
            ended.wait()
            return Sample(None)
        sample = LearnerBurst(self.options, self.engine, self.micro)(overlap)
        if world.rank == self.teams.learners[0]:
            for sent in [world.send(end, attacker, self._channel) for attacker in attackers]:
                sent.wait()
        return sample


def _idle(overlap: bool) -> Sample:
    return Sample(None)


def _timed_steps(
    options: AttackCostArgs,
    device: torch.device,
    step: Callable[[bool], None],
    phases: dict[str, float] | None = None,
) -> Sample:
    """A burst: the mean time of its counted steps, and of the phases that ``step`` adds up in them."""
    for _ in range(options.dropped):
        step(False)
    count = options.burst - options.dropped
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        step(True)
    synchronize(device)
    seconds = time.perf_counter() - begin
    return Sample(seconds / count, {name: total / count for name, total in (phases or {}).items()})


def _own_loop(
    options: AttackCostArgs, comm: Comm, micro: MicroBatch
) -> tuple[Callable[[bool], None], nn.Module]:
    """Plain training in a loop of one's own, set up as fast as it goes; on several ranks by DistributedDataParallel.

    Buffers are not broadcast, as they are not by the engine.
    """
    plain = network(options, None, comm.device)
    update = optimizer(options, plain)
    model = plain if comm.ranks == 1 else _distributed(plain)
    x, y = micro.views["clean"], micro.y_N
    autocast = torch.autocast(comm.device.type, torch.bfloat16, enabled=options.precision == "bf16")

    def step(counts: bool) -> None:
        update.zero_grad()
        with autocast:
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()  # type: ignore[no-untyped-call]
        update.step()
        loss.item()

    return step, plain


def _distributed(plain: nn.Module) -> nn.Module:
    with (
        warnings.catch_warnings()
    ):  # newer torch has another name for broadcast_buffers, older torch only this one
        warnings.simplefilter("ignore", FutureWarning)
        model: nn.Module = DistributedDataParallel(
            plain, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        return model


# ---- what is shown


def _headline(options: AttackCostArgs, teams: Teams) -> str:
    layout = f"{len(teams.learners)} learner(s) + {len(teams.attackers)} attack rank(s)"
    memory = "channels_last" if options.channels_last else "contiguous"
    return (
        f"{options.model} at {options.image_size}x{options.image_size}, {layout}, {options.threads} thread(s) each, "
        f"{options.precision}, {memory}, compile {options.compile}"
    )


def rates(row: Row) -> dict[str, float]:
    """Clean images per second at the median step, of all learners and per rank in use."""
    per_second = 1e3 * row.labels["images"] / row.median_ms
    return {
        "images_per_second": per_second,
        "images_per_second_per_rank": per_second / row.labels["ranks"],
    }


def table(rows: Sequence[Row]) -> str:
    """Step time, throughput in clean images, overhead, and the mean phases of a learner (and of an attack rank)."""
    head = ["", "step ms", "images/s", "per rank", "ratio", "to", "phases, ms"]
    cells = []
    for row in rows:
        speed = [f"{value:.0f}" for value in rates(row).values()]
        cells.append(
            [
                row.name,
                f"{row.median_ms:.1f}",
                *speed,
                output.ratio_text(row),
                row.yardstick,
                _phases(row),
            ]
        )
    return f"{output.text_table(head, cells)}\n{output.describe_rounds(rows)}"


def _phases(row: Row) -> str:
    def text(phases: Any) -> str:
        return " ".join(f"{name} {ms:.1f}" for name, ms in phases.items() if ms >= 0.05)

    return text(row.phases_ms) + (
        f" | attack rank: {text(row.server_phases_ms)}" if row.server_phases_ms else ""
    )
