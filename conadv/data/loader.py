"""Batches for the engine: the data order, read by worker processes or in place, step by step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conadv.config.schema import AugmentName, Config, accumulation, micro_batch
from conadv.data.augment import sample_keys
from conadv.data.files import BadFile, Progress
from conadv.data.mix import Mix
from conadv.data.order import Order
from conadv.data.sources import Source, build_source
from conadv.data.splits import Draw, Split
from conadv.errors import ConadvError, unknown
from conadv.training.signals import outlive_stop
from conadv.types import Batch, MicroBatch

T = TypeVar("T")


@dataclass
class BadImages:
    """The image files that could not be read so far, each once, as this process came across them."""

    known: set[str] = field(default_factory=set)
    waiting: list[dict[str, Any]] = field(default_factory=list)
    logged: set[str] = field(default_factory=set)
    """What the record holds already: on rank 0, from all ranks and from before a resume."""

    def note(self, found: Iterable[BadFile], step: int | None) -> None:
        """``step``: the one that the images belong to; None for an evaluation."""
        for path, reason in found:
            if path not in self.known:
                self.known.add(path)
                self.waiting.append({"step": step, "path": path, "reason": reason})

    def take(self, last_step: int) -> list[dict[str, Any]]:
        """What was found since the last call, for the record; ``last_step``: the one that an evaluation follows."""
        found, self.waiting = self.waiting, []
        return [
            {**line, "step": last_step if line["step"] is None else line["step"]} for line in found
        ]


@dataclass(frozen=True)
class Data:
    """The data of one run as one rank sees it. Made by :func:`build_data`.

    ``augments`` maps each view that can be asked for to its augmentation.
    Ranks: training batches hold the micro-batches of the global batch with the numbers ``mine``, evaluation batches
    every ``ranks``-th of the split's. Nothing is reduced.
    """

    source: Source
    order: Order
    augments: dict[str, AugmentName]
    micro_batch_size: int
    mine: range
    rank: int = 0
    num_workers: int = 0
    ranks: int = 1
    skip_bad: bool = False
    bad: BadImages = field(default_factory=BadImages)
    mix: Mix | None = None

    @property
    def num_classes(self) -> int:
        return len(self.source.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def channels(self) -> int:
        return self.source.channels

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.source.image_size

    @property
    def ahead(self) -> int:
        """Micro-batches that each worker prepares ahead; 0 without workers.

        Enough for a whole step: its micro-batches are taken at once, and workers that had stopped after fewer would
        leave the next step waiting for the rest. Bytes of a rank: ahead x num_workers x views x micro_batch_size
        x channels x image_size^2.
        """
        return max(2, -(-len(self.mine) // self.num_workers)) if self.num_workers else 0

    @property
    def train_size(self) -> int:
        return len(self.source.train.labels)

    @property
    def test_size(self) -> int:
        return len(self.source.test.labels)

    def train_batches(
        self, start_step: int, stop_step: int, views: tuple[str, ...] = ("clean",)
    ) -> Iterator[Batch]:
        """This rank's batches of steps start_step..stop_step-1, each with uint8 images N,C,H,W for each view.

        "clean" and "second" are independent draws of data.augment (identical where it is "none"), "aug" is a draw of
        data.aug_view. Step t is the same wherever one starts, for any number of workers, and whichever other views are
        drawn. With data.mixup or data.cutmix labels are probabilities N,K. Pinned memory where CUDA is present.
        Worker processes live as long as the iterator. In flight: ``ahead`` micro-batches per worker, which is all of
        the next step and at least two per worker. Raises ConadvError for a view that the configuration has not and,
        while iterating, for an image that cannot be read; with data.on_bad_image skip it is noted in ``bad``, and
        another image of its class stands in for it in all views and epochs.
        """
        for view in views:
            if view not in self.augments:
                hint = " Give data.aug_view for it." if view == "aug" else ""
                raise ConadvError(f"{unknown('view', view, self.augments)}{hint}")
        keys = ((step, index) for step in range(start_step, stop_step) for index in self.mine)
        load = _LoadMicroBatch(
            self.source.train,
            self.order,
            {view: self.augments[view] for view in views},
            self.micro_batch_size,
            self.skip_bad,
            self.mix,
        )
        return self._assemble(
            _stream(load, keys, self.num_workers, self.ahead), range(start_step, stop_step)
        )

    def _assemble(self, parts: Iterator[dict[str, Any]], steps: range) -> Iterator[Batch]:
        for step in steps:
            loaded = list(islice(parts, len(self.mine)))
            for part in loaded:
                self.bad.note(part.pop("bad"), step)
            micro = tuple(MicroBatch(**part) for part in loaded)
            yield Batch(step, micro, self.order.epoch_of(step))

    def eval_batches(
        self, split: str, limit: int | None, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 images N,C,H,W, labels N) over ``split``, unaugmented and always in one order.

        ``split``: "train", "test", or "validation" where images are held out (data.validation_images).

        With ``limit`` at most that many images: the first of a fixed permutation, which does not depend on the run's
        seed. The last batch may be smaller than ``batch_size``. Of all these batches rank r gets those with the numbers
        r, r + ranks, r + 2 ranks, ...: with more ranks than batches some get none. With data.on_bad_image skip, images
        that cannot be read are left out (a batch may be empty) and noted in ``bad``.
        """
        splits = {"train": self.source.train, "test": self.source.test}
        if self.source.validation is not None:
            splits["validation"] = self.source.validation
        if split not in splits:
            raise unknown("split", split, splits)
        assert limit is None or limit > 0, limit
        size = len(splits[split].labels)
        indices = torch.arange(size)
        if limit is not None:
            indices = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:limit]
        mine = torch.split(indices, batch_size)[self.rank :: self.ranks]
        return self._evaluated(
            _stream(_LoadPlain(splits[split], self.skip_bad), mine, self.num_workers)
        )

    def _evaluated(
        self, parts: Iterator[tuple[Tensor, Tensor, list[BadFile]]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, bad in parts:
            self.bad.note(bad, None)
            yield images, labels


def build_data(
    config: Config,
    *,
    rank: int = 0,
    ranks: int = 1,
    mine: range | None = None,
    progress: Progress | None = None,
    source: Source | None = None,
) -> Data:
    """Everything that a run reads, checked before any training. ``progress`` hears of images decoded into memory.

    ``mine``: the micro-batches of the global batch that this process reads; default: those of learner ``rank`` of
    ``ranks``. ``source``: what :func:`build_source` has made of ``config.data`` and the seed, where the caller
    has it already.

    Raises ConadvError, naming the path or the setting and what to do, for a folder that cannot be trained on, for
    settings that do not fit the data (mean and std, train_images, image sizes) or each other (batch sizes).
    """
    count = accumulation(config, ranks)
    source = source or build_source(config.data, progress, config.seed)
    order = Order(len(source.train.labels), config.global_batch_size, config.seed)
    augments: dict[str, AugmentName] = {"clean": config.data.augment, "second": config.data.augment}
    if config.data.aug_view is not None:
        augments["aug"] = config.data.aug_view
    micro = micro_batch(config)
    mine = range(rank * count, (rank + 1) * count) if mine is None else mine
    skip_bad = config.data.on_bad_image == "skip"
    mix = None
    if config.data.mixup or config.data.cutmix:
        mix = Mix(config.data.mixup, config.data.cutmix, len(source.class_names), config.seed)
    return Data(
        source,
        order,
        augments,
        micro,
        mine,
        rank,
        config.data.num_workers,
        ranks,
        skip_bad,
        mix=mix,
    )


def windows(batches: Iterable[T], ahead: int) -> Iterator[tuple[T, T | None]]:
    """(item t, item t + ahead) for every t, with None for the second near the end and where ``ahead`` is 0.

    This is what an attack on the batch of a later step needs. Works on any iterable, a DataLoader for one. Holds at
    most ahead + 1 items.

    >>> list(windows("abc", 1))
    [('a', 'b'), ('b', 'c'), ('c', None)]
    """
    if ahead < 0:
        raise ConadvError(
            f"ahead {ahead} must be 0 or more: it counts items after the current one."
        )
    return _windows(iter(batches), ahead)


def _windows(items: Iterator[T], ahead: int) -> Iterator[tuple[T, T | None]]:
    waiting = deque(islice(items, ahead))
    while True:
        waiting.extend(islice(items, 1))
        if not waiting:
            return
        future = waiting[ahead] if 0 < ahead < len(waiting) else None
        yield waiting.popleft(), future


@dataclass(frozen=True)
class _LoadMicroBatch:
    """(step, micro-batch number in the global batch) -> the fields of a MicroBatch, and "bad" files."""

    split: Split
    order: Order
    augments: dict[str, AugmentName]
    micro_batch_size: int
    skip_bad: bool
    mix: Mix | None = None

    def __call__(self, key: tuple[int, int]) -> dict[str, Any]:
        step, index = key
        indices_N = self.order.micro_batch(step, index, self.micro_batch_size)
        seed, epoch = self.order.seed, self.order.epoch_of(step)
        draws = {
            v: Draw(name, sample_keys(seed, epoch, v, indices_N))
            for v, name in self.augments.items()
        }
        bad: list[BadFile] = []
        views = self.split.views(indices_N, draws, bad if self.skip_bad else None)
        y_N = self.split.labels[indices_N]
        if self.mix is not None:
            views, y_N = self.mix(views, y_N, step, index)
        return {"index": index, "y_N": y_N, "views": views, "bad": bad}


@dataclass(frozen=True)
class _LoadPlain:
    """indices_N -> (images, labels) without augmentation, and "bad" files, which are left out."""

    split: Split
    skip_bad: bool

    def __call__(self, indices_N: Tensor) -> tuple[Tensor, Tensor, list[BadFile]]:
        bad: list[BadFile] = []
        if not self.skip_bad:
            return self.split.plain(indices_N), self.split.labels[indices_N], bad
        images, kept_N = self.split.readable(indices_N, bad)
        return images, self.split.labels[kept_N], bad


@dataclass(frozen=True)
class _Caught(Dataset[Any]):
    """Hands a user's error back as a value: raised in a worker, it would come out wrapped in the worker's traceback."""

    load: Callable[[Any], Any]

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.load(key)
        except ConadvError as error:
            return error


def _stream(
    load: Callable[[Any], Any], keys: Iterable[Any], num_workers: int, ahead: int = 2
) -> Iterator[Any]:
    """load(key) for each key, in order, by torch's DataLoader (which gives each of its workers one thread).

    ``ahead``: keys that each worker may be ahead of what was taken.
    """
    loader: DataLoader[Any] = DataLoader(
        _Caught(load),
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        collate_fn=_as_is,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=ahead if num_workers else None,
        worker_init_fn=outlive_stop if num_workers else None,
        generator=torch.Generator(),  # or it would draw from the global one and move the caller's random stream
    )
    with naming_lost_workers():
        for item in loader:
            if isinstance(item, ConadvError):
                raise item
            yield item


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """ConadvError for a loader's process that was killed; torch reports it wherever the main process is just then."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ConadvError(
            f"{str(error).strip(' .')[:300]}. A process that loads data has died, most likely for want of memory: use "
            "fewer (--data.num-workers), or give machine or container more memory and more shared memory (/dev/shm)."
        ) from error


def _as_is(item: T) -> T:
    return item
