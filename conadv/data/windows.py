"""Every batch with the one some steps later, which is what an attack on a later step needs."""

from __future__ import annotations

import copy as copies
import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from itertools import count, islice
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader

from conadv.errors import ConadvError

T = TypeVar("T")


def windows(
    batches: Iterable[T], ahead: int, *, copy: bool | None = None
) -> Iterator[tuple[T, T | None]]:
    """(item t, item t + ahead) for every t; the second is None near the end and for ``ahead`` 0.

    Works on any iterable, a DataLoader for one. Holds at most ahead + 1 items.

    copy: whether an item gets memory of its own as it arrives. Many loaders fill the same memory
    again, and an item that waits would become another one. None: unless worker processes of torch's
    DataLoader made it, whose batches are new. Raises ConadvError for an item that it cannot copy.

    >>> list(windows("abc", 1))
    [('a', 'b'), ('b', 'c'), ('c', None)]
    """
    if ahead < 0:
        raise ConadvError(
            f"ahead {ahead} must be 0 or more: it counts batches after the current one."
        )
    if copy is None:
        copy = _may_reuse_memory(batches)
    # Without anything that waits an item is used before the loader is asked for the next one.
    items = map(_owned, batches) if copy and ahead else iter(batches)
    waiting = deque(islice(items, ahead))
    while True:
        waiting.extend(islice(items, 1))
        if not waiting:
            return
        future = waiting[ahead] if 0 < ahead < len(waiting) else None
        yield waiting.popleft(), future


def _may_reuse_memory(batches: object) -> bool:
    return not (isinstance(batches, DataLoader) and batches.num_workers)


def _owned(item: Any) -> Any:
    """``item`` with memory of its own: tensors and arrays in any nest of containers."""
    if item is None or isinstance(item, (str, bytes, int, float, complex)):
        return item
    if callable(clone := getattr(item, "clone", None)):  # Tensor, TensorDict
        return clone()
    if hasattr(item, "__array__"):
        return item.copy()
    if isinstance(item, Mapping):
        content = {key: _owned(value) for key, value in item.items()}
        if not isinstance(item, MutableMapping):
            return content
        whole: Any = copies.copy(item)
        whole.update(content)
        return whole
    if isinstance(item, (tuple, list)):
        parts = map(_owned, item)
        return type(item)(*parts) if hasattr(item, "_fields") else type(item)(parts)
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        whole = copies.copy(item)
        for field in dataclasses.fields(item):
            object.__setattr__(whole, field.name, _owned(getattr(item, field.name)))
        return whole
    raise ConadvError(
        f"windows cannot copy a {type(item).__name__}, and a loader that fills its memory again "
        "would change it while it waits. Give batches of tensors in tuples, lists, dictionaries or "
        "dataclasses, or windows(..., copy=False) if each batch has memory of its own."
    )


class WindowedLoader(Generic[T]):
    """:func:`windows` for frameworks that own the loop over epochs: one ``for`` is one epoch.

        loader = WindowedLoader(DataLoader(...), step.ahead, epochs=90)
        for epoch in range(90):
            for batch, future in loader: ...

    At the end of an epoch ``future`` comes from the next one, which is therefore begun early, so
    that no batch is left to be attacked late. ``epochs``: how many there will be; the last
    ``ahead`` batches of all have no future then. None: there is always another one. A loop that
    broke off goes on where it stopped; a program that was started again begins with epoch
    ``start``. ``copy`` is that of :func:`windows`.

    Before an epoch begins, ``set_epoch`` of the loader or of its sampler (DistributedSampler) is
    called with its number, since a framework would call it too late. Raises ConadvError for a
    loader without a batch.
    Ranks: each has a loader of its own. In flight: ``ahead`` batches beside the present one.
    """

    def __init__(
        self,
        loader: Iterable[T],
        ahead: int,
        epochs: int | None = None,
        *,
        start: int = 0,
        copy: bool | None = None,
    ) -> None:
        self.loader = loader
        if copy is None:
            copy = _may_reuse_memory(loader)
        self._pairs = windows(self._batches(start, epochs), ahead, copy=copy)
        self._next: tuple[tuple[int, T], tuple[int, T] | None] | None = None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[T, T | None]]:
        present = None
        while pair := self._next or next(self._pairs, None):
            self._next = pair
            (epoch, batch), future = pair
            if present not in (None, epoch):
                return
            present, self._next = epoch, None
            yield batch, None if future is None else future[1]
            del pair, batch, future  # or they would be held beside the next ones

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
    batches: Any = getattr(loader, "batch_sampler", None)
    owners: list[Any] = [
        loader,
        getattr(loader, "sampler", None),
        getattr(batches, "sampler", None),
    ]
    for owner in owners:
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)
            return
