"""Write checkpoints, beside the training if asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conadv.errors import ConadvError
from conadv.training import checkpoint


class Writer:
    """Writes the checkpoints of one run; used by rank 0 alone.

    ``before`` is called before each checkpoint gets its name: what a resumed run needs besides it
    (the record up to its step) must be on disk first. In flight: with ``background`` at most one
    checkpoint, a copy of the state in the CPU's memory; the next one waits for it. The next
    :meth:`save` or :meth:`wait` raises its error; ``failed`` says so at once.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        *,
        background: bool = False,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder, self._keep, self._background, self._before = folder, keep, background, before
        self._thread: threading.Thread | None = None
        self._error: ConadvError | None = None
        self.background_seconds: float | None = None if background else 0.0
        """What the last write beside the training took: None before the first has ended, 0 if there
        are none."""

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written and nobody has heard of it yet."""
        return self._error is not None

    def save(self, step: int, state: dict[str, Any], best: int | None = None) -> None:
        """Write ``state`` as the checkpoint after ``step`` updates; with ``background`` return
        before that is done.

        Raises ConadvError if this checkpoint or the one before it cannot be written.
        """
        self.wait()
        if not self._background:
            self._write(step, state, best)
            return
        # a copy: the next step changes the tensors while the thread still writes
        arguments = step, checkpoint.snapshot(state), best
        self._thread = threading.Thread(target=self._try, args=arguments, name=f"checkpoint {step}")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises ConadvError if the last write has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, state: dict[str, Any], best: int | None) -> None:
        self._before()
        checkpoint.save(self._folder, step, state, self._keep, best)

    def _try(self, step: int, state: dict[str, Any], best: int | None) -> None:
        begin = time.monotonic()
        try:
            self._write(step, state, best)
            self.background_seconds = time.monotonic() - begin
        except ConadvError as error:
            self._error = error
        except BaseException as error:  # nobody would see a thread's traceback
            problem = f"{type(error).__name__}: {error}"
            self._error = ConadvError(f"Cannot write the checkpoint of step {step}: {problem}.")
