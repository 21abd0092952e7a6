"""Checkpoints: written whole or not at all, sealed by a checksum, read without running code.

A file is torch's own zip archive with a seal of fixed length behind it: the SHA-256 and the length
of the archive. The seal tells damage (a write that was cut off, flipped bits, blocks of zeros) from
a checkpoint; it does not tell who wrote it. What keeps a stranger's file from running code is
``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated, Any

import torch
from pydantic import Field, ValidationError, model_validator
from torch.utils._pytree import tree_map_only

from conadv import __version__
from conadv.config.schema import MOST
from conadv.errors import ConadvError, printable
from conadv.safe_io import Document, Share, check_archive, first_problem, sync_folder

_NAME = "step_{:08d}.pt"
_SEAL = re.compile(rb"\nconadv checkpoint 2 sha256 ([0-9a-f]{64}) bytes ([0-9]{16})\n")
SEAL_BYTES = 116
FORMAT = 2
CHUNK = 2**20
LARGEST_IMAGE = 2**14  # pixels of height and width, and channels

_Step = Annotated[int, Field(ge=0, le=MOST)]
_Size = Annotated[int, Field(ge=1, le=LARGEST_IMAGE)]


class DamagedCheckpoint(ConadvError):
    """A file that is not what was written: cut off, changed, or under another step's name."""


class _Best(Document):
    step: _Step
    accuracy: Share


class _Engine(Document):
    version: _Step


class _Envelope(Document):
    """The plain values of a checkpoint that are used before its state goes to a model; old ones may
    have fewer.
    """

    step: _Step
    engine: _Engine
    best: _Best | None
    channels: _Size = 1
    image_size: _Size = 1
    class_names: Annotated[list[str], Field(min_length=1)] = Field(["?"])

    @model_validator(mode="after")
    def _fits_itself(self) -> _Envelope:
        if self.engine.version != self.step:
            raise ValueError(f"engine is at step {self.engine.version}, not {self.step}")
        if self.best is not None and self.best.step > self.step:
            raise ValueError(f"best checkpoint is of a later step, {self.best.step}")
        return self


# Writing


class _Sealed:
    """A file to write to that counts and hashes what goes through."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._count = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._count += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error  # torch raises another error instead
            raise

    def flush(self) -> None:
        """torch calls it; the caller flushes after the seal."""

    def seal(self) -> None:
        """Write the seal behind what has been written."""
        values = self._hash.hexdigest().encode(), self._count
        self._file.write(b"\nconadv checkpoint 2 sha256 %s bytes %016d\n" % values)


def save(
    folder: Path, step: int, state: dict[str, Any], keep: int, best: int | None = None
) -> Path:
    """Write ``state`` (tensors and plain values) as the checkpoint after ``step`` updates.

    The file gets its name only when it is complete, on disk, and has been read back and compared
    with what was written; older ones go only after that. The newest ``keep`` stay, and that of step
    ``best``.
    Raises ConadvError if it cannot be written; the checkpoints before it are then untouched.
    """
    path = folder / _NAME.format(step)
    temporary = path.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # a killed writer's, or a pipe, which would block
        _write(temporary, {"format": FORMAT, "conadv": __version__, "step": step, **state})
        verify(temporary)
        temporary.replace(path)
        sync_folder(folder)
    except (OSError, RuntimeError, DamagedCheckpoint) as error:
        with suppress(OSError):
            temporary.unlink()
        raise ConadvError(
            f"Cannot write the checkpoint {printable(path)}: {error}. Older checkpoints are "
            "intact: free some space or choose another disk, and go on with --resume."
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
    """Remove all checkpoints but the newest ``keep`` and that of step ``best``, and what killed
    writers have left.
    """
    old = [folder / _NAME.format(step) for step in steps(folder)[:-keep] if step != best]
    try:
        for path in (*old, *folder.glob("step_*.tmp")):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ConadvError(
            f"Cannot remove an older checkpoint: {error}. Without that the disk would fill up."
        ) from error


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in ``folder``, ascending: of files named exactly as :func:`save`
    names them.
    """
    names = {path.name for path in folder.glob("step_*.pt")}
    digits = (name.removeprefix("step_").removesuffix(".pt") for name in names)
    found = {int(text) for text in digits if text.isascii() and text.isdigit()}
    return sorted(step for step in found if _NAME.format(step) in names)


def set_aside(folder: Path, after: int) -> None:
    """Rename the checkpoints of steps after ``after``, which could not be used, so that they do not
    count as kept.
    """
    for step in steps(folder):
        if step > after:
            path = folder / _NAME.format(step)
            path.replace(path.with_suffix(".damaged"))


# Reading


