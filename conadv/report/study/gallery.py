"""Clean images, their adversarial ones, and the perturbation magnified, from the checkpoint of a run.

The one part of a report that needs torch, which it imports only when there is a checkpoint to load.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from conadv.errors import ConadvError
from conadv.report.figures import STYLE, WIDTH
from conadv.report.settings import show
from conadv.report.study.sweep import Cell, Study

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = 8


@dataclass(frozen=True)
class Gallery:
    """The picture and where it is from; ``figure`` is None where there is nothing to draw, and ``text`` says why."""

    figure: Figure | None
    text: str


def gallery(study: Study, count: int = IMAGES) -> Gallery:
    """Attack the first ``count`` test images at the trained weights of an adversarial arm, as in its training.

    The network is in eval mode on the clean route. Taken is the first adversarial arm, at the largest batch first, with
    a run that has a checkpoint.
    """
    run = _with_checkpoint(study)
    if run is None:
        return Gallery(
            None, "No run of an adversarial arm has a checkpoint, so there are no images to show."
        )
    cell, path = run
    try:
        clean, adversarial, truth, before, after, eps = _attack(path, count)
    except ConadvError as error:
        return Gallery(None, f"The images of {cell.line} cannot be made again: {error}")
    text = (
        f"Test images attacked at the trained weights of {cell.line} with the attack of its training, eps "
        f"{show('attack.eps', eps)}; below each, its class and what the network says. The perturbation is shown around "
        f"grey, magnified {factor(clean, adversarial):.3g} times, so that the largest change reaches the full range."
    )
    return Gallery(_draw(clean, adversarial, truth, before, after), text)


def _with_checkpoint(study: Study) -> tuple[Cell, Path] | None:
    for x in reversed(study.points):
        for cell in study.adversarial(x):
            for run in cell.finished:
                if cell.attacks and any((run.path / "checkpoints").glob("step_*.pt")):
                    return cell, run.path
    return None


Pictures = np.ndarray[Any, np.dtype[np.float64]]


def _attack(
    path: Path, count: int
) -> tuple[Pictures, Pictures, list[int], list[int], list[int], float]:
    """Clean and adversarial pictures (N, H, W, C) in [0, 1], their classes, predictions before and after, eps."""
    import torch

    from conadv import rng
    from conadv.training.build import attack_of
    from conadv.training.resume import load_run

    device = torch.device("cpu")
    parts = load_run(path, device)
    parts.model.eval()
    images, y_N = next(iter(parts.data.eval_batches("test", count, count)))
    x_NCHW = parts.space.normalize(images)
    attack = attack_of(parts.config.attack, parts.space)
    adv_NCHW = attack(parts.model, x_NCHW, y_N, rng.generator(device, 0, "gallery"))
    with torch.no_grad():
        before, after = (parts.model(x).argmax(1).tolist() for x in (x_NCHW, adv_NCHW))
    clean, adversarial = (_pictures(parts.space.to_pixels(x)) for x in (x_NCHW, adv_NCHW))
    return clean, adversarial, y_N.tolist(), before, after, parts.config.attack.eps


def _pictures(pixels_NCHW: Tensor) -> Pictures:
    """(N, C, H, W) -> (N, H, W, C), as matplotlib takes it."""
    pictures: Pictures = pixels_NCHW.permute(0, 2, 3, 1).clamp(0, 1).double().numpy()
    return pictures


def factor(clean: Pictures, adversarial: Pictures) -> float:
    """How many times the perturbation is magnified; 1 where there is none."""
    largest = float(np.abs(adversarial - clean).max())
    return 0.5 / largest if largest > 0 else 1.0


def magnify(clean: Pictures, adversarial: Pictures) -> Pictures:
    """The perturbation around 0.5, one factor for all images, so that the largest change reaches 0 or 1."""
    return 0.5 + factor(clean, adversarial) * (adversarial - clean)


@mpl.rc_context(STYLE)
def _draw(
    clean: Pictures, adversarial: Pictures, truth: list[int], before: list[int], after: list[int]
) -> Figure:
    rows = (
        (clean, before, "clean"),
        (magnify(clean, adversarial), None, "perturbation"),
        (adversarial, after, "attacked"),
    )
    figure = Figure(figsize=(WIDTH, 0.4 + 3 * (WIDTH / len(clean) + 0.12)), layout="constrained")
    grid = figure.subplots(3, len(clean), squeeze=False)
    for row, (pictures, said, name) in zip(grid, rows, strict=True):
        row[0].set_ylabel(name)
        for index, axes in enumerate(row):
            picture = pictures[index]
            axes.imshow(
                picture[..., 0] if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=1
            )
            axes.set_xticks([])
            axes.set_yticks([])
            if said is not None:
                axes.set_xlabel(f"{truth[index]}: says {said[index]}", fontsize=8)
    return figure
