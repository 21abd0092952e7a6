"""How much memory there is for a process on its device, and how much a block of code took at its peak."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from conadv.errors import ConadvError

GIB = 2**30
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available(device: torch.device) -> int | None:
    """Bytes that this process may still take: of the CUDA device, or its share of what the host has free.

    What torch has reserved of a CUDA device but does not use counts as free. None where the system does not say.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = host_available()
    return None if free is None else free // processes_on_host()


def processes_on_host() -> int:
    """How many processes torchrun started on this host; 1 without it."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(text)) if text.isdigit() else 1


def host_available() -> int | None:
    """Free bytes of the host's memory, or of the container's limit where that is less. None but on Linux."""
    free = _line("/proc/meminfo", "MemAvailable:")
    for limit, used in _CGROUPS:
        maximum, current = _number(limit), _number(used)
        if free is not None and maximum is not None and current is not None:
            free = min(free, max(0, maximum - current))
    return free


def resident() -> int | None:
    """Bytes of memory that this process has now; None but on Linux."""
    return _line("/proc/self/status", "VmRSS:")


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that this process had of ``device``'s memory while ``work`` ran, what was there before included.

    CUDA: as torch reserved them. CPU: resident memory (Linux only: ConadvError elsewhere); blocks that were freed
    before and kept by the allocator count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_reserved(device)
    with suppress(OSError):  # without it, it is the peak of the process so far: never too small
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    work()
    peak = _line("/proc/self/status", "VmHWM:")
    if peak is None:
        raise ConadvError(
            "This system does not say how much memory a process has taken (Linux does), so that micro_batch_size auto "
            "cannot find out what fits. Give a number."
        )
    return peak


def release(device: torch.device) -> None:
    """Give memory that nothing uses any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _line(file: str, name: str) -> int | None:
    """The value of a line "name: 123 kB" in bytes."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def _number(file: str) -> int | None:
    """A file that holds one number; None where there is none, or "max"."""
    try:
        return int(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
