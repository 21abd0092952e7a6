"""``conadv bench WHAT``: interleaved timings, as JSON and as a table. docs/benchmarks.md."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from conadv.cli.options import set_threads
from conadv.cli.tables import fitted
from conadv.config.schema import (
    AugmentName,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    OptimizerName,
)
from conadv.errors import ConadvError, printable
from conadv.safe_io import write_atomic
from conadv.training.provenance import git_state, machine, now, versions

if TYPE_CHECKING:
    from conadv.distributed.comm import Comm

MethodName = Literal[
    "vanilla",
    "multiview",
    "noise",
    "disadv",
    "conadv",
    "conadv-lookahead",
    "recycle",
    "noise-replace",
    "conadv-replace",
    "recycle-replace",
]


@dataclass
class BenchArgs:
    """What all benchmarks have in common."""

    rounds: int = 10
    """Each runs every case once, in a random order; 6 or more for a 95 % interval."""
    threads: int = 1
    """CPU threads of torch in each process."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    out: Path | None = None
    """Write the result as JSON here."""


@dataclass
class AttackCostArgs(BenchArgs):
    """Time of a training step by method, beside `noise`: the same views and gradients without an
    attack. A method with -replace, half of whose images replace clean ones, is beside `vanilla`.

    Under torchrun each rank trains on its share; with --attack-ranks M, M of the ranks only attack.
    A case is timed in bursts of consecutive steps, since an adversarial batch is made steps ahead
    of its use.
    """

    methods: tuple[MethodName, ...] = (
        *("vanilla", "noise", "disadv", "conadv", "conadv-lookahead", "recycle"),
    )
    batches: tuple[int, ...] = (64,)
    """Clean images per rank and step."""
    executors: tuple[Literal["inline", "stream", "ranks"], ...] | None = None
    """How conadv's attack runs: inline, stream (CUDA), ranks. Default: inline, and ranks if there
    are attack ranks.
    """
    attack_ranks: int = 0
    """Ranks of the world that only attack; the others learn, and noise runs on these learners
    alone.
    """
    overlap: Literal["on", "off", "both"] = "on"
    """Whether gradients leave for the other ranks while backward still runs."""
    model: str = "resnet20"
    """A network for small images (resnet8 to resnet56) or a torchvision classifier."""
    width: int | None = None
    """Channels of the first stage of the networks for small images."""
    image_size: int = 32
    channels: int = 3
    classes: int = 10
    optimizer: OptimizerName = "sgd"
    staleness: int = 1
    """tau of conadv."""
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    burst: int = 4
    """Consecutive steps of one case that are timed, after two that are not."""
    comm_timeout: float = 120.0
    """Seconds after which a rank that does not answer ends the others."""

    def config(self) -> Config:
        """The settings of the measured runs, but for the method."""
        return Config(
            steps=10**6,
            staleness=self.staleness,
            precision=self.precision,
            channels_last=self.channels_last,
            compile=self.compile,
            model=ModelConfig(name=self.model, width=self.width),
            optim=OptimConfig(name=self.optimizer, lr=1.0),
        )


@dataclass
class DataArgs(BenchArgs):
    """Images per second of the loader, beside a plain DataLoader with the same torchvision
    transforms.

    Without --data it reads images made at random in a temporary folder. To see what a training step
    leaves of it, give the step's --accumulation and the seconds that it computes as --pause:
    workers read on meanwhile.
    """

    rounds: int = 5
    data: Path | None = None
    """Image folder DIR/{train,test}/<class>/*."""
    augment: AugmentName = "basic"
    batch: int = 64
    """Images of a micro-batch."""
    accumulation: int = 1
    """Micro-batches that are taken at once, as a training step takes those of one rank."""
    pause: float = 0.0
    """Seconds after each accumulation in which nothing is taken, as while a step computes; they
    count."""
    images: int = 1024
    """Images that are timed in each round, once the loader is running."""
    image_size: int = 224
    num_workers: int = 0
    photo_size: int = 256
    """Height and width of the images made where no --data is given."""


Args = (
    Annotated[AttackCostArgs, tyro.conf.subcommand("attack-cost")]
    | Annotated[DataArgs, tyro.conf.subcommand("data")]
)


def command(options: AttackCostArgs | DataArgs) -> None:
    """Run a benchmark."""
    prepare(options)
    if isinstance(options, DataArgs):
        data(options)
    else:
        attack_cost(options)


def prepare(options: BenchArgs) -> None:
    """Check --out before anything is timed; set threads and the allocator of this process."""
    from conadv.training.allocator import keep_freed_memory

    if options.out is not None:
        if options.out.is_dir():
            raise ConadvError(f"--out {printable(options.out)} is a folder. Name a file.")
        options.out.parent.mkdir(parents=True, exist_ok=True)
    set_threads(options.threads)
    keep_freed_memory()


