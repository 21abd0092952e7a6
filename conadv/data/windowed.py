"""A loader for frameworks that own the loop over epochs: every batch with the one that comes some steps later."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sized
from itertools import count
from typing import Any, Generic, TypeVar

from conadv.errors import ConadvError

T = TypeVar("T")


class WindowedLoader(Generic[T]):
    """What :func:`conadv.windows` does, epoch after epoch: each ``for`` over it is one epoch of ``loader``.

        loader = WindowedLoader(DataLoader(...), step.ahead, epochs=90)
        for epoch in range(90):
            for batch, future in loader: ...

    At the end of an epoch ``future`` comes from the next one, which is therefore begun ``ahead`` batches early, so that
    no batch is left to be attacked late. ``epochs``: how many there will be; the last ``ahead`` batches of all have no
    future then. None: there is always another one. A loop that broke off goes on where it stopped; a program that was
    started again begins with epoch ``start``.

    Before an epoch begins, ``set_epoch`` of the loader or of its sampler (DistributedSampler) is called with its
    number, since a framework would call it too late. Raises ConadvError for a loader without a batch.
    Ranks: each has a loader of its own. In flight: ``ahead`` batches beside the present one.
    """

    def __init__(
        self, loader: Iterable[T], ahead: int, epochs: int | None = None, *, start: int = 0
    ) -> None:
        if ahead < 0:
            raise ConadvError(
                f"ahead {ahead} must be 0 or more: it counts batches after the current one."
            )
        self.loader, self.ahead = loader, ahead
        self._stream = self._batches(start, epochs)
        self._waiting: deque[tuple[int, T]] = deque()

    def __len__(self) -> int:
        """Batches of an epoch."""
        if not isinstance(self.loader, Sized):
            raise TypeError("the loader has no length")
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[T, T | None]]:
        self._fill(1)
        if not self._waiting:
            return
        epoch = self._waiting[0][0]
        while self._waiting and self._waiting[0][0] == epoch:
            self._fill(self.ahead + 1)
            future = self._waiting[self.ahead][1] if 0 < self.ahead < len(self._waiting) else None
            yield self._waiting.popleft()[1], future
            if not self.ahead:
                self._fill(1)

    def _fill(self, size: int) -> None:
        while len(self._waiting) < size:
            item = next(self._stream, None)
            if item is None:
                return
            self._waiting.append(item)

    def _batches(self, start: int, epochs: int | None) -> Iterator[tuple[int, T]]:
        for epoch in count(start) if epochs is None else range(start, epochs):
            _set_epoch(self.loader, epoch)
            empty = True
            for batch in self.loader:
                empty = False
                yield epoch, batch
            if empty:
                raise ConadvError(
                    "The loader has no batch: its data set is empty, or smaller than a batch."
                )


def _set_epoch(loader: Any, epoch: int) -> None:
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners: list[Any] = [
        loader,
        getattr(loader, "sampler", None),
        getattr(batch_sampler, "sampler", None),
    ]
    for owner in owners:
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)
            return
