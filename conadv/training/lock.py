"""One program at a time in a folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from conadv.errors import ConadvError


class Lock:
    """A lock on the file ``path``. The system lifts it when its holder ends, even by a kill.

    It keeps nobody out where the file system has no locks, or where the file cannot be made (then
    nothing else can be written either). ``refusal``: the message while another program, or another
    Lock of this one, holds it.
    """

    def __init__(self, path: Path, refusal: str) -> None:
        self._path, self._refusal = path, refusal
        self._lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)

    def take(self) -> bool:
        """Take the lock; returns whether this call did. Raises ConadvError where somebody else
        holds it.
        """
        if self._lock.is_locked:
            return False
        try:
            self._lock.acquire()
        except Timeout as error:
            raise ConadvError(self._refusal) from error
        except (OSError, NotImplementedError):
            return False
        return True

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._path.unlink()  # before the release, or it could be somebody else's by now
            self._lock.release()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
