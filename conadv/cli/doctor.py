"""``conadv doctor``: what is installed and seen, and what of it would be slow or wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils.collect_env import get_env_info

from conadv.errors import printable
from conadv.sweep.pool import cores

GIB = 2**30
LEVELS = {"wrong": "bold red", "slow": "yellow", "note": "dim"}
"""Level of a finding (breaks runs; costs time; good to know) -> its colour."""
ENVIRONMENT = ("torch_version", "python_version", "os", "libc_version", "nvidia_driver_version")
"""What is shown of torch.utils.collect_env."""
VARIABLES = (
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "WORLD_SIZE"),
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_P2P_DISABLE"),
)
Finding = tuple[str, str, str]
"""(level, what is found, what to do)"""


@dataclass
class Args:
    """Show what is installed, which devices and links are seen, and what would be slow or wrong.

    Exit code 0: nothing is wrong (some of it may be slow); 1: something is. Changes nothing, and
    sends nothing.
    """

    json: bool = False
    """Write facts and findings as JSON."""


@dataclass(frozen=True)
class Device:
    """A CUDA device. ``free_gib``: 0 where it refuses."""

    name: str
    bf16: bool
    free_gib: float
    total_gib: float


@dataclass(frozen=True)
class Facts:
    """What findings are made of."""

    environment: dict[str, str]
    usable_cores: float
    threads: int
    driver: bool
    cuda_build: str | None
    cuda: tuple[Device, ...]
    backends: tuple[str, ...]
    interfaces: tuple[str, ...]
    shm_gib: float
    disk_gib: float
    variables: dict[str, str]


def look(folder: Path) -> Facts:
    """The facts of this machine. ``folder``: where runs will go, for the free disk."""
    info = get_env_info()
    backends = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}
    return Facts(
        environment={name: str(getattr(info, name)) for name in ENVIRONMENT},
        usable_cores=_usable_cores(),
        threads=torch.get_num_threads(),
        driver=Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists(),
        cuda_build=torch.version.cuda,
        cuda=tuple(_devices()),
        backends=tuple(name for name, there in backends.items() if dist.is_available() and there()),
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        shm_gib=_free(Path("/dev/shm")),
        disk_gib=_free(folder),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _free(folder: Path) -> float:
    return round(shutil.disk_usage(folder).free / GIB, 2) if folder.is_dir() else 0.0


def _usable_cores() -> float:
    """Cores of this process by its affinity and its container's share of processor time."""
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = limit.read_text().partition(" ") if limit.is_file() else ("", "", "")
    return min(cores(), int(quota) / int(period)) if quota.isdigit() else cores()


def _devices() -> Iterator[Device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        about = torch.cuda.get_device_properties(index)
        try:
            free = torch.cuda.mem_get_info(index)[0]
        except RuntimeError:  # full, or another process has it exclusively
            free = 0
        yield Device(about.name, about.major >= 8, free / GIB, about.total_memory / GIB)


def findings(f: Facts) -> list[Finding]:
    """What is wrong, slow or worth knowing, the worst first."""
    found = [*_cuda(f), *_host(f), *_network(f)]
    return sorted(found, key=lambda finding: list(LEVELS).index(finding[0]))


def _cuda(f: Facts) -> Iterator[Finding]:
    hidden = f.variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if f.driver and not f.cuda and hidden:
        yield "note", "CUDA_VISIBLE_DEVICES hides all CUDA devices", "unset it to train on them"
    elif f.driver and not f.cuda:
        what = f"there is an NVIDIA driver, but torch (CUDA {f.cuda_build}) sees no device"
        yield "wrong", what, "install a CUDA build; compare with nvidia-smi in the container"
    choose = "wait for the other processes (nvidia-smi), or set CUDA_VISIBLE_DEVICES"
    for index, device in enumerate(f.cuda):
        name = f"cuda:{index} ({device.name})"
        if not device.bf16:
            yield "slow", f"{name} has no bf16", "use --precision fp16 or fp32"
        if not device.free_gib:
            yield "wrong", f"{name} refuses: full, or exclusive to another process", choose
        elif device.free_gib < device.total_gib / 2:
            free = f"{device.free_gib:.1f} of {device.total_gib:.1f} GiB"
            yield "slow", f"{name} has {free} free: others use it", choose
    for variable in ("CUDA_LAUNCH_BLOCKING", "NCCL_P2P_DISABLE"):
        if f.cuda and f.variables.get(variable, "0") not in ("", "0"):
            yield "slow", f"{variable} is set", "unset it: it is for debugging"


def _host(f: Facts) -> Iterator[Finding]:
    used = f"torch uses {f.threads} thread(s) and has {f.usable_cores:g} core(s)"
    if f.threads > f.usable_cores + 0.5:
        todo = f"set OMP_NUM_THREADS to {max(1, int(f.usable_cores))} / processes on the host"
        yield "slow", used, todo
    elif not f.cuda and f.threads < f.usable_cores / 2 and "WORLD_SIZE" not in f.variables:
        yield "note", used, "for a single process, raise --threads or OMP_NUM_THREADS"
    if f.shm_gib < 0.5:
        what = f"/dev/shm has {f.shm_gib:.2f} GiB free: loader processes end with a bus error"
        yield "wrong", what, "docker run --shm-size 8g, or use --data.num-workers 0"
    if f.disk_gib < 2:
        level = "wrong" if f.disk_gib < 0.1 else "slow"
        yield level, f"{f.disk_gib:.2f} GiB of disk are free here", "use --out on another disk"


def _network(f: Facts) -> Iterator[Finding]:
    if not f.backends:
        yield "wrong", "no gloo and no NCCL: only one process can train", "install another build"
    elif len(f.cuda) > 1 and "nccl" not in f.backends:
        yield "wrong", "several CUDA devices but no NCCL", "install a build of torch with NCCL"
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        asked = f.variables.get(variable, "")
        exact = asked and not asked.startswith(("^", "="))  # NCCL: all but these; exactly these
        if exact and not any(name.startswith(tuple(asked.split(","))) for name in f.interfaces):
            what = f"{variable} names {asked}, which is not an interface"
            yield "wrong", what, f"choose one of {', '.join(f.interfaces)}"


def command(args: Args) -> bool:
    """Look and show; returns whether nothing is wrong."""
    facts = look(Path.cwd())
    found = findings(facts)
    if args.json:
        named = [dict(zip(("level", "what", "todo"), finding, strict=True)) for finding in found]
        text = json.dumps({"facts": asdict(facts), "findings": named}, indent=1)
        sys.stdout.write(text + "\n")
    else:
        show(facts, found, Console(highlight=False))
    return all(level != "wrong" for level, _, _ in found)


def show(facts: Facts, found: list[Finding], console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    values = asdict(facts)
    for name, value in {**values.pop("environment"), **values}.items():
        text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        table.add_row(Text(name.replace("_", " "), "bold"), Text(printable(text)))
    for level, what, todo in found:
        table.add_row(Text(level, LEVELS[level]), Text(printable(f"{what}: {todo}")))
    console.print(table)
    counts = Counter(level for level, _, _ in found)
    console.print(Text(", ".join(f"{counts[level]} {level}" for level in LEVELS), "bold"))
