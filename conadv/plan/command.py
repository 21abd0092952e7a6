"""``conadv plan``: measure a profile, and plan by it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from conadv.errors import ConadvError
from conadv.plan.model import KINDS, Planner, kind_of
from conadv.plan.profile import Link, Profile, Workload, load, save
from conadv.plan.rows import Plan, make_plan
from conadv.plan.search import Rules
from conadv.training.record import write_atomic

LARGEST = 2**22
"""Devices, and images per update: the search through the splits of more takes minutes."""
PAYLOAD = 1448 / 1514  # of an Ethernet frame of TCP/IPv4 with timestamps


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
    """Bursts of four steps for every method and batch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    """CPU threads of each process."""


@dataclass
class PlanArgs:
    """Predict step time, images per second, cost and the best executor and split for any number of devices.

    First measure, on a quiet machine, with as many processes per host as the training will run:

      torchrun --nproc-per-node 2 -m conadv plan PROFILE.json --measure all --workload.threads 1

    then plan: conadv plan PROFILE.json --method conadv,noise --devices 1,8,64 --global-batch-size 8192
    """

    profile: tyro.conf.Positional[Path]
    """The profile, a JSON file: read, or written by --measure."""
    measure: Literal["no", "phases", "link", "all"] = "no"
    """Measure instead of plan: the phases of a step (makes the file), the link between the ranks (adds it), or both."""
    workload: WorkloadArgs = field(default_factory=WorkloadArgs)
    method: str = "all"
    """Methods with commas, or all: vanilla, multiview, noise, disadv, conadv, conadv-lookahead, recycle."""
    devices: str = "1,8,64,512,4096"
    """Numbers of devices, with commas."""
    global_batch_size: str = "32768"
    """Clean images per update; several with commas."""
    micro_batch_size: int | None = None
    """Clean images per forward pass, which batch norm sees (default: the largest measured one that divides)."""
    staleness: int = 1
    """tau of conadv."""
    executor: Literal["auto", "inline", "ranks"] = "auto"
    attack_ranks: int | None = None
    """Fix the number of attack ranks (default: the best)."""
    objective: Literal["speed", "cost"] = "speed"
    """Choose the layout with the most images per second, or with the fewest device-seconds per image."""
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
    """Updates of the whole training: adds the time that they take, loading, evaluation and checkpoints not counted."""
    figure: Path | None = None
    """Write images per second and overhead over devices as PNG."""
    json: Path | None = None
    """Write the rows as JSON."""


def command(args: PlanArgs) -> None:
    """Run ``conadv plan``."""
    if args.measure != "no":
        _measure(args)
        return
    from conadv.plan.figure import draw
    from conadv.plan.table import show

    plan = plan_of(args)
    show(plan, args.images_per_epoch, args.price, args.steps)
    if args.figure is not None:
        draw(plan, args.figure)
    if args.json is not None:
        _write(plan, args.json, args.steps)


def plan_of(args: PlanArgs) -> Plan:
    """Read the profile and search. Raises ConadvError for what cannot be planned."""
    profile = load(args.profile)
    if args.staleness < 1:
        raise ConadvError(
            f"--staleness {args.staleness} must be 1 or more; for staleness 0 plan disadv, which it is."
        )
    methods = (
        list(KINDS) if args.method == "all" else [name.strip() for name in args.method.split(",")]
    )
    for method in methods:
        kind_of(method)
    if args.attack_ranks is not None and args.attack_ranks < 0:
        raise ConadvError(f"--attack-ranks {args.attack_ranks} must be 0 or more.")
    for name, value in (
        ("--price", args.price),
        ("--images-per-epoch", args.images_per_epoch),
        ("--memory-gib", args.memory_gib),
    ):
        if value is not None and not 0 < value <= 1e12:
            raise ConadvError(f"{name} {value} must be more than 0 and at most 10^12.")
    memory = profile.sizes.memory if args.memory_gib is None else round(args.memory_gib * 2**30)
    rules = Rules(args.micro_batch_size, args.executor, args.attack_ranks, memory, args.objective)
    planner = Planner(profile, link_of(profile, args.link_gbit, args.latency_us), args.staleness)
    given = args.link_gbit is not None or args.latency_us is not None
    devices, batches = (
        _numbers("--devices", args.devices),
        _numbers("--global-batch-size", args.global_batch_size),
    )
    return make_plan(planner, methods, devices, batches, rules, given)


