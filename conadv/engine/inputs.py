"""What goes into the network: images in model space and labels, on the model's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conadv.attacks.space import PixelSpace
from conadv.distributed.comm import Comm
from conadv.errors import ConadvError
from conadv.types import Batch, ExtraBatch, MicroBatch

RawBatch = Batch | Sequence[Tensor]
Views = dict[str, tuple[Tensor, Tensor]]
"""(images, labels) by the name of the view."""


class Inputs:
    """Brings images to the device of ``like``, a parameter, and into model space."""

    def __init__(self, space: PixelSpace, like: Tensor, channels_last: bool) -> None:
        self.space, self._device = space, like.device
        self._float64 = like.dtype == torch.float64
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self._checked = False

    def as_batch(self, raw: RawBatch, step: int, rank: int) -> Batch:
        """``raw`` as the batch of ``step``; ConadvError if it is none."""
        if isinstance(raw, Batch):
            if len({len(micro.y_N) for micro in raw.micro}) != 1:
                raise ConadvError(
                    "A batch needs micro-batches of one size: a step takes the mean of their means."
                )
            return raw
        parts = list(raw) if isinstance(raw, (tuple, list)) else []
        if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
            found = [type(part).__name__ for part in parts] or type(raw).__name__
            raise ConadvError(
                f"A batch is a pair (images, labels) of tensors or a conadv.Batch, not {found}. Of "
                "a loader that yields more, pass the first two: step((x, y))."
            )
        # The rank numbers the micro-batch: N ranks then draw what one rank with N of them draws.
        x_NCHW, y_N = raw
        if not (x_NCHW.dim() and y_N.dim() and len(x_NCHW) == len(y_N)):
            raise ConadvError(
                f"Images {tuple(x_NCHW.shape)} and labels {tuple(y_N.shape)} differ in number."
            )
        if not len(y_N):
            raise ConadvError("The batch has no images. Leave out empty batches.")
        return Batch(step, (MicroBatch(rank, y_N, {"clean": x_NCHW}),))

    def images(self, micro: MicroBatch, view: str, first: int = 0) -> Tensor:
        """A view's images from ``first`` on in model space on the model's device, (N, C, H, W)."""
        if view not in micro.views:
            raise ConadvError(f"The method needs a view {view!r} in every batch.")
        return self._in_model_space(micro.views[view][first:].to(self._device, non_blocking=True))

    def example(self, micro: MicroBatch) -> Tensor:
        """A tensor on the meta device like the clean view's images in model space."""
        return self._in_model_space(micro.views["clean"].to("meta"))

    def _in_model_space(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            # A model in float64 gets pixels in float64, not rounded to float32 before.
            x = self.space.normalize(x.double().div_(255) if self._float64 else x)
        elif not x.is_floating_point():
            raise ConadvError(
                f"Images are uint8 pixels or floats in model space, not {x.dtype}: "
                "x.to(torch.uint8)."
            )
        # Layouts are of images; what has another number of dims has one layout only.
        return x.contiguous(memory_format=self.layout) if x.dim() == 4 else x

    def labels(self, micro: MicroBatch) -> Tensor:
        return micro.y_N.to(self._device, non_blocking=True)

    def views(self, m: int, micro: MicroBatch, extra: ExtraBatch | None, replace: bool) -> Views:
        """What micro-batch ``m`` of a step trains on.

        ``replace``: the extra images stand for the clean ones that they were made of, the first.
        """
        views = {}
        for name, y_N in self.view_labels(m, micro, extra, replace).items():
            if name == "adv":
                assert extra is not None
                views[name] = extra.images[m], y_N
            else:
                views[name] = self.images(micro, name, len(micro.y_N) - len(y_N)), y_N
        return views

    def view_labels(
        self, m: int, micro: MicroBatch, extra: ExtraBatch | None, replace: bool
    ) -> dict[str, Tensor]:
        """The labels of :meth:`views`."""
        y_N = self.labels(micro)
        first = len(extra.labels[m]) if extra is not None and replace else 0
        labels = {}
        if first < len(y_N):  # a share of 1 leaves no clean image
            labels["clean"] = y_N[first:]
        if "aug" in micro.views:
            labels["aug"] = y_N
        if extra is not None:
            labels["adv"] = extra.labels[m]
        return labels

    def check_space(self, batch: Batch) -> None:
        """Before the first attack: ConadvError unless images fit the space. Sync point."""
        if not self._checked:  # one batch tells, and each check waits for the device
            self.space.check(self.images(batch.micro[0], "clean"))
            self._checked = True

    def likely_cause(self, batch: Batch, comm: Comm) -> str:
        """What to do about a number that is not finite. Ranks: collective; sync point."""
        views = sorted(batch.micro[0].views)
        finite = [
            all(bool(self.images(m, view).isfinite().all()) for m in batch.micro) for view in views
        ]
        # Together: the bad image may lie on one rank, and all ranks say the same.
        bad = comm.any(~torch.tensor(finite)).tolist()
        if True in bad:
            view = views[bad.index(True)]
            return f"The images of the {view} view hold infinite or NaN values: check the data."
        return (
            "The images are finite: lower the learning rate, lengthen the warm-up, or clip "
            "(optim.clip_norm)."
        )
