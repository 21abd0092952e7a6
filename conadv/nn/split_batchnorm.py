"""Split batch norm: routes with statistics and affine parameters of their own.

    model = split_batchnorm(model, "adv")           # once, before the optimizer is built
    with route(model, "adv"):                       # every layer uses its adversarial copy
        model(x_NCHW)
    with route(model, {"clean": 32, "adv": 32}):    # one forward: 32 images clean, 32 adversarial
        model(torch.cat([x_NCHW, x_adv_NCHW]))

**The route rule**, in train and in eval mode alike: a layer uses the route of the innermost
``route`` block, and the clean route outside of any. Train or eval mode decides, as always, between
batch and running statistics.

**The clean route is the layer that was there**: the module itself, its class replaced by a subclass
with the extra routes as children. So the clean weights keep their state-dict keys,
norm-plus-activation layers (torchvision, timm) keep their activation, attributes and ``isinstance``
checks, and :func:`strip` restores the plain layer without loss. An extra route lives under
``<layer>.routes.<name>``.

Source: two batch norms, Xie et al., "Adversarial Examples Improve Image Recognition" (AdvProp),
arXiv 1911.09665, section 4; three of them in the released code of ConAdv, arXiv 2106.00221.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel

from conadv.errors import ConadvError
from conadv.nn.recompute import Routing

CLEAN = "clean"
RouteSpec = str | Mapping[str, int]


class SplitBatchNorm:
    """What :func:`split_batchnorm` mixes into the class of a batch-norm layer."""

    # Only ever combined with a _BatchNorm: Split<Layer>(SplitBatchNorm, <Layer>), so __mro__[2] is
    # the plain class.

    routes: nn.ModuleDict
    _routing: Routing

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, ...) by the current route, or segment by segment of dim 0."""
        current = self._routing.current
        if isinstance(current, str):
            return self._run(current, x)
        parts = x.split(_segment_sizes(current, x.shape[0]))
        return torch.cat(
            [self._run(name, part) for (name, _), part in zip(current, parts, strict=True)]
        )

    def _run(self, name: str, x: Tensor) -> Tensor:
        layer: Any = self if name == CLEAN else self.routes[name]
        forward: Any = super().forward if name == CLEAN else layer  # type: ignore[misc]
        # A pass that repeats another one must not count again; frozen_stats would keep fewer
        # tensors for backward than that one did, which torch takes for a fault.
        again = self._routing.again
        if layer.training and (again or _inside_ddp()):
            with _statistics_apart(layer, copies=again):
                y: Tensor = forward(x)
        else:
            y = forward(x)
        return y

    def reset_running_stats(self) -> None:
        # update_bn (torch's, and others of its name) would empty the statistics of every route and
        # collect those of the clean one alone. It begins with this.
        if sys._getframe(1).f_code.co_name == "update_bn":
            raise ConadvError(
                "update_bn would reset the statistics of all routes and collect those of the clean "
                "one alone. Use conadv.recalibrate(model, batches, space), with route= for each."
            )
        super().reset_running_stats()  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time, so pickle and deepcopy are told the base class instead of a
        # name
        return _rebuild, (_plain_class(self),), self.__dict__.copy()  # type: ignore[arg-type]


def _inside_ddp() -> bool:
    active = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return active is not None and not torch.compiler.is_compiling()


@contextmanager
def _statistics_apart(layer: nn.Module, *, copies: bool) -> Iterator[None]:
    """The running statistics have version counters of their own, or are copies that are dropped.

    DistributedDataParallel overwrites all buffers by rank 0's before each forward pass. Until torch
    2.12 or so this counts as a change of what autograd has saved, and the backward pass of two
    forward passes, one per route, ends in "modified by an inplace operation" (pytorch issue
    175024). In train mode, the only one that this is for, backward does not read these values.
    """
    kept = dict(layer._buffers)
    layer._buffers.update(
        {name: b if b is None else b.clone() if copies else b.data for name, b in kept.items()}
    )
    try:
        yield
    finally:
        layer._buffers.update(kept)


def _segment_sizes(segments: tuple[tuple[str, int], ...], n: int) -> list[int]:
    """Images per segment; layers that fold more into dim 0 (patches) see a multiple."""
    total = sum(size for _, size in segments)
    factor, rest = divmod(n, total)
    if rest or not factor:
        raise ConadvError(
            f"route: the segments {dict(segments)} add up to {total} images, but a layer got {n}."
        )
    return [size * factor for _, size in segments]


@cache
def _split_class(base: Any) -> Any:
    return type(f"Split{base.__name__}", (SplitBatchNorm, base), {"__module__": base.__module__})


def _plain_class(layer: nn.Module) -> Any:
    return type(layer).__mro__[2]


