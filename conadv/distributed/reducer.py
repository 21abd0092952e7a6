"""Summing gradients over ranks in buckets, while backward still runs.

A step runs several backward passes (micro-batches times views) into the same ``.grad``. Only in the
last of them do gradients become final, so only there do hooks watch for them, and a bucket leaves
for the network as soon as all its gradients are final. Buckets leave in one order, the same on all
ranks.

Which parameters the last pass touches is learnt in the first step: a clean batch-norm route gets
nothing from an adversarial pass, so such parameters have buckets of their own, which leave when the
last pass begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conadv.distributed.clock import PhaseClock
from conadv.distributed.comm import Comm
from conadv.distributed.handle import Handle
from conadv.distributed.message import shaped_like
from conadv.errors import ConadvError

MIB = 2**20
BUCKET_MIB = 25.0
"""Size at which a bucket is full. The first one that leaves during the last pass is full at 1 MiB,
so that the network is busy early (the sizes of torch's DistributedDataParallel).
"""
Key = tuple[str, ...]


class Bucket(NamedTuple):
    """Parameters (by number) whose gradients travel together in one flat buffer."""

    members: tuple[int, ...]
    flat: Tensor
    views: tuple[Tensor, ...]
    late: bool  # whether the last pass can still change its gradients


def cut(
    params: Sequence[Tensor],
    order: Sequence[int],
    cap: int = int(BUCKET_MIB * MIB),
    first: int | None = None,
) -> Iterator[list[int]]:
    """Numbers of ``params`` in ``order``, in groups of one dtype that are full at ``cap`` bytes.

    ``first``: a smaller cap of the first group, which is to leave early.
    """
    members: list[int] = []
    size, full = 0, min(cap, first or cap)
    for number in order:
        p = params[number]
        if members and (size >= full or p.dtype != params[members[0]].dtype):
            yield members
            members, size, full = [], 0, cap
        members.append(number)
        size += p.nbytes
    if members:
        yield members


class GradientReducer:
    """Sums the gradients of a model's trained parameters over ranks. One per engine of several.

    In a step: ``follow()`` first, ``last_pass(views)`` before the last backward pass, ``launch()``
    after it, ``wait()`` before anyone reads ``.grad``, and ``regroup()`` if any rank's ``follow``
    said so. The caller has scaled the loss, so that the sum is the mean over
    the global batch. A parameter with a gradient on some ranks counts as zero on the others; one
    without on all ranks is skipped.

    Ranks: collective in the order of the buckets.
    In flight: from ``last_pass`` to ``wait`` the buckets, as large as the gradients together. After
    ``wait`` each ``.grad`` is a view into them, valid until the next step's gradients are launched.
    Raises ConadvError where a step with the same views uses other parameters than the first one
    did.
    """

    def __init__(self, comm: Comm, model: nn.Module, bucket_mib: float | None = None) -> None:
        named = dict(model.named_parameters())  # all: who is trained may change
        self._model, self._names, self._params = model, list(named), list(named.values())
        self._hooked: set[int] = set()
        self._trained: list[bool] = []  # now
        self._grouped: list[bool] = []  # as the present buckets were made
        self._comm = comm
        self._cap = int((BUCKET_MIB if bucket_mib is None else bucket_mib) * MIB)
        self._views: Key = ()  # of this step
        self._key: Key | None = None  # the views that the present buckets are for
        self._buckets: list[Bucket] = []
        self._slots: dict[int, tuple[int, Tensor]] = {}  # bucket and view of each parameter
        # CPU: a gradient is copied while it is still in caches. CUDA: fewer, larger kernels.
        self._copy_early = comm.device.type == "cpu"
        self._watching = False
        self._ready: set[int] = set()  # parameters whose gradients are final
        self._missing: list[int] = []  # gradients that each bucket still waits for
        self._handles: list[Handle] = []
        self._norms: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int] = {}
        self.overlap = (
            True  # False keeps all buckets until launch(), to measure what overlap is worth
        )

    @property
    def busy(self) -> bool:
        """Whether gradients are on their way."""
        return bool(self._handles)

    def follow(self) -> bool:
        """Before a step's first pass: whether parameters were frozen or unfrozen since the last.

        Ranks: not collective. Where any rank says so, all call :meth:`regroup` after :meth:`wait`.
        """
        if list(map(id, self._model.parameters())) != list(map(id, self._params)):
            raise ConadvError(
                "The model has other parameters than when TrainStep was made, so their gradients "
                "would not be summed over the ranks. Make a new TrainStep after such a change."
            )
        self._trained = [p.requires_grad for p in self._params]
        for number, p in enumerate(self._params):
            if p.requires_grad and number not in self._hooked:
                self._hooked.add(number)
                p.register_post_accumulate_grad_hook(partial(self._on_gradient, number))
        return self._key is not None and self._trained != self._grouped

    def regroup(self) -> None:
        """Sum the gradients that had no bucket in this step; the next step makes new buckets.

        Ranks: collective. Raises ConadvError on all ranks if they do not train the same parameters:
        they would drift apart.
        """
        _, takes_part = self._agree()
        for number, trained in enumerate(self._trained):
            if not trained:  # a gradient of zeros is an update where there is weight decay
                self._params[number].grad = None
        new = [n for n in range(len(self._params)) if takes_part[n] and n not in self._slots]
        for members in cut(self._params, new, self._cap):
            bucket = self._bucket(members, late=False)
            self._launch(bucket)
            self._handles.pop().wait()
            for number, view in zip(bucket.members, bucket.views, strict=True):
                self._params[number].grad = view
        self._key = None

    def last_pass(self, views: Key) -> None:
        """The next backward pass is the step's last. ``views`` names what the step trains on."""
        assert not self._handles
        self._views = views
        self._ready.clear()
        if views == self._key:
            self._missing = [len(bucket.members) if bucket.late else 0 for bucket in self._buckets]
            self._launch_complete()
        self._watching = True

    def launch(self) -> None:
        """After the last pass: start what has not started yet."""
        self._watching = False
        if self._views != self._key:
            self._make_buckets()
        for number, p in enumerate(self._params):
            if p.grad is not None and number not in self._slots and self._grouped[number]:
                raise self._changed(number)
        for bucket in self._buckets[len(self._handles) :]:
            self._launch(bucket)

    def wait(self, clock: PhaseClock | None = None) -> None:
        """Wait for all buckets; every ``.grad`` is then the sum over ranks.

        ``clock`` notes when each bucket was under way.
        """
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
        """The Euclidean norm of all ``gradients``, in the bits of torch's ``get_total_norm``.

        Uses the norms that :meth:`wait` took. Where somebody has changed gradients since (clipped
        them, or put others in their place), they are taken again; a change through ``.data`` hides.
        """
        unchanged = all(flat._version == version for flat, version in self._versions.items())
        if unchanged and all(gradient in self._norms for gradient in gradients):
            each = torch.stack([self._norms[gradient] for gradient in gradients])
            whole: Tensor = torch.linalg.vector_norm(each)
            return whole
        total: Tensor = torch.nn.utils.get_total_norm(gradients)
        return total

    # ---- during the last pass

    def _on_gradient(self, number: int, p: Tensor) -> None:
        """autograd's hook: the gradient of a parameter has been added to ``.grad``."""
        if not self._watching:
            return
        known = self._views == self._key
        new = known and not self._grouped[number]  # it has no bucket yet, see regroup()
        place, view = len(self._handles), p
        if known and not new:
            place, view = self._slots.get(number, (-1, p))
        # once its bucket is on the network, a second gradient would be lost, or be another on each
        # rank
        if number in self._ready or place < len(self._handles):
            raise self._changed(number)
        self._ready.add(number)
        if not known or new:
            return
        self._missing[place] -= 1
        if self._copy_early and p.grad is not None:
            p.grad = view.copy_(p.grad)
        self._launch_complete()

    def _launch_complete(self) -> None:
        """Launch buckets, in their order, up to the first one that still misses a gradient."""
        if not self.overlap:
            return
        while (place := len(self._handles)) < len(self._buckets) and not self._missing[place]:
            self._launch(self._buckets[place])

    def _launch(self, bucket: Bucket) -> None:
        grads = [self._params[number].grad for number in bucket.members]
        pairs = list(zip(bucket.views, grads, strict=True))
        moves = [(view, grad) for view, grad in pairs if grad is not None and grad is not view]
        if moves:
            torch._foreach_copy_([view for view, _ in moves], [grad for _, grad in moves])
        for view, grad in pairs:
            if grad is None:
                view.zero_()
        self._handles.append(self._comm.all_reduce_async(bucket.flat))

    # ---- which gradients travel together

    def _make_buckets(self) -> None:
        """Agree with the other ranks on who takes part, and when; lay out the buckets."""
        late, takes_part = self._agree()
        # backward goes from the last layer to the first, so gradients become final in this order
        order = [number for number in reversed(range(len(self._params))) if takes_part[number]]
        parts = {
            late_ones: [n for n in order if late[n] == late_ones] for late_ones in (False, True)
        }
        self._buckets = [
            self._bucket(members, late_ones)
            for late_ones, numbers in parts.items()
            for members in cut(self._params, numbers, self._cap, first=MIB if late_ones else None)
        ]
        self._slots = {
            number: (place, view)
            for place, bucket in enumerate(self._buckets)
            for number, view in zip(bucket.members, bucket.views, strict=True)
        }
        self._key = self._views

    def _agree(self) -> tuple[list[bool], list[bool]]:
        """Whom the last pass touches on any rank, and who has a gradient on any rank."""
        touched = [number in self._ready for number in range(len(self._params))]
        has_one = [p.grad is not None for p in self._params]
        frozen = [not trained for trained in self._trained]
        flags = self._comm.any(torch.tensor([touched, has_one, self._trained, frozen])).tolist()
        late, takes_part, *both = flags
        if odd := [name for name, *each in zip(self._names, *both, strict=True) if all(each)]:
            error = ConadvError(
                f"The parameter {odd[0]!r} is trained on some ranks and frozen on others"
                f"{f', as are {len(odd) - 1} more' if odd[1:] else ''}. Call requires_grad_ on all "
                "ranks before the same step."
            )
            error.agreed = True
            raise error
        self._grouped = self._trained
        return late, takes_part

    def _bucket(self, members: Sequence[int], late: bool) -> Bucket:
        params = [self._params[number] for number in members]
        sizes = [p.numel() for p in params]
        flat = params[0].new_empty(sum(sizes))
        views = tuple(map(shaped_like, flat.split(sizes), params))
        return Bucket(tuple(members), flat, views, late)

    def _changed(self, number: int) -> ConadvError:
        return ConadvError(
            f"Rank {self._comm.rank}: parameter {self._names[number]!r} got a gradient in a pass "
            "that had none for it in the first step, or got it twice in one pass. On several ranks "
            "the network must use the same parameters in every step (freeze others by "
            "requires_grad_), and no reentrant activation checkpointing."
        )