def link_of(profile: Profile, gbit: float | None, latency_us: float | None) -> Link | None:
    """The profile's link with what the user gave in its place.

    A rate is that of the wire; PAYLOAD of it carries data. Where ranks' processors move the bytes themselves, no link
    is faster than they are.
    """
    link = profile.link
    if gbit is None and latency_us is None:
        return link
    for name, value in (("--link-gbit", gbit), ("--latency-us", latency_us)):
        if value is None and link is None:
            raise ConadvError(
                f"The profile has no link: give {name} as well, or measure it with --measure link."
            )
        if value is not None and not (value > 0 if name == "--link-gbit" else value >= 0):
            raise ConadvError(
                f"{name} {value} must be {'more than' if name == '--link-gbit' else 'at least'} 0."
            )
    base = link or _no_link(profile)
    changes: dict[str, float] = {}
    if gbit is not None:
        per_byte = max(8e-9 / gbit / PAYLOAD, base.busy_seconds_per_byte)
        changes |= {"seconds_per_byte": per_byte, "point_seconds_per_byte": per_byte}
    if latency_us is not None:
        changes |= {"latency": latency_us * 1e-6, "point_latency": latency_us * 1e-6}
    return base.model_copy(update=changes)


def _no_link(profile: Profile) -> Link:
    """What a given link replaces where none was measured."""
    return Link(
        ranks=2,
        algorithm="ring-or-tree" if profile.device == "cuda" else "ring",
        seconds_per_byte=1.0,
        latency=0.0,
        busy_seconds_per_byte=0.0,
        point_seconds_per_byte=1.0,
        point_latency=0.0,
    )


def _measure(args: PlanArgs) -> None:
    """Measure what was asked for; rank 0 writes the file. Collective."""
    import torch

    from conadv.distributed.comm import Comm
    from conadv.models.own import trust
    from conadv.plan.link import measure_link
    from conadv.plan.measure import measure_phases
    from conadv.training.allocator import keep_freed_memory

    trust(args.workload.model)
    if args.workload.threads is not None:
        torch.set_num_threads(args.workload.threads)
    keep_freed_memory()
    comm = Comm.from_environment(args.workload.device)
    try:
        with comm.agreed():
            profile = load(args.profile) if args.measure == "link" and comm.is_main else None
        if args.measure != "link":
            batches = _numbers("--workload.batches", args.workload.batches)
            profile = measure_phases(_workload(args.workload), batches, args.workload.rounds, comm)
        link = (
            measure_link(comm)
            if args.measure == "link" or (args.measure == "all" and comm.ranks > 1)
            else None
        )
        if profile is not None and comm.is_main:
            save(profile.model_copy(update={"link": link}), args.profile)
    finally:
        comm.close()


def _workload(args: WorkloadArgs) -> Workload:
    chosen = {name: value for name, value in asdict(args).items() if name in Workload.model_fields}
    return Workload.model_validate(chosen)


def _numbers(name: str, text: str) -> list[int]:
    """``"1,8,64"`` -> [1, 8, 64], in rising order, each once."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ConadvError(f"{name} {text!r} is not a list of numbers such as 1,8,64.") from error
    if numbers[0] < 1:
        raise ConadvError(f"{name} {text!r}: every number must be 1 or more.")
    if numbers[-1] > LARGEST:
        raise ConadvError(f"{name} {text[:60]!r}: every number must be {LARGEST} or less.")
    return numbers


def _write(plan: Plan, path: Path, steps: int | None) -> None:
    content = {
        "profile": plan.planner.profile.model_dump(mode="json"),
        "rows": [row.as_json(steps) for row in plan.rows],
        "omitted": [asdict(omitted) for omitted in plan.omitted],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=1) + "\n")
