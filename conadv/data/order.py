"""Which images belong to which step: a pure function, so that processes agree on a batch without talking."""

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

    An epoch has ``num_images // global_batch_size`` steps; the tail of its permutation is dropped, so an epoch shows
    every image at most once. Any step can be asked for at any time: nothing is consumed.
    Raises ConadvError where the global batch is larger than the data set.
    Ranks: the same on all of them.

    >>> order = Order(num_images=10, global_batch_size=4, seed=0)
    >>> order.steps_per_epoch, order.epoch_of(3), len(order.indices(3))
    (2, 1, 4)
    """

    num_images: int
    global_batch_size: int
    seed: int

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
        """int64 indices of the whole global batch of ``step``, ``global_batch_size`` of them."""
        return self.micro_batch(step, 0, self.global_batch_size)

    def micro_batch(self, step: int, index: int, micro_batch_size: int) -> Tensor:
        """int64 indices of slice [index * micro_batch_size, (index + 1) * micro_batch_size) of the global batch."""
        assert step >= 0, step
        assert 0 <= index < self.global_batch_size // micro_batch_size, (index, micro_batch_size)
        start = step % self.steps_per_epoch * self.global_batch_size + index * micro_batch_size
        permutation = _permutation(self.num_images, self.seed, self.epoch_of(step))
        # a view would let the caller edit the cache
        return permutation[start : start + micro_batch_size].clone()


# an attack on a future batch reads the next epoch while this one is still running
@lru_cache(maxsize=2)
def _permutation(num_images: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_images, generator=rng.generator("cpu", seed, "order", epoch))
