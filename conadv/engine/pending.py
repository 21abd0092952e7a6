"""What waits between steps: images with a version tag, not weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conadv.attacks.space import PixelSpace
from conadv.distributed.comm import Comm
from conadv.engine.validate import check_count, check_keys, check_mapping, check_tensor, shown
from conadv.errors import ConadvError
from conadv.types import ExtraBatch

_WHAT = "its images that wait"
_KEYS = ("images", "labels", "weight_version", "dtype")
_STEP = re.compile(r"[0-9]{1,10}")
_MADE_AS = ["float32", "float16", "bfloat16", "float64"]
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "uint8")}


@dataclass(frozen=True)
class Expected:
    """What the images that wait for one step are, as :meth:`Pending.state_dict` saves them."""

    micro_batches: int
    images: tuple[int, int, int, int]
    """(attacked images of a micro-batch, C, H, W)"""
    classes: int
    ahead: int
    """How many steps before their use they are made, at most."""

    def check(self, state: object, version: int, dtype: torch.dtype | None) -> None:
        """Raise ConadvError unless ``state`` could wait at ``version``. ``dtype``: as they are stored, None as made."""
        for step, entry in check_mapping(state, _WHAT).items():
            if (
                not isinstance(step, str)
                or not _STEP.fullmatch(step)
                or int(step) >= version + self.ahead
            ):
                raise ConadvError(
                    f"{_WHAT} are for step {shown(step)}, not one up to {version + self.ahead - 1}"
                )
            self._check_entry(check_keys(entry, _KEYS, _WHAT), version, dtype)

    def _check_entry(self, entry: dict[str, Any], version: int, dtype: torch.dtype | None) -> None:
        made_as, made_at = entry["dtype"], entry["weight_version"]
        if made_as not in _MADE_AS:
            raise ConadvError(f"{_WHAT} are of {shown(made_as)}, not of {', '.join(_MADE_AS)}")
        if made_at is not None:
            check_count(made_at, f"the weights of {_WHAT}", version)
        for part in ("images", "labels"):
            if not isinstance(entry[part], list) or len(entry[part]) != self.micro_batches:
                raise ConadvError(f"{_WHAT} have no {part} for {self.micro_batches} micro-batches")
        for image in entry["images"]:
            check_tensor(image, torch.Size(self.images), dtype or getattr(torch, made_as), _WHAT)
        for label in entry["labels"]:
            self._check_labels(label)

    def _check_labels(self, label: object) -> None:
        what, count = f"the labels of {_WHAT}", self.images[0]
        if (
            isinstance(label, Tensor) and label.is_floating_point()
        ):  # probabilities, of mixed images
            check_tensor(label, torch.Size((count, self.classes)), label.dtype, what)
            return
        found = check_tensor(label, torch.Size((count,)), torch.int64, what)
        if bool(((found < 0) | (found >= self.classes)).any()):
            raise ConadvError(f"{what} are not classes from 0 to {self.classes - 1}")


class Pending:
    """Extra batches by the step that will use them.

    ``dtype`` is how images are stored: "float32" keeps the bits of float32 images; "float16" halves the memory at a
    relative error of 2^-11; "bfloat16" 2^-8 (1/255 is 2^-8: only for large eps); "uint8" a quarter, rounded to whole
    pixel levels, exact for an eps that is a multiple of 1/255 on images that come from uint8.
    """

    def __init__(self, space: PixelSpace, dtype: str | None = None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ConadvError(f"pending dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
        self.space = space
        self.dtype = None if dtype is None else DTYPES[dtype]
        self._waiting: dict[int, tuple[ExtraBatch, torch.dtype]] = {}
        self._skipped: set[int] = set()

    def put(self, step: int, extra: ExtraBatch, dtype: torch.dtype | None = None) -> None:
        """Store the extra batch of ``step``. ``dtype``: what its images were before somebody else encoded them."""
        images = tuple(map(self.encode, extra.images))
        self._waiting[step] = (
            ExtraBatch(images, extra.labels, extra.weight_version),
            dtype or extra.images[0].dtype,
        )

    def skip(self, step: int) -> None:
        """Say that ``step`` has to go without its extra batch."""
        self._skipped.add(step)

    def skips(self, step: int) -> bool:
        """Whether :meth:`skip` was called for ``step``; forgets it."""
        found = step in self._skipped
        self._skipped.discard(step)
        return found

    def __contains__(self, step: int) -> bool:
        return step in self._waiting

    def pop(self, step: int) -> ExtraBatch | None:
        """Take out the extra batch of ``step``, None if there is none."""
        stored, dtype = self._waiting.pop(step, (None, None))
        if stored is None or dtype is None:
            return None
        images = tuple(self._decode(image, dtype) for image in stored.images)
        return ExtraBatch(images, stored.labels, stored.weight_version)

    def clear(self) -> None:
        """Forget everything, as when a loop goes on with other data."""
        self._waiting.clear()

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
            return self.space.to_pixels(image).mul_(255).round_().clamp_(0, 255).to(torch.uint8)
        return image.to(self.dtype)

    def _decode(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        if image.dtype == torch.uint8:
            return self.space.normalize(image).to(dtype)
        return image.to(dtype)

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
        self._waiting = {
            int(step): (
                ExtraBatch(
                    tuple(image.to(device) for image in entry["images"]),
                    tuple(label.to(device) for label in entry["labels"]),
                    entry["weight_version"],
                ),
                getattr(torch, entry["dtype"]),
            )
            for step, entry in state.items()
        }


def gather(pending: dict[str, Any], comm: Comm) -> dict[str, Any]:
    """The states of all ranks, in rank order, as that of one rank: micro-batches in their global order, on the CPU.

    Ranks: collective; the result is rank 0's. One micro-batch of each rank travels at a time: rank 0 then holds
    little more than the result, which may be tens of GB.
    """
    merged = {}
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
        count, rest = divmod(len(tensors), ranks)
        assert not rest, (
            len(tensors),
            ranks,
        )  # the config, which a resumed run may not change, has fixed both
        return tensors[rank * count : (rank + 1) * count]

    return {
        step: {**entry, "images": mine(entry["images"]), "labels": mine(entry["labels"])}
        for step, entry in state.items()
    }
