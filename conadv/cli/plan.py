"""``conadv plan``: measure a profile, and plan by it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from conadv.cli.format import duration
from conadv.cli.options import set_threads
from conadv.cli.tables import fitted
from conadv.errors import ConadvError, printable
from conadv.planning.cost_model import KINDS, Planner, kind_of
from conadv.planning.profile import Workload, link_of, load, save
from conadv.planning.search import Row, Rules, make_plan
from conadv.safe_io import write_atomic

LARGEST = 2**22
"""Devices, and images per update: the search through the splits of more takes minutes."""
GIB = 2**30


@dataclass
class WorkloadArgs:
    """What --measure runs: synthetic images through the real engine."""

    model: str = "resnet18"
    width: int | None = None
    """Channels of the first stage of the small-image networks."""
    args: tuple[str, ...] = ()
    """More arguments of the network's constructor, as the training's --model.args."""
    image_size: int = 32
    channels: int = 3
    num_classes: int = 10
    optimizer: Literal["lars", "lamb", "sgd", "adamw"] = "lars"
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    batches: str = "4,8,16,32,64"
    """Clean images per forward pass to measure, with commas."""
    rounds: int = 4
    """Bursts of steps for every method and batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    """CPU threads of each process."""


@dataclass
class Args:
    """Predict step time, images per second, cost and the best executor and split of devices.

    First measure, on a quiet machine, with as many processes per host as the training will run:

      torchrun --nproc-per-node 2 -m conadv plan PROFILE.json --measure all --workload.threads 1

    then plan: conadv plan PROFILE.json --method conadv,noise --devices 1,8,64 --global-batch-size
    8192
    """

    profile: tyro.conf.Positional[Path]
    """The profile, a JSON file: read, or written by --measure."""
    measure: Literal["no", "phases", "link", "all"] = "no"
    """Measure instead of plan: the phases of a step (makes the file), the link between the ranks
    (adds it), or both."""
    workload: WorkloadArgs = field(default_factory=WorkloadArgs)
    method: str = "all"
    """Methods with commas, or all: vanilla, multiview, noise, disadv, conadv, conadv-lookahead,
    recycle."""
    devices: str = "1,8,64,512,4096"
    """Numbers of devices, with commas."""
    global_batch_size: str = "32768"
    """Clean images per update; several with commas."""
    micro_batch_size: int | None = None
    """Clean images per forward pass, which batch norm sees (default: the largest measured one that
    divides)."""
    staleness: int = 1
    """tau of conadv."""
    executor: Literal["auto", "inline", "ranks"] = "auto"
    attack_ranks: int | None = None
    """Fix the number of attack ranks (default: the best)."""
    objective: Literal["speed", "cost"] = "speed"
    """Choose the layout with the most images per second, or with the fewest device-seconds per
    image.
    """
    link_gbit: float | None = None
    """Plan for a link of this many Gbit/s per rank instead of the measured one."""
    latency_us: float | None = None
    """Plan for this latency per step of an all-reduce, in microseconds."""
    memory_gib: float | None = None
    """Memory of a device (default: as measured)."""
    price: float | None = None
    """Of one device for one hour, in any currency: adds the cost of an epoch."""
    images_per_epoch: int = 1_281_167
    """Training images (default: ImageNet's)."""
    steps: int | None = None
    """Updates of the whole training: adds the time that they take, without loading, evaluation and
    checkpoints."""
    figure: Path | None = None
    """Write images per second and overhead over devices as PNG."""
    json: Path | None = None
    """Write the rows as JSON."""


def command(args: Args) -> None:
    """Run ``conadv plan``."""
    if args.measure != "no":
        _measure(args)
        return
    planner, rows, omitted = plan_of(args)
    show(planner, rows, omitted, args)
    if args.figure is not None:
        draw(rows, args.figure)
    if args.json is not None:
        content = {
            "profile": planner.profile.model_dump(mode="json"),
            "rows": [row.as_json(args.steps) for row in rows],
            "omitted": omitted,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.json, json.dumps(content, indent=1) + "\n")


def plan_of(args: Args) -> tuple[Planner, list[Row], list[dict[str, Any]]]:
    """Read the profile and search. Raises ConadvError for what cannot be planned."""
    profile = load(args.profile)
    if args.staleness < 1:
        raise ConadvError(
            "--staleness must be 1 or more; for staleness 0 plan disadv, which it is."
        )
    methods = list(KINDS) if args.method == "all" else [x.strip() for x in args.method.split(",")]
    for method in methods:
        kind_of(method)
    memory = profile.sizes.memory if args.memory_gib is None else round(args.memory_gib * GIB)
    rules = Rules(args.micro_batch_size, args.executor, args.attack_ranks, memory, args.objective)
    link = link_of(profile, args.link_gbit, args.latency_us)
    planner = Planner(profile, link, args.staleness)
    devices = numbers("--devices", args.devices)
    batches = numbers("--global-batch-size", args.global_batch_size)
    given = (args.link_gbit, args.latency_us) != (None, None)
    return planner, *make_plan(planner, methods, devices, batches, rules, given)


