"""What is installed and what this machine has. Nothing here judges; nothing names a host, a user or a path."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conadv import __version__
from conadv.preflight.memory import host_available
from conadv.training.record import machine

CORE = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "tyro",
    "pydantic",
    "rich",
    "matplotlib",
    "safetensors",
)
EXTRAS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "timm": "timm",
    "huggingface": "datasets",
    "lightning": "lightning",
    "accelerate": "accelerate",
    "onnx": "onnx",
}
"""Extra of conadv -> the package that it brings."""
VARIABLES = (
    *(
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_LAUNCH_BLOCKING",
        "WORLD_SIZE",
    ),
    *(
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "NCCL_P2P_DISABLE",
        "NCCL_IB_DISABLE",
        "WANDB_MODE",
    ),
)


@dataclass(frozen=True)
class Cuda:
    """One CUDA device. ``peers``: devices whose memory it reads without the host in between."""

    name: str
    capability: tuple[int, int]
    memory: int
    free: int
    peers: tuple[int, ...]


@dataclass(frozen=True)
class Interface:
    """A network interface. ``speed``: Mbit/s, None where the system does not say."""

    name: str
    up: bool
    speed: int | None


@dataclass(frozen=True)
class Facts:
    """Everything that findings are made of. Sizes in bytes; None where the system does not say."""

    versions: dict[str, str]
    extras: dict[str, str | None]
    system: str
    processor: str
    cores: int
    usable_cores: float
    threads: int
    cpu_flags: tuple[str, ...]
    onednn: bool
    memory_free: int | None
    allocator: str
    cuda_built: str | None
    nvidia_driver: bool
    cuda: tuple[Cuda, ...]
    backends: tuple[str, ...]
    interfaces: tuple[Interface, ...]
    shm: tuple[int, int] | None
    """Size and free space of /dev/shm."""
    disk_free: int
    open_files: int | None
    variables: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def look(folder: Path) -> Facts:
    """The facts of this machine. ``folder``: where runs will go, for the free disk."""
    return Facts(
        versions={
            "python": platform.python_version(),
            "conadv": __version__,
            **{p: _version(p) or "-" for p in CORE},
        },
        extras={extra: _version(package) for extra, package in EXTRAS.items()},
        system=f"{platform.system()} {platform.machine()}",
        processor=machine("", 0)["processor"],
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        threads=torch.get_num_threads(),
        cpu_flags=tuple(
            flag
            for flag in _cpu_flags()
            if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")
        ),
        onednn=torch.backends.mkldnn.is_available(),
        memory_free=host_available(),
        allocator=allocator(),
        cuda_built=torch.version.cuda,
        nvidia_driver=Path("/proc/driver/nvidia/version").exists()
        or Path("/dev/nvidiactl").exists(),
        cuda=tuple(_cuda()),
        backends=tuple(_backends()),
        interfaces=tuple(_interfaces()),
        shm=_shm(),
        disk_free=shutil.disk_usage(folder).free,
        open_files=_open_files(),
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def usable_cores() -> float:
    """Cores that this process may use: its affinity, and a container's share of processor time."""
    cores = float(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return cores if quota == "max" else min(cores, int(quota) / int(period))
    except (OSError, ValueError):
        return cores


def _cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return next(
        (
            line.partition(":")[2].split()
            for line in lines
            if line.startswith(("flags", "Features"))
        ),
        [],
    )


def allocator() -> str:
    """Whose malloc this process has: "jemalloc", "tcmalloc" or "mimalloc" where one is loaded, "glibc", "other"."""
    try:
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        loaded = ""
    found = next(
        (name for name in ("jemalloc", "tcmalloc", "mimalloc") if f"lib{name}" in loaded), None
    )
    return found or ("glibc" if platform.libc_ver()[0] == "glibc" else "other")


def _cuda() -> Iterator[Cuda]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        try:
            free, total = torch.cuda.mem_get_info(index)
        except (
            RuntimeError
        ):  # no context can be made there: somebody else's exclusively, or it has no memory left
            free, total = 0, torch.cuda.get_device_properties(index).total_memory
        peers = tuple(
            j for j in range(count) if j != index and torch.cuda.can_device_access_peer(index, j)
        )
        capability = torch.cuda.get_device_capability(index)
        yield Cuda(torch.cuda.get_device_name(index), capability, total, free, peers)


def _backends() -> Iterator[str]:
    if not dist.is_available():
        return
    for name, there in (("gloo", dist.is_gloo_available), ("nccl", dist.is_nccl_available)):
        if there():
            yield name


def _interfaces() -> Iterator[Interface]:
    for _, name in socket.if_nameindex():
        about = Path("/sys/class/net") / name
        try:
            state = (about / "operstate").read_text(encoding="utf-8").strip()
        except OSError:
            state = "unknown"
        try:
            speed = int((about / "speed").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            speed = -1
        yield Interface(name, state == "up" or name == "lo", speed if speed > 0 else None)


def _shm() -> tuple[int, int] | None:
    if not Path("/dev/shm").is_dir():
        return None
    usage = shutil.disk_usage("/dev/shm")
    return usage.total, usage.free


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit
