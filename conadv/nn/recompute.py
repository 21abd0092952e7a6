"""Activation checkpointing runs a part of the model a second time, in the backward pass.

By then the ``route`` block of the forward pass may be over, and another one open. So whatever
torch keeps in order to run it again is tied to the routes of the moment when it was kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import checkpoint


class Routing:
    """The current route, shared by all split layers of one model; copied with the model.

    ``again``: what runs is a part that has run before, whose statistics are counted already.
    """

    names: tuple[str, ...] = ()
    current: str | tuple[tuple[str, int], ...] = "clean"
    again = False

    def __new__(cls) -> Routing:  # not __init__, which copies do not call
        routing = super().__new__(cls)
        _ALL.add(routing)
        return routing


_ALL: weakref.WeakSet[Routing] = weakref.WeakSet()


def on_present_routes(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, to be run on the routes of now whenever that is."""
    routes = [(routing, routing.current) for routing in _ALL]

    def run(*args: Any, **kwargs: Any) -> Any:
        before = [(routing, routing.current, routing.again) for routing, _ in routes]
        # -1 outside of backward: the reentrant kind runs its function in the forward pass as well
        again = torch._C._current_graph_task_id() != -1
        for routing, current in routes:
            routing.current, routing.again = current, routing.again or again
        try:
            return function(*args, **kwargs)
        finally:
            for routing, current, was_again in before:
                routing.current, routing.again = current, was_again

    return run if routes else function


def _follow_checkpoints() -> None:
    # torch has no hook for this, and checkpoint(context_fn=...) would have to be given by whoever
    # wrote the model. Every checkpoint of either kind passes one of these two places.
    frame, reentrant = checkpoint._CheckpointFrame, checkpoint.CheckpointFunction
    make: Any = frame.__init__
    forward: Any = reentrant.forward

    def init(self: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        make(self, on_present_routes(function), *args, **kwargs)

    def apply(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        return forward(ctx, on_present_routes(function), *args)

    frame.__init__ = init  # type: ignore[method-assign, assignment]
    reentrant.forward = staticmethod(apply)  # type: ignore[method-assign, assignment]


_follow_checkpoints()
