"""Checkpoints: written whole or not at all, sealed by a checksum, read without running code.

A file is torch's own zip archive with a seal of fixed length behind it: the SHA-256 and the length of the archive.
The seal tells damage (a write that was cut off, flipped bits, blocks of zeros) from a checkpoint; it does not tell who
wrote it. What keeps a stranger's file from running code is ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from conadv.engine.validate import is_count, shown
from conadv.errors import ConadvError, printable
from conadv.safe_io import check_archive
from conadv.training.record import sync_folder

_NAME = "step_{:08d}.pt"
_SEAL = re.compile(rb"\nconadv checkpoint 2 sha256 ([0-9a-f]{64}) bytes ([0-9]{16})\n")
SEAL_BYTES = 116
FORMAT = 2
CHUNK = 2**20
LARGEST_IMAGE = 2**14
"""Pixels of height and width, and channels."""

Tell = Callable[[str], None]


class DamagedCheckpoint(ConadvError):
    """A file that is not what was written: cut off, changed, or under another step's name."""


class _Sealed(io.RawIOBase):
    """A file to write to that counts and hashes what goes through."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._count = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._count += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error  # torch says something else of it
            raise

    def seal(self) -> None:
        """Write the seal behind what has been written."""
        self._file.write(
            b"\nconadv checkpoint 2 sha256 %s bytes %016d\n" % (self.digest.encode(), self._count)
        )

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def save(
    folder: Path, step: int, state: dict[str, Any], keep: int, best: int | None = None
) -> Path:
    """Write ``state`` (tensors and plain values) as the checkpoint after ``step`` updates.

    The file appears under its name only when it is complete, on disk, and has been read back and found to be what was
    written; older ones go only after that. The newest ``keep`` stay, and that of step ``best``.
    Raises ConadvError if it cannot be written; the checkpoints before it are then untouched.
    """
    path = folder / _NAME.format(step)
    temporary = path.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.unlink(
            missing_ok=True
        )  # of a writer that was killed, or a pipe, which would wait for a reader
        _write(temporary, {"format": FORMAT, "step": step, **state})
        verify(temporary)
        temporary.replace(path)
        sync_folder(folder)
    except (OSError, RuntimeError, DamagedCheckpoint) as error:
        with suppress(OSError):
            temporary.unlink()
        raise ConadvError(
            f"Cannot write the checkpoint {printable(path)}: {error}. Older checkpoints are intact: free some space "
            "or choose "
            "another disk, and go on with --resume."
        ) from error
    prune(folder, keep, best)
    return path


def _write(path: Path, state: dict[str, Any]) -> None:
    with path.open("wb") as file:
        sealed = _Sealed(file)
        try:
            torch.save(state, sealed)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise sealed.error or error from error
        sealed.seal()
        file.flush()
        os.fsync(file.fileno())


def prune(folder: Path, keep: int, best: int | None = None) -> None:
    """Remove all checkpoints but the newest ``keep`` and that of step ``best``, and what killed writers have left."""
    try:
        for old in steps(folder)[:-keep]:
            if old != best:
                (folder / _NAME.format(old)).unlink(missing_ok=True)
        for left in folder.glob("step_*.tmp"):
            left.unlink(missing_ok=True)
    except OSError as error:
        raise ConadvError(
            f"Cannot remove an older checkpoint: {error}. Without that the disk would fill up."
        ) from error


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in ``folder``, ascending: of files named as :func:`save` names them, no others."""
    names = {path.name for path in folder.glob("step_*.pt")}
    digits = (name.removeprefix("step_").removesuffix(".pt") for name in names)
    found = sorted(int(text) for text in digits if text.isascii() and text.isdigit())
    return [step for step in dict.fromkeys(found) if _NAME.format(step) in names]


