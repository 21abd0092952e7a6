"""The loss along a random direction that is scaled to the weights' filters, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from conadv.analysis.objective import Objective
from conadv.analysis.style import GREY, STYLE, titled


def filter_normalised(objective: Objective, generator: torch.Generator) -> Tensor:
    """A random direction d (P), each filter as long as the model's own: d <- d / |d| * |w|.

    A filter makes one output: index 0 of a weight with two or more dimensions. Batch norm and biases
    get zero. ``generator`` (CPU) draws in float32, so that one seed gives all runs of an architecture
    the same draws. Source: Li et al., arXiv 1712.09913, section 4.
    """
    pieces = []
    for weight in objective.model.parameters():
        d, w = torch.randn(weight.shape, generator=generator).to(weight), weight.detach()
        if weight.dim() < 2:
            pieces.append(torch.zeros_like(w).flatten())
            continue
        d, w = d.flatten(1), w.flatten(1)
        length = d.norm(dim=1, keepdim=True).clamp_min(torch.finfo(d.dtype).tiny)
        pieces.append((d * w.norm(dim=1, keepdim=True) / length).flatten())
    return torch.cat(pieces)


def grid(points: int) -> list[float]:
    """``points`` evenly spaced numbers from -1 to 1; an odd number, so that 0 is one of them."""
    half = points // 2
    return [i / half for i in range(-half, half + 1)]


def line(
    train: Objective, test: Objective, direction: Tensor, alphas: Sequence[float]
) -> dict[str, list[float]]:
    """Loss and accuracy at theta + alpha d, on training and on test images of one model.

    Alpha 1 moves every filter by its own length. Losses far away may be inf or nan.
    """
    found = {"alphas": list(alphas)}
    for name, objective in (("train", train), ("test", test)):
        values = [objective.value(train.theta + alpha * direction) for alpha in alphas]
        found[f"{name}_loss"] = [value.loss for value in values]
        found[f"{name}_accuracy"] = [value.accuracy for value in values]
    return found


@mpl.rc_context(STYLE)
def line_figure(found: dict[str, Any], title: str) -> Figure:
    """Loss and accuracy over alpha: ``landscape_1d`` of analysis.json. None leaves a gap."""
    figure = Figure(figsize=(7.4, 3.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for split, form in (("train", "-"), ("test", "--")):
        loss.plot(found["alphas"], np.array(found[f"{split}_loss"], float), form, label=split)
        percent = 100 * np.array(found[f"{split}_accuracy"], float)
        accuracy.plot(found["alphas"], percent, form)
    for axes, name in ((loss, "cross-entropy"), (accuracy, "accuracy, %")):
        axes.set(xlabel="distance from the weights, in filter lengths", ylabel=name)
        axes.grid(True)
        axes.axvline(0, color=GREY, lw=0.8, ls=":")
    loss.set_yscale("log", nonpositive="mask")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(NullFormatter())
    accuracy.set_ylim(0, 102)
    loss.legend()
    return titled(figure, title)