def verify(path: Path) -> None:
    """Read a file and compare it with its seal.

    Raises DamagedCheckpoint, OSError if it cannot be read, and ConadvError for a pipe or folder in
    its place.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ConadvError(
            f"{printable(path)} is not a regular file, so it cannot be a checkpoint. Remove it."
        )
    with path.open("rb") as file:
        file.seek(max(0, size - SEAL_BYTES))
        found = _SEAL.fullmatch(file.read())
        problem = ""
        if found is None:
            problem = "it does not end with a seal, so it has been cut off"
        elif int(found[2]) != size - SEAL_BYTES:
            problem = f"{size - SEAL_BYTES} bytes where {int(found[2])} were written"
        elif _digest(file, size - SEAL_BYTES) != found[1].decode():
            problem = "its content does not match its checksum"
    if problem:
        raise DamagedCheckpoint(f"{printable(path)} is damaged: {problem}.")


def _digest(file: IO[bytes], length: int) -> str:
    found = hashlib.sha256()
    file.seek(0)
    while length and (chunk := file.read(min(CHUNK, length))):
        found.update(chunk)
        length -= len(chunk)
    return found.hexdigest()


def load_newest(folder: Path, device: torch.device) -> dict[str, Any]:
    """As :func:`find_newest`, with a warning for each damaged checkpoint that was passed over."""
    state, damaged = find_newest(folder, device)
    for message in damaged:
        warnings.warn(message, stacklevel=2)
    return state


def find_newest(folder: Path, device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """The newest checkpoint that is not damaged, and what was wrong with the newer ones.

    Raises ConadvError if there is none, or if the newest intact one is refused (see :func:`load`).
    """
    damaged: list[str] = []
    for step in reversed(steps(folder)):
        try:
            state = load_step(folder, step, device)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
        else:
            back = f"Going back to the checkpoint of step {step}."
            return state, [f"{why} {back}" for why in damaged]
    shown, why = printable(folder), " ".join(damaged)
    problem = f"None of the checkpoints in {shown} can be used: {why}" if damaged else ""
    raise ConadvError(
        f"{problem or f'{shown} holds no checkpoint.'} Start the run with --overwrite instead of "
        "--resume."
    )


def load_step(folder: Path, step: int, device: torch.device) -> dict[str, Any]:
    """The checkpoint after ``step`` updates."""
    return load(folder / _NAME.format(step), device)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """One checkpoint; only tensors and plain values are ever unpickled, and nothing of a damaged
    file.

    Raises DamagedCheckpoint, or ConadvError for an intact file that is refused: it holds anything
    else, another version wrote it in another format, or what it says of itself is impossible.
    """
    try:
        verify(path)
        check_archive(path)
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except ConadvError:
        raise
    except Exception as error:  # torch raises anything on a hostile file
        raise ConadvError(
            f"Cannot read the checkpoint {printable(path)}: {error}. Delete it to resume from an "
            "older one."
        ) from error
    found = state.get("format") if isinstance(state, dict) else None
    if type(found) is not int or found != FORMAT:
        by = f", but of version {other}" if (other := _other_version(state)) else ""
        raise ConadvError(f"{printable(path)} is not a checkpoint of this version of conadv{by}.")
    try:
        _Envelope.model_validate(state)
    except ValidationError as error:
        raise ConadvError(
            f"The checkpoint {printable(path)} does not fit itself: its {first_problem(error)}. It "
            "was changed: delete it to resume from an older one."
        ) from error
    if path.name != _NAME.format(state["step"]):
        raise DamagedCheckpoint(
            f"{printable(path)} is damaged: it holds the checkpoint of step {state['step']}."
        )
    return state


def _other_version(state: object) -> str:
    """The other version of conadv that wrote a checkpoint; empty if this one did, or nothing says
    so.
    """
    version = state.get("conadv", "0.1") if isinstance(state, dict) else __version__
    return "" if version == __version__ else printable(version)[:40]


@contextmanager
def restoring(state: dict[str, Any], but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn any error while a run takes up ``state`` into a ConadvError that blames the checkpoint.

    A state may hold any plain value anywhere. ``but``: errors that are none of its fault.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError, *but)):
            raise
        by = f", or was written by version {other}" if (other := _other_version(state)) else ""
        raise ConadvError(
            f"The checkpoint {_NAME.format(state['step'])} does not fit the run's config: "
            f"{printable(error)[:500]}. It was changed, or belongs to another run{by}."
        ) from error


# Copies


def to_device(state: Any, device: torch.device) -> Any:
    """A state with every tensor on ``device``."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), state)


def snapshot(state: Any) -> Any:
    """A copy on the CPU, which training goes on without changing."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)
