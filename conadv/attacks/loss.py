"""The loss that is trained, as the step, its gradient over ranks, and attacks need it."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conadv.errors import ConadvError

Loss = Callable[[Tensor, Tensor], Tensor]
"""(output, y_N) -> mean over N, a scalar."""

_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)
_LIKE_OUTPUT = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss),
    *(nn.PoissonNLLLoss, nn.HingeEmbeddingLoss, nn.SoftMarginLoss, nn.KLDivLoss),
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss),
    *(F.poisson_nll_loss, F.hinge_embedding_loss, F.soft_margin_loss, F.kl_div),
)


class TrainedLoss:
    """A loss over classes, probabilities, numbers or images, whoever has written it.

    torch's own losses (modules, functions, and ``functools.partial`` of them) can also be summed
    over images: an image's gradient then does not depend on its batch, and class weights count over
    the global batch. Of any other loss there is the mean alone. That is enough for an attack that
    uses directions, as FGSM and PGD do, where the loss of an image depends on no other image.

    ``weighted``: its mean divides by more than a number of images: by class weights, or by images
    that are not ignored. ``classes``: it compares logits with classes, or with their probabilities.
    Raises ConadvError for a loss that is no mean, and for outputs and labels that do not fit it.
    """

    def __init__(self, loss: Loss = F.cross_entropy) -> None:
        if isinstance(loss, type) or not callable(loss):
            raise ConadvError(
                f"The loss {getattr(loss, '__name__', repr(loss))} is no function of (output, "
                "y_N). Pass F.cross_entropy, an instance such as nn.CrossEntropyLoss(), or your "
                "own function."
            )
        self._loss = loss
        self._settings = _settings(loss)
        self._kind = loss.func if isinstance(loss, partial) else loss
        reduction = self._settings.get("reduction", "mean")
        if reduction not in ("mean", "batchmean"):
            raise ConadvError(
                f"The loss has reduction={reduction!r}. A step takes the mean over its images, on "
                'one rank and on many: give the loss reduction="mean".'
            )
        self._sum = _summed(loss)
        self.classes, self._like_output = self._is(_CLASSES), self._is(_LIKE_OUTPUT)
        # A module always has an ignore_index, so it may always find labels to ignore.
        given = {"weight", "ignore_index"} & {k for k, v in self._settings.items() if v is not None}
        self.weighted = self.classes and bool(given)
        # Of torch's own losses their settings say all; others may not do what those say.
        kind = type(self._kind) if isinstance(self._kind, nn.Module) else self._kind
        old = {"size_average", "reduce"} & set(self._settings)
        self._torchs = getattr(kind, "__module__", "").startswith("torch.nn.") and not old
        self._checked = False

    def __call__(self, output: Tensor, y_N: Tensor) -> Tensor:
        """The mean over images, a scalar. The first call is a sync point."""
        loss = self._call(self._loss, output, y_N)
        if not self._checked and not self._torchs:
            self._check_is_mean(loss, output, y_N)
        self._checked = True
        return loss

    def total(self, output: Tensor, y_N: Tensor) -> Tensor:
        """The sum over images, or the mean of a loss that knows nothing else."""
        total = self._call(self._loss if self._sum is None else self._sum, output, y_N)
        if self.weighted and not self._torchs and not self._checked:
            self._check_is_total(total.detach(), output.detach(), y_N)
            self._checked = True
        return total

    def mass(self, y_N: Tensor) -> Tensor:
        """What the mean over these labels divides their sum by, in float64; for ``weighted``."""
        if y_N.is_floating_point():  # probabilities: weights of classes are in the sum alone
            rows = y_N.numel() / y_N.shape[1]
            return torch.tensor(rows, dtype=torch.float64, device=y_N.device)
        kept: Tensor = y_N != self._settings.get("ignore_index", -100)
        if (weight := self._settings.get("weight")) is not None:
            weight = torch.as_tensor(weight, dtype=torch.float64, device=y_N.device)
            with _explained(y_N, y_N):
                kept = torch.where(kept, weight[torch.where(kept, y_N, 0)], 0.0)
        return kept.sum(dtype=torch.float64)

    def _is(self, kinds: tuple[Any, ...]) -> bool:
        found = [kind for kind in kinds if isinstance(kind, type) and isinstance(self._kind, kind)]
        return bool(found) or any(self._kind is kind for kind in kinds)

    def _call(self, loss: Loss, output: Tensor, y_N: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            raise ConadvError(
                f"The model returns a {type(output).__name__}, where one tensor is needed. Wrap it "
                "in a module that returns the logits alone."
            )
        output = raised(output)
        if y_N.is_floating_point():
            y_N = y_N.to(output.dtype)
        self._check_fit(output, y_N)
        with _explained(output, y_N):
            found = loss(output, y_N)
        if not isinstance(found, Tensor) or found.dim():
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConadvError(
                f"The loss returns {shape}, not a scalar. Have it return the mean over the images."
            )
        if torch.is_grad_enabled() and output.requires_grad and not found.requires_grad:
            raise ConadvError("The loss has no gradient: it detaches the output, or ignores it.")
        return found

    def _check_fit(self, output: Tensor, y_N: Tensor) -> None:
        """ConadvError for what torch computes without a word, or ends a CUDA process by."""
        if self._like_output and output.shape != y_N.shape:  # torch would broadcast
            raise _misfit(output, y_N, "Give both the same shape: output.squeeze(1), or y[:, None]")
        if not self.classes:
            return
        if output.dim() > 1 and output.shape[1] == 1:
            raise _misfit(output, y_N, "Cross-entropy of one class is always 0: use BCE, or MSE")
        if y_N.is_floating_point() or (self._checked and y_N.device.type != "cpu"):
            return  # later labels on CUDA are not looked at: each look waits for the device
        ignored = self._settings.get("ignore_index")
        wrong = (y_N < 0) | (y_N >= output.shape[-1 if output.dim() == 1 else 1])
        if ignored is not None:
            wrong &= y_N != ignored
        if bool(wrong.any()):
            hint = "Number the classes from 0, or give the loss an ignore_index for the others"
            raise _misfit(output, y_N, f"Labels range from {y_N.min()} to {y_N.max()}. {hint}")

    def _check_is_mean(self, loss: Tensor, output: Tensor, y_N: Tensor) -> None:
        """ConadvError if a loss of the caller's own adds up: N ranks would train N times faster."""
        devices = [output.device] if output.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            twice = self._call(self._loss, torch.cat([output, output]), torch.cat([y_N, y_N]))
        if loss and torch.isclose(twice, 2 * loss, rtol=1e-3, atol=0.0):
            raise ConadvError(
                "The loss of a batch that is given twice is twice the loss: it is a sum over "
                "images. Have it return the mean."
            )

    def _check_is_total(self, total: Tensor, output: Tensor, y_N: Tensor) -> None:
        """ConadvError if a loss derived from torch's has other sums than its mean tells."""
        mean, mass = float(self._call(self._loss, output, y_N)), float(self.mass(y_N))
        if mass and not math.isclose(float(total), mean * mass, rel_tol=1e-3):
            raise ConadvError(
                f"{type(self._kind).__name__} is derived from a loss of torch's over classes, but "
                "with reduction='sum' it is not the sum of which it is the mean. Derive it from "
                "nn.Module, to train on its mean."
            )


