"""Batches for the engine: the data order, read by worker processes or in place, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conadv.data.augment import sample_keys
from conadv.data.images import BadFile
from conadv.data.mix import Mix
from conadv.data.order import Order
from conadv.data.source import Source
from conadv.data.splits import Draw, Split
from conadv.data.workers import outlive_stop
from conadv.errors import ConadvError, unknown
from conadv.types import Batch, MicroBatch


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
    augments: dict[str, str]
    micro_batch_size: int
    mine: range
    rank: int = 0
    ranks: int = 1
    num_workers: int = 0
    skip_bad: bool = False
    mix: Mix | None = None
    bad: BadImages = field(default_factory=BadImages)

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
        data.aug_view. Step t is the same for any start, number of workers, and set of views. With mixup or cutmix
        labels are probabilities N,K. Pinned memory where CUDA is present. Worker processes live as long as the
        iterator. In flight: ``ahead`` micro-batches per worker.
        Raises ConadvError for a view that the data does not have and, while iterating, for an image that cannot be
        read; with data.on_bad_image skip it is noted in ``bad``, and another image of its class stands in for it in
        all views and epochs.
        """
        for view in views:
            if view not in self.augments:
                hint = " Give data.aug_view for it." if view == "aug" else ""
                raise ConadvError(f"{unknown('view', view, self.augments)}{hint}")
        keys = ((step, index) for step in range(start_step, stop_step) for index in self.mine)
        augments = {view: self.augments[view] for view in views}
        load = _LoadMicroBatch(
            self.source.train, self.order, augments, self.micro_batch_size, self.skip_bad, self.mix
        )
        parts = _stream(load, keys, self.num_workers, self.ahead)
        return self._assemble(parts, range(start_step, stop_step))

    def _assemble(
        self, parts: Iterator[tuple[dict[str, Any], list[BadFile]]], steps: range
    ) -> Iterator[Batch]:
        for step in steps:
            loaded = list(islice(parts, len(self.mine)))
            for _, bad in loaded:
                self.bad.note(bad, step)
            micro = tuple(MicroBatch(**fields) for fields, _ in loaded)
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
    source: Source,
    *,
    global_batch_size: int,
    micro_batch_size: int | None = None,
    seed: int = 0,
    augment: str = "none",
    aug_view: str | None = None,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    num_workers: int = 0,
    on_bad_image: str = "error",
    rank: int = 0,
    ranks: int = 1,
    mine: range | None = None,
) -> Data:
    """The batches of a run on ``source``; ``micro_batch_size`` None is the global batch.

    ``mine``: the micro-batches of the global batch that this process reads; default: those of learner ``rank`` of
    ``ranks``, rank x accumulation and the following. So N ranks see what one rank with N-fold accumulation sees.
    Raises ConadvError for batch sizes that do not divide, or a global batch larger than the training set.
    """
    micro = micro_batch_size or global_batch_size
    count, rest = divmod(global_batch_size, micro * ranks)
    if rest or not count:
        raise ConadvError(
            f"global_batch_size {global_batch_size} is not micro_batch_size {micro} x accumulation "
            f"x {ranks} rank(s). Choose a micro-batch that divides the batch of one rank."
        )
    order = Order(len(source.train.labels), global_batch_size, seed)
    augments = {"clean": augment, "second": augment} | ({"aug": aug_view} if aug_view else {})
    mix = Mix(mixup, cutmix, len(source.class_names), seed) if mixup or cutmix else None
    mine = range(rank * count, (rank + 1) * count) if mine is None else mine
    skip_bad = on_bad_image == "skip"
    return Data(source, order, augments, micro, mine, rank, ranks, num_workers, skip_bad, mix)


@dataclass(frozen=True)
class _LoadMicroBatch:
    """(step, micro-batch number in the global batch) -> the fields of a MicroBatch, and files that could not be read.

    Fields and not a MicroBatch: a DataLoader pins the tensors in a dictionary, not those in an object.
    """

    split: Split
    order: Order
    augments: dict[str, str]
    micro_batch_size: int
    skip_bad: bool
    mix: Mix | None = None

    def __call__(self, key: tuple[int, int]) -> tuple[dict[str, Any], list[BadFile]]:
        step, index = key
        indices_N = self.order.micro_batch(step, index, self.micro_batch_size)
        seed, epoch = self.order.seed, self.order.epoch_of(step)
        draws = {
            view: Draw(name, sample_keys(seed, epoch, view, indices_N))
            for view, name in self.augments.items()
        }
        bad: list[BadFile] = []
        views = self.split.views(indices_N, draws, bad if self.skip_bad else None)
        y_N = self.split.labels[indices_N]
        if self.mix is not None:
            views, y_N = self.mix(views, y_N, step, index)
        return {"index": index, "y_N": y_N, "views": views}, bad


@dataclass(frozen=True)
class _LoadPlain:
    """indices_N -> (images, labels) without augmentation, and files that could not be read, which are left out."""

    split: Split
    skip_bad: bool

    def __call__(self, indices_N: Tensor) -> tuple[Tensor, Tensor, list[BadFile]]:
        bad: list[BadFile] = []
        images, kept_N = self.split.readable(indices_N, bad if self.skip_bad else None)
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
            f"{str(error).strip(' .')[:300]}. A process that loads data has died, most likely for want "
            "of memory: use fewer (--data.num-workers), or give machine or container more memory and "
            "more shared memory (/dev/shm)."
        ) from error


def _as_is(item: Any) -> Any:
    return item
