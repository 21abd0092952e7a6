"""One program at a time: a lock on a file, which the system lifts when its holder ends, however that happens."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from conadv.errors import ConadvError

try:
    import fcntl
except ImportError:  # not a POSIX system: nobody watches over two programs in one folder
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()
"""Descriptors of this process. A child that it forks would hold its locks too, and outlive it."""


class Lock:
    """A lock on ``path``, an empty file that is there while the lock is held, and longer if its holder was killed.

    Nobody is kept out where the system or the file system has no locks, or where the file cannot be made (what
    keeps it from being made keeps everything else from being written). ``refusal``: what :meth:`take` says when another
    program, or another Lock of this one, holds the lock. As a context manager it is released at the end.
    """

    def __init__(self, path: Path, refusal: str) -> None:
        self._path, self._refusal = path, refusal
        self._file: int | None = None

    def take(self) -> bool:
        """Take the lock; returns whether this call has done so. Raises ConadvError where somebody else holds it."""
        if fcntl is None or self._file is not None:
            return False
        while (file := self._open()) is not None:
            if not self._locked(file):
                os.close(file)
                return False
            if self._is_there(file):
                self._file = file
                _held.add(file)
                return True
            os.close(file)  # its last holder has removed it meanwhile
        return False

    def release(self) -> None:
        """Give the lock back, and remove its file."""
        if self._file is not None:
            with suppress(OSError):
                self._path.unlink()
            _held.discard(self._file)
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _open(self) -> int | None:
        with suppress(OSError):
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        return None

    def _locked(self, file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(file)
                raise ConadvError(self._refusal) from error
            return False  # a file system without locks
        return True

    def _is_there(self, file: int) -> bool:
        """Whether the file still has its name: a lock on one that was removed keeps nobody out."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(file), self._path.lstat())
        return False


def _forget() -> None:
    """In a forked child."""
    while _held:
        os.close(_held.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)