def raised(x: Tensor) -> Tensor:
    """Half types as float32; float64 stays float64."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _settings(loss: Any) -> dict[str, Any]:
    if isinstance(loss, partial):
        return {**_settings(loss.func), **loss.keywords}
    names = ("reduction", "weight", "ignore_index") if isinstance(loss, nn.Module) else ()
    return {name: getattr(loss, name) for name in names if hasattr(loss, name)}


def _summed(loss: Any) -> Loss | None:
    """The same loss summed over images; None where it has no such form."""
    if isinstance(loss, nn.Module):
        if not hasattr(loss, "reduction"):
            return None
        summed = copy.copy(loss)
        summed.reduction = "sum"  # type: ignore[assignment]
        return summed
    try:
        has_one = "reduction" in inspect.signature(loss).parameters
    except (TypeError, ValueError):  # written in C
        return None
    return partial(loss, reduction="sum") if has_one else None


@contextmanager
def _explained(output: Tensor, y_N: Tensor) -> Iterator[None]:
    """Turn the error of a loss into one that says what the loss was given."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise _misfit(output, y_N, lines[0][:200].rstrip(".")) from error


def _misfit(output: Tensor, y_N: Tensor, why: str) -> ConadvError:
    def shown(x: Tensor) -> str:
        return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"

    hint = ""
    if not y_N.is_floating_point() and y_N.dtype != torch.int64:
        hint = " Class labels are int64: y.long()."
    elif not y_N.is_floating_point() and y_N.dim() == 2 and y_N.shape[1] == 1:
        hint = " Class labels have shape (N,): y.squeeze(1)."
    return ConadvError(
        f"The loss of an output {shown(output)} and labels {shown(y_N)}: {why}.{hint}"
    )
