"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .errors import ConadvError

_NAME = "step_{:08d}.pt"
FORMAT = 1


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``state`` (tensors and plain values) as the checkpoint after ``step`` updates; keep the newest ``keep``.

    The file appears under its name only when it is complete and on disk; older ones go only after that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _NAME.format(step)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise ConadvError(f"Cannot write the checkpoint {path}: {error}. Older checkpoints are intact.") from error
    _sync_folder(folder)
    for old in steps(folder)[:-keep]:
        (folder / _NAME.format(old)).unlink()
    return path


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in ``folder``, ascending."""
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.pt"))


def load_newest(folder: Path, device: torch.device) -> dict[str, Any]:
    """The newest checkpoint. Raises ConadvError if there is none or it cannot be read."""
    found = steps(folder)
    if not found:
        raise ConadvError(f"{folder} holds no checkpoint. Start the run with --overwrite instead of --resume.")
    return load(folder / _NAME.format(found[-1]), device)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """One checkpoint; only tensors and plain values are ever unpickled."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise ConadvError(
            f"Cannot read the checkpoint {path}: {error}. Delete it to resume from an older one."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ConadvError(f"{path} is not a checkpoint of this version of conadv.")
    return state


def to_device(state: Any, device: torch.device) -> Any:
    """A state with every tensor on ``device``."""
    if isinstance(state, torch.Tensor):
        return state.to(device)
    if isinstance(state, dict):
        return {key: to_device(value, device) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(to_device(value, device) for value in state)
    return state


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
