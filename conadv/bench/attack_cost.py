"""What each method's attack costs per training step, beside ``noise``: by executor, local batch and ranks.

An adversarial batch for step t is made during step t - tau, so single steps cannot be interleaved. A case is timed in
bursts of consecutive steps of one engine, which goes on where its last burst ended; the first steps of a burst, with
cold caches and images of the last burst, are not timed. Attack ranks serve the burst that the learners run.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..engine import Comm, TrainStep
from ..engine.executor import Executor
from ..errors import ConadvError
from ..types import Batch, MicroBatch
from . import output
from .harness import Case, Row, Sample, measure, synchronize
from .options import CONCURRENT, AttackCostArgs
from .workload import METHODS, SPACE, micro_batches, network, optimizer


@dataclass(frozen=True)
class Ranks:
    """Who takes part: ``world`` of all processes, ``comm`` of the learners, and which micro-batches this one holds."""

    world: Comm
    comm: Comm
    indices: Sequence[int]
    attacking: bool = False
    teams: Any = None


@dataclass
class Server:
    """An attack rank's side of a case: the next step that it makes images for."""

    engine: TrainStep
    micro: tuple[MicroBatch, ...]
    next_step: int = field(init=False)

    def __post_init__(self) -> None:
        self.next_step = self.engine.ahead

    def burst(self, steps: int) -> Sample:
        first, self.next_step = self.next_step, self.next_step + steps
        self.engine.serve(Batch(t, self.micro) for t in range(first, self.next_step))  # type: ignore[attr-defined]
        phases = self.engine.clock.collect()
        return Sample(None, {name: seconds / steps for name, seconds in phases.items()})


def command(options: AttackCostArgs) -> None:
    """Measure, print a table, write JSON. Ranks: all of torchrun's processes call it; rank 0 prints and writes."""
    world = Comm.from_environment(options.device, options.comm_timeout)
    try:
        with world.agreed():
            _check_ranks(options, world)
            output.prepare(options)
        ranks = _split(options, world)
        cases = build(options, ranks)
        # one round: the reducer learns, and every burst has untimed steps of its own
        rows = measure(cases, options.rounds, seconds=options.seconds, seed=options.seed, warmup=1, world=world)
        if world.first:
            about = output.facts("attack-cost", options, world.device, **_layout(options, ranks))
            output.say(_headline(options, ranks))
            output.say(table(rows))
            output.write(options.out, about, "attack-cost", [asdict(row) | rates(row) for row in rows])
    finally:
        world.close()


def _check_ranks(options: AttackCostArgs, world: Comm) -> None:
    if options.attack_ranks and options.attack_ranks >= world.ranks:
        raise ConadvError(
            f"--attack-ranks {options.attack_ranks} leaves no learner among {world.ranks} rank(s). Start more: "
            f"torchrun --nproc-per-node {options.attack_ranks + 1} -m conadv bench attack-cost ..."
        )
    if "ddp" in options.methods and (options.attack_ranks or world.ranks == 1):
        raise ConadvError("ddp compares sums over ranks: it needs torchrun with 2 ranks or more, all of them learners.")
    if options.overlap != "on" and world.ranks - options.attack_ranks == 1:
        raise ConadvError(f"--overlap {options.overlap} has no effect on one learner: nothing is sent during backward.")


def _split(options: AttackCostArgs, world: Comm) -> Ranks:
    if not options.attack_ranks:
        return Ranks(world, world, [world.rank])
    teams = world.split(options.attack_ranks)  # type: ignore[attr-defined]
    return Ranks(world, teams.comm, teams.micro_batches(1), teams.attacking, teams)


# ---- the cases


def build(options: AttackCostArgs, ranks: Ranks) -> dict[str, Case]:
    """All cases by name. Ranks: collective; every rank has the same names in the same order."""
    cases: dict[str, Case] = {}
    for size in options.batches:
        micro = micro_batches(options, size, ranks.indices, ranks.comm.device)
        for method in options.methods:
            for how in options.how() if method in CONCURRENT else ("inline",):
                cases |= _cases(options, ranks, method, how, micro)
    for name, case in cases.items():
        if case.yardstick not in cases:
            raise ConadvError(f"{name!r} is compared with {case.yardstick!r}: add that to --methods and --executors.")
    return cases


def _cases(
    options: AttackCostArgs, ranks: Ranks, method: str, how: str, micro: tuple[MicroBatch, ...]
) -> dict[str, Case]:
    """One engine, with and without backward overlap as the options say."""
    size = len(micro[0].y_N)
    run, gradient_bytes = _runner(options, ranks, method, how, micro)
    learners = ranks.world.ranks - options.attack_ranks
    used = learners + (options.attack_ranks if how == "ranks" else 0)
    made = {}
    for overlap in (True, False) if options.overlap == "both" else (options.overlap == "on",):
        if method == "ddp" and not overlap:
            continue  # it has no such switch
        labels = {
            "method": method,
            "executor": how,
            "local_batch_size": size,
            "images": size * learners,
            "learners": learners,
            "ranks": used,
            "overlap": overlap and learners > 1,
            "gradient_bytes": gradient_bytes,
        }
        yardstick = name_of("vanilla" if method == "ddp" else "noise", "inline", size, overlap)
        made[name_of(method, how, size, overlap)] = Case(_switched(run, overlap), yardstick, labels)
    return made


def name_of(method: str, how: str, size: int, overlap: bool) -> str:
    """The name of a case: what differs from an inline step with backward overlap is said."""
    words = [method.replace("-lookahead", " + look-ahead").replace("-busy", ", attack ranks busy"), f"batch {size}"]
    return ", ".join([*words, *([how] if how != "inline" else []), *([] if overlap else ["no overlap"])])


