"""What the launcher tells a process through the environment, and the device that it computes on."""

from __future__ import annotations

import os

import torch

from conadv.errors import ConadvError, printable

MOST_RANKS = 2**20
OTHERS = {"SLURM_NTASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""Variables of launchers that torch does not read -> the launcher."""


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


def world_size() -> int:
    """How many ranks there are, by torchrun's variables; 1 without them.

    Raises ConadvError where another launcher has started several processes: each would train alone,
    as rank 0, in the same folder.
    """
    if os.environ.get("WORLD_SIZE"):
        return variable("WORLD_SIZE", range(1, MOST_RANKS + 1))
    for name, launcher in OTHERS.items():
        if os.environ.get(name, "1") not in ("", "0", "1"):
            count = printable(os.environ[name])[:40]
            raise ConadvError(
                f"{launcher} says that there are {count} processes ({name}), but WORLD_SIZE is not "
                "set: each would train by itself. Start them by torchrun, one per node, or set "
                "RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR as the script that `conadv slurm` "
                "prints does. For a single process set WORLD_SIZE=1."
            )
    if os.environ.get("RANK", "0") not in ("", "0"):
        raise ConadvError("RANK is set and WORLD_SIZE is not. Start several processes by torchrun.")
    return 1


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
