"""What the launcher tells a process through the environment, and the device that it computes on."""

from __future__ import annotations

import os

import torch

from conadv.errors import ConadvError, printable

MOST_RANKS = 2**20


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of this rank; "auto" is CUDA where torch sees it, otherwise the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ConadvError("--device cuda: torch sees no CUDA device here. Use --device cpu.")
    if local_rank >= torch.cuda.device_count():
        raise ConadvError(
            f"Local rank {local_rank} has no CUDA device of its own: this host has "
            f"{torch.cuda.device_count()}. Start at most that many processes per host, or use "
            "--device cpu."
        )
    return torch.device("cuda", local_rank)


def processes_here(default: int = 1) -> int:
    """How many processes the launcher has started on this host. Raises ConadvError."""
    return variable("LOCAL_WORLD_SIZE", range(1, MOST_RANKS + 1), default)


def variable(name: str, allowed: range, default: int | None = None) -> int:
    """A number from the environment. Raises ConadvError if it is missing or not ``allowed``."""
    text = os.environ.get(name) or ("" if default is None else str(default))
    try:
        value = int(text)  # also an error beyond 4,300 digits
    except ValueError:
        value = -1
    if value not in allowed:
        found = (
            f"{printable(text)[:40]!r}, not a number" if text else "not set; it must be a number"
        )
        raise ConadvError(
            f"The environment variable {name} is {found} from {allowed.start} to "
            f"{allowed.stop - 1}. Start several processes by torchrun, which sets it."
        )
    return value
