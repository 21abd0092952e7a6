"""Clean images, their adversarial ones and the perturbation magnified, from a run's checkpoint.

The only part of a report that needs torch, which is imported only if there is a checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from conadv.errors import ConadvError
from conadv.report.comparison import Comparison
from conadv.report.figure_style import panels, wrap

IMAGES = 6


def draw_gallery(comparison: Comparison) -> Figure | None:
    """Test images under the attack of the training, at the weights of the last arm that attacks.

    None without a checkpoint, or where the data set is not on this machine.
    """
    runs = [run for arm in comparison.arms if arm.attacks for run in arm.runs if run.summary]
    runs = [run for run in runs if any((run.path / "checkpoints").glob("step_*.pt"))]
    try:
        clean, attacked, titles = _attack(runs[-1].path)
    except (IndexError, ConadvError):
        return None
    change = attacked - clean
    magnified = 0.5 + 0.5 * change / (np.abs(change).max() or 1.0)
    figure, grid = panels(3 * IMAGES, IMAGES, 4.3)
    pictures = [*clean, *magnified, *attacked]
    for axes, picture, title in zip(grid, pictures, titles, strict=True):
        axes.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(title, fontsize=8)
    for axes, name in zip(grid[::IMAGES], ("clean", "perturbation", "attacked"), strict=True):
        axes.set_ylabel(name)
    figure.suptitle(wrap(runs[-1].path.name, 70), fontsize=9)
    return figure


def _attack(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Clean and adversarial images (N, H, W, C) in [0, 1], and a title for every picture."""
    import torch

    from conadv import rng
    from conadv.training.build import attack_of
    from conadv.training.resume import load_run

    device = torch.device("cpu")
    parts = load_run(path, device)
    parts.model.eval()
    images, y_N = next(iter(parts.data.eval_batches("test", IMAGES, IMAGES)))
    x_NCHW = parts.space.normalize(images)
    attack = attack_of(parts.config.attack, parts.space)
    adv_NCHW = attack(parts.model, x_NCHW, y_N, rng.generator(device, 0, "gallery"))
    pixels, titles = [], []
    for x in (x_NCHW, adv_NCHW):
        with torch.no_grad():
            said = parts.model(x).argmax(1)
        titles.append([f"{y}: says {s}" for y, s in zip(y_N.tolist(), said.tolist(), strict=True)])
        pixels.append(parts.space.to_pixels(x).permute(0, 2, 3, 1).clamp(0, 1).double().numpy())
    return pixels[0], pixels[1], [*titles[0], *[""] * len(y_N), *titles[1]]
