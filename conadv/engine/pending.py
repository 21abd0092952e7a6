"""What waits between steps: images with a version tag, not weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conadv.attacks.space import PixelSpace
from conadv.distributed.comm import Comm
from conadv.engine.validate import check_count, check_keys, check_like, shown
from conadv.errors import ConadvError, unknown
from conadv.types import ExtraBatch

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "uint8")}


class Pending:
    """Extra batches by the step that will use them.

    ``dtype`` is how images are stored: "float32" keeps the bits of float32 images; "float16" halves
    the memory at a relative error of 2^-11; "bfloat16" 2^-8 (1/255 is 2^-8: only for large eps);
    "uint8" a quarter, rounded to whole pixel levels, exact for an eps that is a multiple of 1/255
    on images that come from uint8.
    """

    def __init__(self, space: PixelSpace, dtype: str | None = None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise unknown("pending_dtype", dtype, DTYPES)
        self.space = space
        self.dtype: torch.dtype | None = None if dtype is None else DTYPES[dtype]
        # With what images were before they were encoded: models want their own type back.
        self._waiting: dict[int, tuple[ExtraBatch, torch.dtype]] = {}
        self._skipped: set[int] = set()

    def put(self, step: int, extra: ExtraBatch, dtype: torch.dtype | None = None) -> None:
        """Store the batch of ``step``. ``dtype``: of its images before somebody encoded them."""
        # Attack ranks send images as they wait here, so what arrives may be encoded already.
        # Labels on the CPU are the loader's own memory, which it may fill again while they wait.
        labels = tuple(y_N.clone() for y_N in extra.labels)
        stored = ExtraBatch(tuple(map(self.encode, extra.images)), labels, extra.weight_version)
        self._waiting[step] = stored, dtype or extra.images[0].dtype

    def pop(self, step: int) -> ExtraBatch | None:
        """Take out the extra batch of ``step``, None if there is none."""
        if step not in self._waiting:
            return None
        stored, dtype = self._waiting.pop(step)
        images = tuple(self._decode(image, dtype) for image in stored.images)
        return ExtraBatch(images, stored.labels, stored.weight_version)

    def skip(self, step: int) -> None:
        """Say that ``step`` has to go without its extra batch."""
        self._skipped.add(step)

    def skips(self, step: int) -> bool:
        """Whether :meth:`skip` was called for ``step``; forgets it."""
        # Set by the executor, asked by the method: the two know nothing else of each other.
        found = step in self._skipped
        self._skipped.discard(step)
        return found

    def clear(self) -> None:
        """Forget everything, as when a loop goes on with other data."""
        self._waiting.clear()

    def __contains__(self, step: int) -> bool:
        return step in self._waiting

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def nbytes(self) -> int:
        """Bytes of the waiting images."""
        return sum(image.nbytes for extra, _ in self._waiting.values() for image in extra.images)

    def encoded_like(self, image: Tensor) -> Tensor:
        """``image``, on the meta device, as it will be stored."""
        return image if self.dtype is None else image.to(self.dtype)

    def encode(self, image: Tensor) -> Tensor:
        """An image as it is stored. An encoded one stays as it is."""
        if self.dtype is None or self.dtype == image.dtype:
            return image
        if self.dtype == torch.uint8:
            # Rounded, not cut off: 8/255 comes back as 8/255 although the division left 7.9999.
            return self.space.to_pixels(image).mul_(255).round_().clamp_(0, 255).to(torch.uint8)
        return image.to(self.dtype)

    def _decode(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.space.normalize(image) if image.dtype == torch.uint8 else image).to(dtype)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, for a checkpoint that is read without unpickling code."""
        return {
            str(step): {
                "images": list(extra.images),
                "labels": list(extra.labels),
                "weight_version": extra.weight_version,
                "dtype": str(dtype).removeprefix("torch."),
            }
            for step, (extra, dtype) in self._waiting.items()
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Replace what waits by a saved state."""
        self._waiting.clear()
        for step, entry in state.items():  # keys are text: checkpoints hold plain values
            images, labels = (
                tuple(x.to(device) for x in entry[key]) for key in ("images", "labels")
            )
            extra = ExtraBatch(images, labels, entry["weight_version"])
            self._waiting[int(step)] = extra, getattr(torch, entry["dtype"])


@dataclass(frozen=True)
class Expected:
    """What the images that wait for one step are, to compare a checkpoint's with.

    images: (attacked images of a micro-batch, C, H, W). ahead: how many steps before their use they
    are made, at most.
    """

    micro_batches: int
    images: tuple[int, int, int, int]
    classes: int
    ahead: int

    def check(self, state: object, version: int, dtype: torch.dtype | None) -> None:
        """ConadvError unless ``state`` could wait at ``version``, stored as ``dtype``."""
        what, last = "its images that wait", version + self.ahead - 1
        for step, entry in check_keys(state, None, what).items():
            if not str(step).isdecimal() or int(step) > last:
                raise ConadvError(f"{what} are for step {shown(step)}, not one up to {last}")
            check_keys(entry, ("images", "labels", "weight_version", "dtype"), what)
            if entry["dtype"] not in ("float32", "float16", "bfloat16", "float64"):
                raise ConadvError(f"{what} are of {shown(entry['dtype'])}, not of a float type")
            if entry["weight_version"] is not None:
                check_count(entry["weight_version"], f"the weights of {what}", version)
            # On the meta device: a shape from a stranger's file takes no memory.
            image = torch.empty(
                self.images, dtype=dtype or getattr(torch, entry["dtype"]), device="meta"
            )
            check_like(entry["images"], [image] * self.micro_batches, what)
            label = torch.empty(self.images[0], dtype=torch.int64, device="meta")
            if mixed := _holds_floats(entry["labels"]):  # probabilities of mixed images
                label = image.new_empty((len(label), self.classes), dtype=torch.float32)
            check_like(entry["labels"], [label] * self.micro_batches, f"the labels of {what}")
            if not mixed and any(
                not 0 <= y.min() <= y.max() < self.classes for y in entry["labels"]
            ):
                raise ConadvError(f"the labels of {what} are not 0 to {self.classes - 1}")


def _holds_floats(tensors: object) -> bool:
    first = tensors[0] if isinstance(tensors, list) and tensors else None
    return isinstance(first, Tensor) and first.is_floating_point()


def gather(pending: dict[str, Any], comm: Comm) -> dict[str, Any]:
    """The states of all ranks as that of one, in the global order, on the CPU.

    Ranks: collective; the result is rank 0's. One micro-batch of each rank travels at a time: rank
    0 then holds little more than the result, which may be tens of GB.
    """
    merged = {}
    # All ranks wait for the same steps; rank 0 sets their order, since gathering is collective.
    for step in comm.broadcast_object(list(pending)):
        entry = dict(pending[step])
        for part in ("images", "labels"):
            rows = [comm.gather_objects(tensor.cpu()) for tensor in entry[part]]
            entry[part] = [tensor for column in zip(*rows, strict=True) for tensor in column]
        merged[step] = entry
    return merged


def shard(state: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """One rank's part of a merged state: the micro-batches that the data order gives it."""

    def mine(tensors: list[Tensor]) -> list[Tensor]:
        count = len(tensors) // ranks
        return tensors[rank * count : (rank + 1) * count]

    return {
        step: {**entry, "images": mine(entry["images"]), "labels": mine(entry["labels"])}
        for step, entry in state.items()
    }
