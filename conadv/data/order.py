"""Which images belong to which step: a pure function, so processes agree without talking."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from conadv import rng
from conadv.errors import ConadvError


@dataclass(frozen=True)
class Order:
    """The data order of a run: a fresh permutation per epoch, keyed by (seed, "order", epoch).

    An epoch has ``num_images // global_batch_size`` steps; the tail of its permutation is dropped,
    so an epoch shows every image at most once. Any step can be asked for at any time: nothing is
    consumed.
    Raises ConadvError where the global batch is larger than the data set.
    ``read``: images that a step reads, where a method trains on some of the step before as well. A
    permutation then lasts for global_batch_size / read epochs.
    Ranks: the same on all of them.

    >>> order = Order(num_images=10, global_batch_size=4, seed=0)
    >>> order.steps_per_epoch, order.epoch_of(3), len(order.indices(3))
    (2, 1, 4)
    """

    num_images: int
    global_batch_size: int
    seed: int
    read: int | None = None

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise ConadvError(f"global_batch_size {self.global_batch_size} must be at least 1.")
        if self.global_batch_size > self.num_images:
            raise ConadvError(
                f"global_batch_size {self.global_batch_size} is larger than the training set of "
                f"{self.num_images} images. Choose a smaller batch, or more training images."
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.global_batch_size

    def epoch_of(self, step: int) -> int:
        """The 0-based epoch of a 0-based step."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> Tensor:
        """int64 indices of all that ``step`` reads, ``global_batch_size`` of them by default."""
        return self.micro_batch(step, 0, self.read or self.global_batch_size)

    def micro_batch(self, step: int, index: int, size: int) -> Tensor:
        """int64 indices of slice [index * size, (index + 1) * size) of what ``step`` reads."""
        read = self.read or self.global_batch_size
        assert step >= 0, step
        assert 0 <= index < read // size, (index, size)
        # The permutations one after the other, each without its tail, are read step by step.
        length = self.steps_per_epoch * self.global_batch_size
        number, start = divmod(step * read + index * size, length)
        found = self._permutation(number)[:length][start : start + size]
        if rest := size - len(found):
            return torch.cat([found, self._permutation(number + 1)[:rest]])
        return found.clone()  # a view would let the caller edit the cache

    def _permutation(self, number: int) -> Tensor:
        return _permutation(self.num_images, self.seed, number)


# an attack on a future batch reads the next epoch while this one is still running
@lru_cache(maxsize=3)
def _permutation(num_images: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_images, generator=rng.generator("cpu", seed, "order", epoch))