def numbers(name: str, text: str) -> list[int]:
    """``"1,8,64"`` -> [1, 8, 64], in rising order, each once."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ConadvError(f"{name} {text!r} is not a list of numbers such as 1,8,64.") from error
    if not 1 <= found[0] <= found[-1] <= LARGEST:
        raise ConadvError(f"{name} {text[:60]!r}: every number must be 1 to {LARGEST}.")
    return found


def _measure(args: Args) -> None:
    """Measure what was asked for; rank 0 writes the file. Collective."""
    from conadv.distributed.comm import Comm
    from conadv.models.own import trust
    from conadv.planning.measure import measure_link, measure_phases
    from conadv.training.allocator import keep_freed_memory

    work = args.workload
    trust(work.model)
    set_threads(work.threads)
    keep_freed_memory()
    comm = Comm.from_environment(work.device)
    try:
        with comm.agreed():
            profile = load(args.profile) if args.measure == "link" and comm.is_main else None
        if args.measure != "link":
            names = Workload.model_fields
            chosen = {name: value for name, value in asdict(work).items() if name in names}
            sizes = numbers("--workload.batches", work.batches)
            profile = measure_phases(Workload.model_validate(chosen), sizes, work.rounds, comm)
        link = None
        if args.measure == "link" or (args.measure == "all" and comm.ranks > 1):
            link = measure_link(comm)
        if profile is not None:
            save(profile.model_copy(update={"link": link}), args.profile)
    finally:
        comm.close()


# The table

DROPPED = (
    "GiB",
    "micro-batch",
    "batch",
    "device-s per epoch",
    "hidden",
    "overhead",
    "limit",
    "basis",
)
"""Columns that a terminal too narrow for all goes without, in this order."""
LEFT = ("method", "executor", "micro-batch", "limit", "basis")
LEGEND = (
    "basis: m = inside the measured points; outside of them or given: B the micro-batch, R the "
    "number of ranks, L the link.",
    "executor: learners, or learners:attack ranks. More devices would make no step faster.",
    "overhead: step time over that of noise on as many learners; hidden: the share of the attack's "
    "time that the step does not pay for.",
    "limit: the step's bottleneck; memory, where it made the micro-batch smaller.",
)


def show(
    planner: Planner, rows: Sequence[Row], omitted: Sequence[dict[str, Any]], args: Args
) -> None:
    """Print the table, its legend and what was left out."""
    console = Console(highlight=False)
    console.print(printable(about(planner)), markup=False)
    console.print(fitted([cells(row, args) for row in rows], console, LEFT, DROPPED))
    reasons: dict[str, list[str]] = {}
    for each in omitted:
        reasons.setdefault(each["reason"], []).append(f"{each['method']} on {each['devices']}")
    left_out = [f"left out: {', '.join(which)}: {reason}" for reason, which in reasons.items()]
    for line in (*LEGEND, *left_out):
        console.print(f"- {line}", markup=False)


def cells(row: Row, args: Args) -> dict[str, str]:
    """Column -> text."""
    found, layout = row.prediction, row.prediction.layout
    epoch = found.device_seconds_per_image * args.images_per_epoch
    split = f"ranks {layout.learners}:{layout.attack_ranks}"
    values = {
        "devices": f"{row.devices}",
        "batch": f"{row.global_batch}",
        "method": row.method,
        "executor": split if layout.attack_ranks else f"inline {layout.learners}",
        "micro-batch": f"{layout.micro_batch} x {layout.accumulation}",
        "step": duration(found.step),
        "total": duration(found.step * (args.steps or 0)),
        "images/s": f"{found.images_per_second:,.0f}",
        "overhead": f"{row.overhead:.2f}",
        "hidden": "-" if row.hidden is None else f"{100 * row.hidden:.0f} %",
        "device-s per epoch": f"{epoch:,.0f}",
        "GiB": f"{row.memory / GIB:.2f}",
        "limit": row.limit,
        "basis": "".join(name[0].upper() for name in row.extrapolated) or "m",
        "cost": f"{epoch / 3600 * (args.price or 0):,.2f}",
    }
    unasked = {"total": args.steps, "cost": args.price}
    return {name: text for name, text in values.items() if unasked.get(name, 0) is not None}


def about(planner: Planner) -> str:
    """The workload, the machine and the link on one line."""
    profile, work, link = planner.profile, planner.profile.workload, planner.link
    machine = profile.machine.get("device" if profile.device == "cuda" else "processor")
    rate = "none"
    if link is not None:
        gbit, latency = 8e-9 / link.seconds_per_byte, 1e6 * link.latency
        rate = f"{gbit:.3g} Gbit/s and {latency:.3g} us per step of an all-reduce"
    return (
        f"{work.model}, {work.image_size}x{work.image_size}, {work.precision}, {work.optimizer}; "
        f"measured on {machine or profile.device}, {profile.processes} process(es) of "
        f"{profile.threads} thread(s); link: {rate}"
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Images per second and overhead over devices, for the first global batch, as a picture."""
    import pandas as pd
    from matplotlib.figure import Figure

    columns = ("devices", "method", "Images per second (clean images)", "Step time over noise's")
    first = [row for row in rows if row.global_batch == rows[0].global_batch]
    values = [(r.devices, r.method, r.prediction.images_per_second, r.overhead) for r in first]
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    for axes, title in zip(figure.subplots(1, 2), columns[2:], strict=True):
        frame = pd.DataFrame(values, columns=columns)
        curves = frame.pivot(index="devices", columns="method", values=title)
        curves.plot(ax=axes, title=title, marker="o", logx=True, logy=title == columns[2])
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
