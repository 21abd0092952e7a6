"""One message with a few integers and several tensors in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: that of torch's own CPU tensors, so that kernels treat the parts like them
TAGS = 5


class Message:
    """A buffer that travels as one message: ``TAGS`` integers, then tensors like ``examples``.

    ``bytes`` is what is sent. ``parts`` are views into it, with the examples' shapes, types and
    memory order (examples may be on the meta device).
    """

    def __init__(self, examples: Sequence[Tensor], device: torch.device) -> None:
        starts, size = [], ALIGNMENT
        for example in examples:
            starts.append(size)
            size += -(-example.nbytes // ALIGNMENT) * ALIGNMENT
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self._tags = self.bytes[: TAGS * 8].view(torch.int64)
        self.parts = tuple(
            shaped_like(self.bytes[start : start + example.nbytes].view(example.dtype), example)
            for start, example in zip(starts, examples, strict=True)
        )

    @torch.no_grad()
    def fill(self, tags: Sequence[int], tensors: Sequence[Tensor] = ()) -> None:
        """Overwrite tags and parts; without tensors the parts stay as they are."""
        self._tags.copy_(torch.tensor(tags, dtype=torch.int64))
        if tensors:
            torch._foreach_copy_(list(self.parts), [tensor.detach() for tensor in tensors])

    @property
    def tags(self) -> list[int]:
        """Sync point."""
        tags: list[int] = self._tags.tolist()
        return tags


def shaped_like(part: Tensor, like: Tensor) -> Tensor:
    """A part of a flat buffer in the shape and memory order of ``like``, as gradients have."""
    strides = torch.empty_like(like, device="meta").stride()
    return part.as_strided(like.shape, strides, part.storage_offset())
