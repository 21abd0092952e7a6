"""Forward passes: through which route of batch norm, in which precision, compiled or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from conadv.attacks.loss import TrainedLoss
from conadv.engine.inputs import Views
from conadv.engine.numerics import Numerics
from conadv.engine.precision import LOW_TYPES, amplify, autocast
from conadv.errors import ConadvError
from conadv.nn import split_batchnorm as norm
from conadv.nn.buffers import with_state
from conadv.types import Forward


@dataclass(frozen=True)
class AttackForward:
    """The :data:`conadv.types.Forward` of the engine, which knows the loss that is trained."""

    run: Forward
    trained_loss: TrainedLoss

    def __call__(self, x_NCHW: Tensor) -> Tensor:
        return self.run(x_NCHW)


class Network:
    """The model as a step calls it.

    ``adv_route``: the route of the extra view. "clean" for no route of its own: views that share a
    route then go one pass each, so that each is normalised by its own batch. ``replace``: the extra
    images stand for clean ones. On the clean route they are then part of its one batch.
    """

    def __init__(
        self, model: nn.Module, adv_route: str, numerics: Numerics, *, replace: bool = False
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._compiled = numerics.compile
        # One graph or an error: a break would fall back to eager code without a word.
        self._run: Any = (
            torch.compile(model, fullgraph=True, dynamic=False) if numerics.compile else model
        )
        self.low = LOW_TYPES[numerics.precision]
        self._adv_route = adv_route
        self._has_batchnorm = norm.has_batchnorm(model)
        self._has_routes = bool(norm.routes_of(model))
        # Two segments on one route would be normalised by one batch: those go one pass each.
        fuse = self.device.type == "cuda" if numerics.fuse_views is None else numerics.fuse_views
        self.fuses_views = fuse and (adv_route == "adv" or not self._has_batchnorm)
        self._one_batch = replace and adv_route == "clean"

    def trainable(self) -> dict[str, Tensor]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def passes(self, views: Views) -> list[Views]:
        """``views`` by the forward passes that they make together."""
        if self.fuses_views:
            return [views]
        one = ("adv", "clean") if self._one_batch else ()
        names: list[str] = [name for name in one if name in views]
        # The replaced images come first again: with eps 0 the pass has the bits of plain training.
        groups = [names, *([name] for name in views if name not in names)]
        return [{name: views[name] for name in group} for group in groups if group]

    def logits(self, views: Views) -> dict[str, Tensor]:
        """logits_NK of each view, all from one forward pass."""
        images = [x for x, _ in views.values()]
        with autocast(self.device, self.low):
            logits_NK = self._call(torch.cat(images) if len(images) > 1 else images[0])
        # By labels: the output may have any shape behind its first dim.
        sizes = [len(y) for _, y in views.values()]
        parts = logits_NK.split(sizes) if len(views) > 1 else [logits_NK]
        return dict(zip(views, parts, strict=True))

    @contextmanager
    def for_attack(
        self, weights: Mapping[str, Tensor] | None, buffers: Mapping[str, Tensor], loss: TrainedLoss
    ) -> Iterator[AttackForward]:
        """x_NCHW -> output for an attack, at the present weights or at ``weights``.

        ``buffers``: in place of the model's own, and written to.
        """
        # A compiled backward pass computes all gradients that its graph has, asked for or not: the
        # attack's graph gets weights that need none, the same graph for present and other weights.
        now = self.trainable() if self._compiled and weights is None else weights
        values = {**(now or {}), **buffers}
        fixed = {f"_orig_mod.{name}": w.detach() for name, w in values.items()}

        def forward(x_NCHW: Tensor) -> Tensor:
            with autocast(self.device, self.low):
                if self._compiled:
                    output = torch.func.functional_call(self._run, fixed, (x_NCHW,))
                else:
                    output = self.model(x_NCHW)
            return amplify(_checked(output, len(x_NCHW)), self.low)

        # Never the module's own buffers: the gradient may be at work on them, on another stream.
        with nullcontext() if self._compiled else with_state(self.model, values):
            yield AttackForward(forward, loss)

    def on_route(self, views: Views) -> AbstractContextManager[None]:
        """The block's passes go through the routes of ``views``, image by image in their order."""
        if len(views) > 1 and self._has_batchnorm and not self._one_batch:
            return self._route({self._route_of(name): len(y) for name, (_, y) in views.items()})
        return self.on_route_of(next(iter(views)))

    def on_route_of(self, view: str) -> AbstractContextManager[None]:
        return self._route(self._route_of(view))

    def _route_of(self, view: str) -> str:
        return self._adv_route if view == "adv" else view

    def _route(self, spec: norm.RouteSpec) -> AbstractContextManager[None]:
        # Without routes there is nothing to switch, and looking for them walks over all modules.
        needed = self._has_routes or (self._has_batchnorm and spec != norm.CLEAN)
        return norm.route(self.model, spec) if needed else nullcontext()

    def _call(self, x_NCHW: Tensor) -> Tensor:
        try:
            output = self._run(x_NCHW)
        except Exception as error:
            own = next(self.model.parameters()).dtype
            if self.low is None and x_NCHW.dtype != own and isinstance(error, RuntimeError):
                raise ConadvError(
                    f"The model, in {own}, cannot take images in {x_NCHW.dtype}: convert one of "
                    f"them. {str(error)[:200]}"
                ) from error
            if not (self._compiled and type(error).__module__.startswith("torch._dynamo")):
                raise
            raise ConadvError(
                f"torch.compile cannot run the network as one graph per shape: {str(error)[:500]}. "
                "Leave out compile, change the network where torch names a break, or give all "
                "micro-batches one shape (torch.compiler.reset() forgets earlier engines)."
            ) from error
        return _checked(output, len(x_NCHW))


def _checked(output: Any, num_images: int) -> Tensor:
    """``output``; ConadvError unless it is one tensor with a row for each image."""
    if not isinstance(output, Tensor):
        raise ConadvError(
            f"The model returns a {type(output).__name__}, where one tensor is needed. Switch its "
            "other outputs off, or wrap it in a module that returns the logits alone."
        )
    if output.dim() == 0 or len(output) != num_images:
        raise ConadvError(
            f"The model gives a tensor of shape {tuple(output.shape)} for {num_images} images, "
            "where one row for each image is needed."
        )
    return output
