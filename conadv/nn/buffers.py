"""Buffers of a model, so that a forward pass can leave all of its state alone.

Batch norm's statistics are kept still by a flag (:func:`conadv.frozen_stats`). Other modules have
none and write to theirs in train mode: instance norm, spectral norm, moving quantisers, modules
that carry a state of a generator. Those are copied before, and put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conadv.nn.split_batchnorm import frozen_stats


class BufferCopies:
    """Copies of a model's buffers, those of batch norm only with ``batchnorm``.

    In flight: a copy of these buffers. Most models have none but batch norm's.
    """

    def __init__(self, model: nn.Module, *, batchnorm: bool) -> None:
        self._model, self._batchnorm = model, batchnorm
        self._found: dict[str, tuple[nn.Module, str, Tensor]] = {}
        self.copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Copy what the buffers hold now."""
        # Looked up each time: modules may be exchanged, and some assign new tensors to buffers.
        self._found = dict(self._buffers())
        now = {name: buffer for name, (_, _, buffer) in self._found.items()}
        shapes = [(name, buffer.shape) for name, buffer in now.items()]
        if shapes != [(name, copy.shape) for name, copy in self.copies.items()]:
            self.copies = {name: buffer.clone() for name, buffer in now.items()}
        elif now:
            torch._foreach_copy_(list(self.copies.values()), list(now.values()))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the buffers back what :meth:`take` saw, in the tensors that it saw."""
        for module, key, buffer in self._found.values():
            module._buffers[key] = buffer
        if self._found:
            buffers = [buffer for _, _, buffer in self._found.values()]
            torch._foreach_copy_(buffers, list(self.copies.values()))

    def _buffers(self) -> Iterator[tuple[str, tuple[nn.Module, str, Tensor]]]:
        seen: set[int] = set()  # a buffer that modules share has one name
        for prefix, module in self._model.named_modules():
            if self._batchnorm or not isinstance(module, _BatchNorm):
                for key, buffer in module._buffers.items():
                    if buffer is not None and id(buffer) not in seen:
                        seen.add(id(buffer))
                        yield f"{prefix}.{key}".lstrip("."), (module, key, buffer)


def every_parameter(model: nn.Module) -> list[nn.Parameter]:
    """Every module's parameters, at half the time of the named ones."""
    found = (p for module in model.modules() for p in module._parameters.values())
    return [p for p in found if p is not None]


@contextmanager
def with_state(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the model has other parameters and buffers, by name.

    ``torch.func.functional_call`` has them for the forward pass only: activation checkpointing,
    which runs forward again in backward, would find the model's own there.
    """
    if not values:  # a walk over all modules costs as much as a small forward pass
        yield
        return
    own = dict((*model.named_parameters(), *model.named_buffers()))
    new = {id(own[name]): value for name, value in values.items()}
    kept = []
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if id(tensor) in new:  # wherever layers share it
                    kept.append((store, key, tensor))
                    store[key] = new[id(tensor)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for store, key, tensor in kept:
            store[key] = tensor  # type: ignore[assignment]


@contextmanager
def state_left_alone(model: nn.Module) -> Iterator[None]:
    """No forward pass inside the block changes any buffer, once it is over.

    Modes stay what they are: in train mode layers normalise by the batch, as in training.
    """
    others = BufferCopies(model, batchnorm=False)
    others.take()
    try:
        with frozen_stats(model):
            yield
    finally:
        others.restore()
