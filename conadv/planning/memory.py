"""How much memory a process may still take on its device, and how much work takes at its peak."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from conadv.distributed.environment import processes_here

GIB = 2**30
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available(device: torch.device) -> int | None:
    """Bytes that this process may still take: of the CUDA device, or its share of the host's.

    What torch has reserved of a CUDA device but does not use counts as free. None where the system
    does not say.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = host_available()
    return None if free is None else free // processes_here()


def host_available() -> int | None:
    """Free bytes of the host's memory, or of the container's limit where that is less (Linux)."""
    lines = _read("/proc/meminfo").splitlines()
    free = next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:")), None)
    for limit, used in _CGROUPS:
        maximum, current = _read(limit).strip(), _read(used).strip()
        if free is not None and maximum.isdigit() and current.isdigit():  # "max" is no limit
            free = min(free, max(0, int(maximum) - int(current)))
    return free


def cuda_peak(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that ``work`` adds to what is allocated, as torch reserves them; None if it runs out.

    All of it is free again afterwards.
    """
    _release()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        work()
        peak: int | None = torch.cuda.max_memory_reserved(device) - before
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        peak = None
    _release()  # here, where the error no longer holds the tensors of the work
    return peak


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch, or a library below it, could not get memory."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError:
        return ""
