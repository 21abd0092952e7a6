"""Summing gradients over ranks in buckets, while backward still runs.

A step runs several backward passes (micro-batches times views) into the same ``.grad``. Only in the last of them do
gradients become final, so only there do hooks watch for them; a bucket leaves for the network as soon as all its
gradients are final. Buckets leave in one fixed order, the same on all ranks. Which parameters the last pass touches
is learnt in the first step: a clean batch-norm route gets nothing from an adversarial pass, so such parameters have
buckets of their own, which leave when the last pass begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from conadv.distributed.clock import PhaseClock
from conadv.distributed.comm import Comm, Handle
from conadv.errors import ConadvError

MIB = 2**20
Key = tuple[str, ...]


@dataclass(frozen=True)
class Bucket:
    """Parameters (by number) whose gradients travel together, and the flat buffer that they travel in."""

    members: tuple[int, ...]
    flat: Tensor
    views: tuple[Tensor, ...]
    late: bool  # whether the last pass can still change its gradients


class GradientReducer:
    """Sums the gradients of a model's trainable parameters over ranks. One per engine, for more than one rank.

    In a step: ``last_pass(views)`` before the last backward pass, ``launch()`` after it, ``wait()`` before anyone
    reads ``.grad``. The caller has scaled the loss, so that the sum is the mean over the global batch.

    ``bucket_mib``: size at which a bucket is full; the first that leaves during the last pass is full at 1 MiB, so that
    the network is busy early (the sizes of torch's DistributedDataParallel).
    A parameter with a gradient on some ranks counts as zero on the others; one without on all ranks is skipped.
    In flight: the buckets, as large as the gradients together. After ``wait`` each ``.grad`` is a view into them,
    valid until the next step's gradients are launched.
    Raises ConadvError where a step with the same views uses other parameters than the first such step did.
    """

    def __init__(self, comm: Comm, model: nn.Module, bucket_mib: float = 25.0) -> None:
        if bucket_mib <= 0:
            raise ConadvError(f"bucket_mib {bucket_mib} must be more than 0.")
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._params = [p for _, p in named]
        self._comm = comm
        self._cap = int(bucket_mib * MIB)
        self._known: dict[Key, tuple[list[bool], list[bool]]] = {}
        self._views: Key = ()  # of this step
        self._key: Key | None = None  # of the present buckets
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[int, int] = {}
        self._view_of: dict[int, Tensor] = {}
        # CPU: a gradient is copied while it is still in caches. CUDA: fewer, larger kernels.
        self._copy_early = comm.device.type == "cpu"
        self._armed = self._learning = False
        self._ready: set[int] = set()
        self._missing: list[int] = []
        self._handles: list[Handle] = []
        self._norms: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int] = {}
        self.overlap = (
            True  # False keeps all buckets until launch(): what overlap is worth can be measured
        )
        for number, p in enumerate(self._params):
            p.register_post_accumulate_grad_hook(partial(self._on_gradient, number))

    @property
    def busy(self) -> bool:
        """Whether gradients are on their way."""
        return bool(self._handles)

    def last_pass(self, views: Key) -> None:
        """The next backward pass is the step's last. ``views`` names what the step trains on."""
        assert not self._handles
        self._learning = views not in self._known
        self._views = views
        self._ready.clear()
        if not self._learning:
            self._use(views)
            self._missing = [len(bucket.members) if bucket.late else 0 for bucket in self._buckets]
            self._launch_complete()
        self._armed = True

    def launch(self) -> None:
        """After the last pass: start what has not started yet."""
        self._armed = False
        if self._learning:
            self._learn()
        strangers = [
            i for i, p in enumerate(self._params) if p.grad is not None and i not in self._bucket_of
        ]
        if strangers:
            raise self._changed(strangers[0])
        for bucket in self._buckets[len(self._handles) :]:
            self._launch(bucket)

    def wait(self, clock: PhaseClock | None = None) -> None:
        """Wait for all buckets; every ``.grad`` is then the sum over ranks. ``clock`` hears when each was under way."""
        self._norms, self._versions = {}, {}
        for bucket, handle in zip(self._buckets, self._handles, strict=True):
            handle.wait()
            if clock is not None:
                clock.add("network", handle.begin, handle.end, beside=True)
            for number, view in zip(bucket.members, bucket.views, strict=True):
                self._params[number].grad = view
            if self._copy_early:  # on the CPU this fills the time until the next bucket is there
                self._norms |= {view: torch.linalg.vector_norm(view) for view in bucket.views}
            self._versions[bucket.flat] = bucket.flat._version
        self._handles.clear()

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The Euclidean norm of ``gradients`` together, with the bits of ``torch.nn.utils.get_total_norm``.

        Norms of single gradients were taken while later buckets were under way. Where somebody has changed gradients
        since (clipped them, or put others in their place), they are taken again; a change through ``.data`` hides.
        """
        unchanged = all(flat._version == version for flat, version in self._versions.items())
        if unchanged and all(gradient in self._norms for gradient in gradients):
            whole: Tensor = torch.linalg.vector_norm(
                torch.stack([self._norms[g] for g in gradients])
            )
            return whole
        total: Tensor = torch.nn.utils.get_total_norm(gradients)
        return total

    # ---- internals

    def _on_gradient(self, number: int, p: Tensor) -> None:
        if not self._armed:
            return
        if number in self._ready:  # its bucket may be on the network already
            raise self._changed(number)
        self._ready.add(number)
        if self._learning:
            return
        place = self._bucket_of.get(number, -1)
        if place < len(self._handles):
            raise self._changed(number)
        self._missing[place] -= 1
        if self._copy_early:
            view = self._view_of[number]
            p.grad = view.copy_(p.grad)  # type: ignore[arg-type]
        self._launch_complete()

    def _launch_complete(self) -> None:
        """Launch buckets, in their order, up to the first that still misses a gradient."""
        while (
            self.overlap
            and len(self._handles) < len(self._buckets)
            and not self._missing[len(self._handles)]
        ):
            self._launch(self._buckets[len(self._handles)])

    def _launch(self, bucket: Bucket) -> None:
        pairs = [
            (view, self._params[i].grad)
            for i, view in zip(bucket.members, bucket.views, strict=True)
        ]
        present = [(view, grad) for view, grad in pairs if grad is not None and grad is not view]
        if present:
            torch._foreach_copy_([view for view, _ in present], [grad for _, grad in present])
        for view, grad in pairs:
            if grad is None:
                view.zero_()
        self._handles.append(self._comm.all_reduce_async(bucket.flat))

    def _learn(self) -> None:
        """Agree between ranks on who takes part and who is touched by the last pass."""
        touched = [i in self._ready for i in range(len(self._params))]
        flags = torch.tensor([touched, [p.grad is not None for p in self._params]])
        late, takes_part = self._comm.any(flags).tolist()
        self._known[self._views] = (late, takes_part)
        self._use(self._views)

    def _use(self, views: Key) -> None:
        """Make the buckets for steps with these views, unless they are the present ones."""
        if views == self._key:
            return
        late, takes_part = self._known[views]
        order = [i for i in reversed(range(len(self._params))) if takes_part[i]]
        self._buckets = [
            *self._cut([i for i in order if not late[i]], late=False),
            *self._cut([i for i in order if late[i]], late=True),
        ]
        self._bucket_of = {
            i: place for place, bucket in enumerate(self._buckets) for i in bucket.members
        }
        self._view_of = {
            i: view for b in self._buckets for i, view in zip(b.members, b.views, strict=True)
        }
        self._key = views

    def _cut(self, order: Sequence[int], late: bool) -> Iterator[Bucket]:
        """Buckets that are full when they reach the cap, each of one dtype."""
        members: list[int] = []
        size, cap = 0, min(MIB, self._cap) if late else self._cap
        for i in order:
            p = self._params[i]
            if members and (size >= cap or p.dtype != self._params[members[0]].dtype):
                yield self._bucket(members, late)
                members, size, cap = [], 0, self._cap
            members.append(i)
            size += p.nbytes
        if members:
            yield self._bucket(members, late)

    def _bucket(self, members: Sequence[int], late: bool) -> Bucket:
        params = [self._params[i] for i in members]
        flat = torch.empty(
            sum(p.numel() for p in params), dtype=params[0].dtype, device=params[0].device
        )
        parts = flat.split([p.numel() for p in params])
        return Bucket(tuple(members), flat, tuple(map(shaped_like, parts, params)), late)

    def _changed(self, number: int) -> ConadvError:
        return ConadvError(
            f"Rank {self._comm.rank}: parameter {self._names[number]!r} got a gradient in a pass that had none for it "
            "in the first step, or got it twice in one pass. On several ranks a step must use the same parameters "
            "every time: freeze parameters before the engine is built, and use no reentrant activation checkpointing."
        )


def shaped_like(part: Tensor, p: Tensor) -> Tensor:
    """A part of a flat buffer in the shape and memory order of a parameter, as autograd's own gradients have."""
    strides = torch.empty_like(p, device="meta").stride()
    return part.as_strided(p.shape, strides, part.storage_offset())