def verify(path: Path) -> None:
    """Read a file and compare it with its seal.

    Raises DamagedCheckpoint, OSError if it cannot be read, and ConadvError for what is no file: a pipe would wait.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ConadvError(
            f"{printable(path)} is not a regular file, so it is no checkpoint. Remove it."
        )
    with path.open("rb") as file:
        file.seek(max(0, size - SEAL_BYTES))
        found = _SEAL.fullmatch(file.read())
        if found is None:
            raise DamagedCheckpoint(
                f"{printable(path)} is damaged: it does not end with a seal, so it has been cut off."
            )
        digest, length = found[1].decode(), int(found[2])
        if length != size - SEAL_BYTES:
            raise DamagedCheckpoint(
                f"{printable(path)} is damaged: {size - SEAL_BYTES} bytes where {length} were written."
            )
        file.seek(0)
        if _digest(file, length) != digest:
            raise DamagedCheckpoint(
                f"{printable(path)} is damaged: its content does not fit its checksum."
            )


def _digest(file: IO[bytes], length: int) -> str:
    found = hashlib.sha256()
    while length and (chunk := file.read(min(CHUNK, length))):
        found.update(chunk)
        length -= len(chunk)
    return found.hexdigest()


def load_newest(folder: Path, device: torch.device, tell: Tell | None = None) -> dict[str, Any]:
    """The newest checkpoint that is not damaged.

    ``tell`` hears of each damaged one that was passed over; without it that is a warning.
    Raises ConadvError if there is none, or if the newest intact one is refused (see :func:`load`).
    """
    state, damaged = find_newest(folder, device)
    for message in damaged:
        _warn(message) if tell is None else tell(message)
    return state


def find_newest(folder: Path, device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """The newest checkpoint that is not damaged, and what was wrong with the newer ones."""
    damaged: list[str] = []
    for step in reversed(steps(folder)):
        try:
            state = load(folder / _NAME.format(step), device)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
            continue
        return state, [
            f"{message} Going back to the checkpoint of step {step}." for message in damaged
        ]
    if damaged:
        raise ConadvError(
            f"None of the checkpoints in {printable(folder)} can be used: {' '.join(damaged)} "
            "Start the run with --overwrite instead of --resume."
        )
    raise ConadvError(
        f"{printable(folder)} holds no checkpoint. Start the run with --overwrite instead of --resume."
    )


def load_step(folder: Path, step: int, device: torch.device) -> dict[str, Any]:
    """The checkpoint after ``step`` updates."""
    return load(folder / _NAME.format(step), device)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """One checkpoint; only tensors and plain values are ever unpickled, and nothing of a damaged file.

    Raises DamagedCheckpoint, or ConadvError for an intact file that is refused: it holds anything else, it was written
    by another version, or what it says of itself cannot be (its step, the engine's, that of the best, its images and
    classes).
    """
    try:
        verify(path)
        check_archive(path)
        state: Any = torch.load(path, map_location=device, weights_only=True)
    except ConadvError:
        raise
    except Exception as error:  # whatever a hostile file makes of its reader
        raise ConadvError(
            f"Cannot read the checkpoint {printable(path)}: {error}. Delete it to resume from an older one."
        ) from error
    if (
        not isinstance(state, dict)
        or not is_count(state.get("format"))
        or state["format"] != FORMAT
    ):
        raise ConadvError(f"{printable(path)} is not a checkpoint of this version of conadv.")
    if problem := _envelope_problem(state):
        raise ConadvError(
            f"The checkpoint {printable(path)} does not fit itself: {problem}. It was changed: delete it to resume "
            "from an older one."
        )
    if path.name != _NAME.format(state["step"]):
        raise DamagedCheckpoint(
            f"{printable(path)} is damaged: it holds the checkpoint of step {state['step']}."
        )
    return state


def _envelope_problem(state: dict[str, Any]) -> str | None:
    """What is wrong with the plain values that are used before the state is given to a model."""
    step, engine = state.get("step"), state.get("engine")
    if not is_count(step):
        return f"its step is {shown(step)}, not a whole number"
    version = engine.get("version") if isinstance(engine, dict) else None
    if not is_count(version) or version != step:
        return f"it is of step {step}, its engine of {shown(version)}"
    if "best" not in state:
        return "it does not say which checkpoint is the best"
    return _best_problem(state, step) or _images_problem(state)


def _best_problem(state: dict[str, Any], step: int) -> str | None:
    best = state["best"]
    if best is None:
        return None
    if not isinstance(best, dict) or not is_count(best.get("step")) or best["step"] > step:
        return f"its best checkpoint is {shown(best)}, none of steps 0 to {step}"
    accuracy = best.get("accuracy")
    return (
        None
        if isinstance(accuracy, float) and 0 <= accuracy <= 1
        else f"its best accuracy is {shown(accuracy)}"
    )


def _images_problem(state: dict[str, Any]) -> str | None:
    """What is wrong with what it says of images and classes; a state of an older version may say less."""
    for name in ("channels", "image_size"):
        if name in state and not (is_count(state[name]) and 1 <= state[name] <= LARGEST_IMAGE):
            return (
                f"its {name} is {shown(state[name])}, not a whole number from 1 to {LARGEST_IMAGE}"
            )
    names = state.get("class_names", ["?"])
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return f"its class_names are {shown(names)}, not a list of words"
    return None


@contextmanager
def giving(state: dict[str, Any]) -> Iterator[None]:
    """Inside the block values of ``state`` go to the parts of a run; ConadvError for whatever they make of them."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a state may hold any plain value anywhere
        raise ConadvError(
            f"The checkpoint {_NAME.format(state['step'])} does not fit the run's config: {printable(error)[:500]}. "
            "It was changed, or belongs to another run."
        ) from error


def set_aside(folder: Path, after: int) -> None:
    """Rename the checkpoints of steps after ``after``, which could not be used, so that they do not count as kept."""
    for step in steps(folder):
        if step > after:
            path = folder / _NAME.format(step)
            path.replace(path.with_suffix(".damaged"))


def to_device(state: Any, device: torch.device) -> Any:
    """A state with every tensor on ``device``."""
    return _map(state, lambda tensor: tensor.to(device))


def snapshot(state: Any) -> Any:
    """A copy on the CPU that what trains on cannot change."""
    return _map(state, lambda tensor: tensor.detach().to("cpu", copy=True))


def _map(state: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(state, torch.Tensor):
        return change(state)
    if isinstance(state, dict):
        return {key: _map(value, change) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_map(value, change) for value in state)
    return state


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