def attack_cost(options: AttackCostArgs) -> None:
    """Measure; rank 0 prints and writes. Ranks: all of torchrun's processes call it."""
    from conadv.distributed.comm import Comm
    from conadv.distributed.teams import make_teams
    from conadv.planning.attack_cost import attack_cost
    from conadv.planning.trial import Shape

    world = Comm.from_environment(options.device, options.comm_timeout)
    try:
        teams = make_teams(world, options.attack_ranks)
        rows = attack_cost(
            options.config(),
            Shape(options.channels, options.image_size, options.classes),
            teams,
            options.rounds,
            methods=options.methods,
            batches=options.batches,
            executors=options.executors or ["inline", "ranks"][: 1 + bool(options.attack_ranks)],
            overlaps={"on": (True,), "off": (False,), "both": (True, False)}[options.overlap],
            steps=options.burst,
        )
        if world.is_main:
            complete = [asdict(row) for row in rows]
            for row in complete:
                rate = 1e3 * row["labels"]["images"] / row["median_ms"]
                row["images_per_second"] = rate
                row["images_per_second_per_rank"] = rate / row["labels"]["ranks"]
            show(complete)
            ranks = {"learners": len(teams.learners), "attack_ranks": len(teams.attackers)}
            about = {"ranks": ranks | {"backend": world.backend}}
            write("attack-cost", options, world, complete, **about)
    finally:
        world.close()


def data(options: DataArgs) -> None:
    """Measure, print a table, write JSON."""
    from conadv.distributed.comm import Comm
    from conadv.planning import data_loading

    step = options.batch * options.accumulation
    photographs = data_loading.random_photographs(options.photo_size, step)
    with photographs if options.data is None else nullcontext(options.data) as folder:
        settings = DataConfig(
            source="folder",
            dir=folder,
            image_size=options.image_size,
            augment=options.augment,
            num_workers=options.num_workers,
        )
        sizes = (options.batch, options.accumulation, options.images, options.pause)
        rows = data_loading.loader_speed(data_loading.Loading(settings, *sizes), options.rounds)
    complete = [asdict(row) | {"images_per_second": 1e3 * step / row.median_ms} for row in rows]
    show(complete)
    write("data", options, Comm(), complete)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a table: median step, throughput, ratio to the yardstick, phases."""
    console, cells = Console(highlight=False), []
    for row in rows:
        interval = f"[{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        cells.append(
            {
                "case": str(row["name"]),
                "ms": f"{row['median_ms']:.2f}",
                "images/s": f"{row.get('images_per_second', 0):.0f}",
                "ratio": f"{row['ratio']:.3f} {interval}",
                "to": str(row["yardstick"]),
                "phases, ms": _phases(row["phases_ms"]),
                "of attack ranks": _phases(row["server_phases_ms"]),
            }
        )
    unknown = {name for name in cells[0] if all(row[name] in ("", "0") for row in cells)}
    shown = [{name: row[name] for name in row if name not in unknown} for row in cells]
    left, drop = ("case", "to", "phases, ms", "of attack ranks"), ("of attack ranks", "phases, ms")
    console.print(fitted(shown, console, left, (*drop, "to")))
    count = len(rows[0]["samples_ms"])
    bracket = "95 % interval of the median" if count >= 6 else "range"
    text = f"ratio: in the same round, {count} rounds; [ ]: {bracket}"
    console.print(text, markup=False)


def _phases(phases: Mapping[str, float]) -> str:
    return " ".join(f"{name} {ms:.1f}" for name, ms in phases.items() if ms >= 0.05)


def write(
    name: str, options: BenchArgs, world: Comm, rows: Sequence[Mapping[str, Any]], **more: Any
) -> None:
    """Write the rows with what they depend on as JSON, if a file was asked for."""
    import torch

    if options.out is None:
        return
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else "cpu"
    chosen = {key: value for key, value in asdict(options).items() if key != "out"}
    content = {
        "bench": name,
        "command": shlex.join(["conadv", *without_out(sys.argv[1:])]),
        "date": now(),
        "machine": machine(device, torch.get_num_threads()),
        "versions": versions(),
        "git": git_state(),
        # folders belong to one machine: of a path only its name
        "options": {k: v.name if isinstance(v, Path) else v for k, v in chosen.items()},
        **more,
        "tables": {name: rows},
    }
    write_atomic(options.out, json.dumps(content, indent=1) + "\n")


def without_out(args: Sequence[str]) -> list[str]:
    """The arguments without --out and its value."""
    values = {i + 1 for i, arg in enumerate(args) if arg == "--out"}
    return [a for i, a in enumerate(args) if i not in values and a.partition("=")[0] != "--out"]