def _rebuild(base: Any) -> nn.Module:
    cls = _split_class(base)
    made: nn.Module = cls.__new__(cls)
    return made


def split_batchnorm(model: nn.Module, *names: str, share_affine: bool = False) -> nn.Module:
    """Give every batch-norm layer of any kind the extra routes ``names``, in place.

    A new route starts as a copy of the clean route, running statistics included. Routes can be
    added later; new parameters must reach the optimizer, so split before building it. Children of a
    layer that carry parameters of their own, such as a PReLU activation, stay shared between the
    routes. ``share_affine``: the new routes have statistics of their own only; their weight and
    bias are the clean route's parameters.

    Returns ``model``. Raises ConadvError for a name that is taken or reserved, for lazy layers, and
    for a split model that went through ``convert_sync_batchnorm`` afterwards (convert first). A
    model without batch norm is returned unchanged: its routes share everything.
    """
    for name in names:
        if name == CLEAN or not name.isidentifier():
            raise ConadvError(
                f"Route {name!r}: choose an identifier other than 'clean', such as 'adv'."
            )
    if len(set(names)) < len(names) or set(names) & set(routes_of(model)):
        raise ConadvError(
            f"Routes {list(names)}: the model already has {list(routes_of(model))}; each name once."
        )
    layers = list(_layers(model)) if names else []
    routing = _find_routing(model) or Routing()
    routing.names += tuple(names)
    for layer in layers:
        _split_layer(layer, names, routing, share_affine)
    return model


def _layers(model: nn.Module) -> Iterator[_BatchNorm]:
    """The batch-norm layers that belong to the model itself, not to a route of another layer."""
    inside = {
        id(m)
        for layer in model.modules()
        if isinstance(layer, SplitBatchNorm)
        for m in layer.routes.modules()
    }
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or id(module) in inside:
            continue
        if isinstance(module, LazyModuleMixin):
            raise ConadvError(
                f"{name}: run one forward pass first, then split; a lazy layer has no shape yet."
            )
        if "routes" in module._modules and not isinstance(module, SplitBatchNorm):
            raise ConadvError(
                f"{name}: convert_sync_batchnorm dropped the routes. Convert first, then split."
            )
        yield module


def _split_layer(
    layer: _BatchNorm, names: tuple[str, ...], routing: Routing, share_affine: bool
) -> None:
    if not isinstance(layer, SplitBatchNorm):
        layer.__class__ = _split_class(type(layer))  # type: ignore[arg-type]
        layer.add_module("routes", nn.ModuleDict())
    layer.__dict__["_routing"] = routing
    routes = layer.get_submodule("routes")
    for name in names:
        routes.add_module(name, _copy_plain(layer))
        if share_affine:
            routes.get_submodule(name)._parameters.update(layer._parameters)


def _copy_plain(layer: _BatchNorm) -> _BatchNorm:
    """A plain copy of the clean route: own tensors, no hooks, shared children."""
    plain = _plain_class(layer)
    clone: _BatchNorm = plain.__new__(plain)
    nn.Module.__init__(clone)
    own = {k: v for k, v in layer.__dict__.items() if k not in clone.__dict__ and k != "_routing"}
    clone.__dict__.update(own)
    clone.training = layer.training
    for kind in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        clone.__dict__[kind] = copy.deepcopy(layer.__dict__[kind])
    clone._modules.update(
        {name: child for name, child in layer._modules.items() if name != "routes"}
    )
    return clone


def strip(model: nn.Module) -> nn.Module:
    """Undo :func:`split_batchnorm` in place; the clean route is what stays."""
    for layer in list(_layers(model)):
        if isinstance(layer, SplitBatchNorm):
            base = _plain_class(layer)
            # A block that still names a route now fails instead of doing nothing.
            layer._routing.names = ()
            del layer._modules["routes"]
            del layer.__dict__["_routing"]
            layer.__class__ = base
    return model


_FIRST_LAYER: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _find_routing(model: nn.Module) -> Routing | None:
    return next((m._routing for m in model.modules() if isinstance(m, SplitBatchNorm)), None)


def _routing(model: nn.Module) -> Routing | None:
    # The name of a split layer is remembered: walking all modules would cost more than the smallest
    # forward passes. It is looked up each time, since convert_sync_batchnorm and surgery on the
    # model replace layers.
    name = _FIRST_LAYER.get(model)
    layer: Any = model
    for part in name.split(".") if name else ():
        layer = layer._modules.get(part) if isinstance(layer, nn.Module) else None
    if name is not None and isinstance(layer, SplitBatchNorm):
        return layer._routing
    for name, layer in model.named_modules():
        if isinstance(layer, SplitBatchNorm):
            _FIRST_LAYER[model] = name
            return layer._routing
    return None