def _switched(run: Callable[[bool], Sample], overlap: bool) -> Callable[[], Sample]:
    return lambda: run(overlap)


def _runner(
    options: AttackCostArgs, ranks: Ranks, method: str, how: str, micro: tuple[MicroBatch, ...]
) -> tuple[Callable[[bool], Sample], int]:
    """What this rank does in a burst of a case, and the bytes that its gradients have."""
    if method == "ddp":
        loop, model = _ddp_loop(options, ranks.comm, micro[0])
        return lambda overlap: _timed_steps(options, ranks.comm.device, loop), _gradient_bytes(model)
    engine = _engine(options, ranks, "noise" if method == "noise-busy" else method, how)
    size = _gradient_bytes(engine.model)
    if ranks.attacking and how == "ranks":
        server = Server(engine, micro)
        return lambda overlap: server.burst(options.burst), size
    if ranks.attacking:
        busy = _busy(options, engine, micro) if method == "noise-busy" else _idle
        return lambda overlap: busy(), size
    return lambda overlap: _learner_burst(options, engine, micro, overlap), size


def _gradient_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def _engine(options: AttackCostArgs, ranks: Ranks, method: str, how: str) -> TrainStep:
    made = METHODS[method](options.staleness)
    model = network(options, made.route, ranks.comm.device)
    return TrainStep(
        model,
        optimizer(options, model),
        made,
        space=SPACE,
        precision=options.precision,
        channels_last=options.channels_last,
        executor=_executor(how, ranks),
        comm=ranks.comm,
    )


def _executor(how: str, ranks: Ranks) -> Executor:
    from .. import engine

    if how == "ranks":
        return engine.Ranks(ranks.teams)  # type: ignore[attr-defined,no-any-return]
    return engine.Stream() if how == "stream" else engine.Inline()  # type: ignore[attr-defined,no-any-return]


# ---- bursts


def _learner_burst(options: AttackCostArgs, engine: TrainStep, micro: tuple[MicroBatch, ...], overlap: bool) -> Sample:
    if engine._reducer is not None:
        engine._reducer.overlap = overlap
    phases: dict[str, float] = {}

    def step(counts: bool) -> None:
        t = engine.version
        record = engine(Batch(t, micro), Batch(t + engine.ahead, micro) if engine.ahead else None)
        for name, seconds in record.phases.items() if counts else ():
            phases[name] = phases.get(name, 0.0) + seconds

    return _timed_steps(options, engine.device, step, phases)


def _timed_steps(
    options: AttackCostArgs, device: torch.device, step: Callable[[bool], None], phases: dict[str, float] | None = None
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


def _busy(options: AttackCostArgs, engine: TrainStep, micro: tuple[MicroBatch, ...]) -> Callable[[], Sample]:
    """An attack rank's work in a burst without a message: what a busy neighbour alone costs the learners."""
    attack = METHODS["disadv"](0)

    def run() -> Sample:
        for _ in range(options.burst):
            attack.extra(engine, Batch(0, micro))
        return Sample(None)

    return run


def _idle() -> Sample:
    return Sample(None)


def _ddp_loop(options: AttackCostArgs, comm: Comm, micro: MicroBatch) -> tuple[Callable[[bool], None], nn.Module]:
    """Plain training in a loop of one's own on torch's DistributedDataParallel, set up as fast as it goes.

    Buffers are not broadcast, as they are not by the engine.
    """
    plain = network(options, None, comm.device)
    update = optimizer(options, plain)
    with warnings.catch_warnings():  # newer torch has another name for broadcast_buffers, older torch only this one
        warnings.simplefilter("ignore", FutureWarning)
        model: nn.Module = DistributedDataParallel(plain, broadcast_buffers=False, gradient_as_bucket_view=True)
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


# ---- what is shown


def _layout(options: AttackCostArgs, ranks: Ranks) -> dict[str, Any]:
    learners = ranks.world.ranks - options.attack_ranks
    return {"ranks": {"learners": learners, "attack_ranks": options.attack_ranks, "backend": ranks.world.backend}}


def _headline(options: AttackCostArgs, ranks: Ranks) -> str:
    layout = f"{ranks.world.ranks - options.attack_ranks} learner(s) + {options.attack_ranks} attack rank(s)"
    memory = "channels_last" if options.channels_last else "contiguous"
    return (
        f"{options.model} at {options.image_size}x{options.image_size}, {layout}, {options.threads} thread(s) each, "
        f"{options.precision}, {memory}, compile {options.compile}"
    )


def rates(row: Row) -> dict[str, float]:
    """Clean images per second at the median step, of all learners and per rank in use."""
    per_second = 1e3 * row.labels["images"] / row.median_ms
    return {"images_per_second": per_second, "images_per_second_per_rank": per_second / row.labels["ranks"]}


def table(rows: Sequence[Row]) -> str:
    """Step time, throughput in clean images, overhead, and the mean phases of a learner (and of an attack rank)."""
    head = ["", "step ms", "images/s", "per rank", "ratio", "to", "phases, ms"]
    cells = []
    for row in rows:
        speed = [f"{value:.0f}" for value in rates(row).values()]
        cells.append([row.name, f"{row.median_ms:.1f}", *speed, output.ratio_text(row), row.yardstick, _phases(row)])
    return f"{output.text_table(head, cells)}\n{output.describe_rounds(rows)}"


def _phases(row: Row) -> str:
    def text(phases: Any) -> str:
        return " ".join(f"{name} {ms:.1f}" for name, ms in phases.items() if ms >= 0.05)

    return text(row.phases_ms) + (f" | attack rank: {text(row.server_phases_ms)}" if row.server_phases_ms else "")
