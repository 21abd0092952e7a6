"""Batches for the engine: the data order, read by worker processes or in place, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conadv.data.augment import sample_keys
from conadv.data.images import BadImage
from conadv.data.mix import Mix
from conadv.data.order import Order
from conadv.data.source import Source
from conadv.data.splits import Draw, Split
from conadv.data.workers import outlive_stop
from conadv.errors import ConadvError, unknown
from conadv.types import Batch, MicroBatch


class Data:
    """The batches of one run on ``source``, as one rank sees them.

    ``mine``: the micro-batches of the global batch that this process reads; default: those of
    learner ``rank`` of ``ranks``, rank x accumulation and the following, so that N ranks see what
    one rank with N-fold accumulation sees. Of evaluation batches it reads every ``ranks``-th.
    ``read``: images of the data in a micro-batch, where the method adds images of its own
    (:meth:`conadv.types.Method.num_fresh`); default all. ``augments``: the augmentation of each
    view that can be asked for. ``bad``: step, path and reason of each image file that this process
    could not read; the step is None in an evaluation. ``logged``: paths that the record holds.
    Raises ConadvError for batch sizes that do not divide, or a global batch larger than the
    training set.
    Ranks: nothing is reduced.
    """

    def __init__(
        self,
        source: Source,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        read: int | None = None,
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
    ) -> None:
        count, rest = divmod(global_batch_size, micro_batch_size * ranks)
        if rest or not count:
            raise ConadvError(
                f"global_batch_size {global_batch_size} is not micro_batch_size {micro_batch_size} "
                f"x accumulation x {ranks} rank(s). Choose one that divides a rank's batch."
            )
        self.source, self.channels, self.image_size = source, source.channels, source.image_size
        self.class_names, self.num_classes = source.class_names, len(source.class_names)
        self.train_size, self.test_size = len(source.train.labels), len(source.test.labels)
        self.read = read or micro_batch_size
        of_step = global_batch_size // micro_batch_size * self.read
        self.order = Order(self.train_size, global_batch_size, seed, of_step)
        self.augments = {"clean": augment, "second": augment}
        if aug_view is not None:
            self.augments["aug"] = aug_view
        mixed = mixup or cutmix
        self.mix = Mix(mixup, cutmix, self.num_classes, seed) if mixed else None
        self.micro_batch_size, self.num_workers = micro_batch_size, num_workers
        self.rank, self.ranks = rank, ranks
        self.mine = range(rank * count, (rank + 1) * count) if mine is None else mine
        self.skip_bad = on_bad_image == "skip"
        self.bad: dict[str, dict[str, Any]] = {}
        self.logged: set[str] = set()
        self._note(source.bad, None)

    @property
    def ahead(self) -> int:
        """Micro-batches that each worker prepares ahead; 0 without workers.

        Enough for a whole step: its micro-batches are taken at once, and workers that had stopped
        after fewer would leave the next step waiting for the rest. Bytes of a rank: ahead x
        num_workers x views x micro_batch_size x channels x image_size^2.
        """
        return max(2, -(-len(self.mine) // self.num_workers)) if self.num_workers else 0

    def train_batches(
        self, start_step: int, stop_step: int, views: tuple[str, ...] = ("clean",)
    ) -> Iterator[Batch]:
        """This rank's batches of steps start_step..stop_step-1: uint8 images N,C,H,W by view.

        "clean" and "second" are independent draws of data.augment (identical where it is "none"),
        "aug" is a draw of data.aug_view. Step t is the same for any start, number of workers, and
        set of views. With mixup or cutmix labels are probabilities N,K. Memory is pinned where CUDA
        is present. Worker processes live as long as the iterator.
        Raises ConadvError for a view that the data does not have and, while iterating, for an image
        that cannot be read; with data.on_bad_image skip it is noted in ``bad``, and another image
        of its class stands in for it in all views and epochs.
        In flight: ``ahead`` micro-batches per worker.
        """
        for view in views:
            if view not in self.augments:
                hint = " Give data.aug_view for it." if view == "aug" else ""
                raise ConadvError(f"{unknown('view', view, self.augments)}{hint}")
        steps = range(start_step, stop_step)
        keys = ((step, index) for step in steps for index in self.mine)
        load = partial(self._load, views)
        return self._assemble(_stream(load, keys, self.num_workers, self.ahead), steps)

    def _load(
        self, views: tuple[str, ...], key: tuple[int, int]
    ) -> tuple[dict[str, Any], list[BadImage]]:
        """(step, micro-batch number) -> the fields of a MicroBatch, and images that cannot be read.

        Fields and not a MicroBatch: a DataLoader pins tensors in a dictionary, not in an object.
        """
        (step, index), order, split = key, self.order, self.source.train
        indices_N = order.micro_batch(step, index, self.read)
        epoch = order.epoch_of(step)
        draws = {
            view: Draw(self.augments[view], sample_keys(order.seed, epoch, view, indices_N))
            for view in views
        }
        bad: list[BadImage] = []
        images = split.views(indices_N, draws, bad if self.skip_bad else None)
        y_N = split.labels[indices_N]
        if self.mix is not None:
            images, y_N = self.mix(images, y_N, step, index)
        return {"index": index, "y_N": y_N, "views": images}, bad

    def _assemble(
        self, parts: Iterator[tuple[dict[str, Any], list[BadImage]]], steps: range
    ) -> Iterator[Batch]:
        for step in steps:
            loaded = list(islice(parts, len(self.mine)))
            for _, bad in loaded:
                self._note(bad, step)
            micro = tuple(MicroBatch(**fields) for fields, _ in loaded)
            yield Batch(step, micro, self.order.epoch_of(step))

    def _note(self, found: Iterable[BadImage], step: int | None) -> None:
        for image in found:
            line = {"step": step, "path": image.name, "reason": image.reason}
            self.bad.setdefault(image.name, line)

    def eval_batches(
        self, split: str, limit: int | None, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 images N,C,H,W, labels N) over ``split``, unaugmented and always in one order.

        split: "train", "test", or "validation" where images are held out.
        limit: at most that many images: the first of a fixed permutation, which does not depend on
        the run's seed. The last batch may be smaller than ``batch_size``.
        Of these batches rank r gets those with the numbers r, r + ranks, ...: with more ranks than
        batches some get none. With data.on_bad_image skip, images that cannot be read are left out
        (a batch may be empty) and noted in ``bad``.
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
        load = partial(self._load_plain, splits[split])
        for images, labels, bad in _stream(load, mine, self.num_workers):
            self._note(bad, None)
            yield images, labels

    def _load_plain(self, split: Split, indices_N: Tensor) -> tuple[Tensor, Tensor, list[BadImage]]:
        bad: list[BadImage] = []
        images, kept_N = split.readable(indices_N, bad if self.skip_bad else None)
        return images, split.labels[kept_N], bad


@dataclass(frozen=True)
class _Caught(Dataset[Any]):
    """Returns a user's error: raised in a worker, it would come with the worker's traceback."""

    load: Callable[[Any], Any]

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.load(key)
        except ConadvError as error:
            return error


def _stream(
    load: Callable[[Any], Any], keys: Iterable[Any], num_workers: int, ahead: int = 2
) -> Iterator[Any]:
    """load(key) for each key, in order, by torch's DataLoader: its workers have one thread each.

    ahead: keys that each worker may be ahead of what was taken.
    """
    loader: DataLoader[Any] = DataLoader(
        _Caught(load),
        batch_size=None,
        sampler=keys,
        num_workers=num_workers,
        collate_fn=_as_is,  # the default one walks through every part, 10 % of a step on digits
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=ahead if num_workers else None,
        worker_init_fn=outlive_stop if num_workers else None,
        generator=torch.Generator(),  # or it would move the caller's random stream
    )
    with naming_lost_workers():
        for item in loader:
            if isinstance(item, ConadvError):
                raise item
            yield item


@contextmanager
def naming_lost_workers() -> Iterator[None]:
    """ConadvError for a loader's worker that was killed.

    torch reports it wherever the main process happens to be.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ConadvError(
            f"{str(error).strip(' .')[:300]}. A process that loads data has died, most likely for "
            "lack of memory: use fewer (--data.num-workers), or give it more memory and more "
            "shared memory (/dev/shm)."
        ) from error


def _as_is(item: Any) -> Any:
    return item