def routes_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the extra routes; empty for a plain model."""
    routing = _find_routing(model)
    return routing.names if routing else ()


def layers_on(model: nn.Module, name: str) -> Iterator[_BatchNorm]:
    """The layers that normalise on a route; none where the model does not have it."""
    for layer in _layers(model):
        if name == CLEAN:
            yield layer
        elif isinstance(layer, SplitBatchNorm) and name in layer.routes:
            yield layer.get_submodule(f"routes.{name}")  # type: ignore[misc]


def has_batchnorm(model: nn.Module) -> bool:
    """Whether any layer computes batch statistics."""
    return any(isinstance(m, _BatchNorm) for m in model.modules())


def check_routes(model: nn.Module, names: Collection[str]) -> None:
    """ConadvError unless all batch-norm layers have these routes and switch together.

    Nothing to check for a model without batch norm, or for the clean route alone.
    """
    wanted = set(names) - {CLEAN}
    layers = list(_layers(model)) if wanted else []
    for layer in layers:
        missing = wanted - set(layer.routes) if isinstance(layer, SplitBatchNorm) else wanted
        if missing:
            raise ConadvError(
                f"The model has batch norm without the route {min(missing)!r} (a "
                f"{type(layer).__name__}): those images would share statistics with the clean "
                f"ones. Call split_batchnorm(model, {min(missing)!r}) before you build the "
                "optimizer."
            )
    if len({id(layer._routing) for layer in layers if isinstance(layer, SplitBatchNorm)}) > 1:
        raise ConadvError(
            "Parts of the model were split separately. Put the model together first, then split it."
        )


def check_sync(model: nn.Module, ranks: int) -> None:
    """ConadvError unless SyncBatchNorm layers can take statistics over ``ranks`` ranks.

    Every rank that runs the model must take part in the same passes, attacks included, or the ranks
    wait for each other forever; and torch has SyncBatchNorm on accelerators only. Nothing to check
    without a process group, where such a layer is a plain batch norm.
    """
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm))
    name, layer = next(layers, ("", None))
    if layer is None or not (dist.is_available() and dist.is_initialized()):
        return
    if (device := next(layer.parameters(), next(model.parameters())).device).type == "cpu":
        raise ConadvError(
            f"The layer {name!r} is a SyncBatchNorm on the {device.type}, where torch cannot run "
            "it in several processes. Train on CUDA, or leave out convert_sync_batchnorm: each "
            "rank then normalises by its own micro-batch. On the CPU a larger micro-batch, or "
            "GroupNorm, takes its place."
        )
    if (together := dist.get_world_size(layer.process_group)) != ranks:
        raise ConadvError(
            f"The layer {name!r} is a SyncBatchNorm over {together} processes, but {ranks} of them "
            "run this model in the same order: they would wait for each other forever. Use it "
            "without attack ranks and with a Comm (Comm.from_environment), or leave out "
            "convert_sync_batchnorm."
        )


@contextmanager
def route(model: nn.Module, spec: RouteSpec) -> Iterator[None]:
    """Send what happens inside the block through a route.

    ``spec`` is a name, or a mapping of names to numbers of images for a concatenated batch, in the
    order of dim 0. Backward passes need no route. A model without batch norm accepts any route; a
    model with batch norm raises ConadvError for a route that it does not have.
    In flight: the routing is a property of the model, so two threads must not run one model on
    different routes.
    """
    routing = _routing(model)
    wanted = (spec,) if isinstance(spec, str) else tuple(spec)
    missing = [
        name for name in wanted if name != CLEAN and (routing is None or name not in routing.names)
    ]
    if missing and (routing is not None or has_batchnorm(model)):
        raise ConadvError(
            f"The model has no route {missing[0]!r}. Call split_batchnorm(model, {missing[0]!r}) "
            "first."
        )
    if routing is None:
        yield
        return
    before = routing.current
    routing.current = spec if isinstance(spec, str) else tuple(spec.items())
    try:
        yield
    finally:
        routing.current = before


@contextmanager
def running_stats(model: nn.Module) -> Iterator[None]:
    """Batch norm normalises by its running statistics, and leaves them alone.

    Other layers stay in the mode that they are in, and the mode of the batch-norm layers is
    restored afterwards.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


@contextmanager
def frozen_stats(model: nn.Module) -> Iterator[None]:
    """Leave the running statistics of every batch-norm layer alone inside the block.

    Modes stay what they are: layers in train mode still normalise by the batch, layers in eval mode
    by the running statistics. ``num_batches_tracked`` does not count either.
    """
    layers = [
        m
        for m in model.modules()
        if isinstance(m, _BatchNorm) and m.training and m.track_running_stats
    ]
    for layer in layers:
        layer.__dict__["track_running_stats"] = (
            False  # a train-mode layer then neither reads nor writes its buffers
        )
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__["track_running_stats"] = True
