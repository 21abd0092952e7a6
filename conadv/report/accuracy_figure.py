"""Test accuracy of every arm, and test accuracy against cost: a panel per batch size."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from conadv.analysis.style import GREY
from conadv.report.comparison import Comparison
from conadv.report.figure_style import draw_rows, legend, look, panels


def draw_accuracy(comparison: Comparison) -> Figure | None:
    """A row per arm; the dotted line is the baseline's mean. None without a finished run."""
    groups = [arms for x in comparison.points if (arms := comparison.at(x))]
    if all(arm.values().empty for arm in comparison.arms):
        return None
    sizes = [len(arms) + 0.5 for arms in groups]
    height = 0.8 + 0.32 * sum(sizes) + 0.3 * len(groups)
    figure, grid = panels(len(groups), 1, height, sharex=True, height_ratios=sizes)
    for axes, arms in zip(grid, groups, strict=True):
        draw_rows(axes, comparison, {arm: 100 * arm.values() for arm in arms})
        for arm in arms:
            if arm.role == "baseline" and not arm.values().empty:
                axes.axvline(100 * arm.values().mean(), color=GREY, lw=1, ls=":", zorder=0)
        axes.set_title(comparison.place(arms[0].x))
    grid[-1].set_xlabel("test accuracy, %")
    return figure


def draw_cost(comparison: Comparison) -> Figure | None:
    """Mean and standard deviation by gradient images of the whole training.

    Of arms that cost the same the later are drawn smaller. None where no two costs are known.
    """
    known = [a for a in comparison.arms if a.mean() > 0 and a.medians.gradient_images > 0]
    groups = [[arm for arm in known if arm.x == x] for x in comparison.points]
    groups = [arms for arms in groups if len(arms) > 1]
    if not groups:
        return None
    drawn = [arm for arms in groups for arm in arms]
    columns = min(2, len(groups))
    height = 0.5 + 2.7 * -(-len(groups) // 2) + 0.11 * len(comparison.latest)
    figure, grid = panels(len(groups), columns, height)
    for axes, arms in zip(grid, groups, strict=True):
        costs = np.array([arm.medians.gradient_images for arm in arms])
        means = np.array([100 * arm.mean() for arm in arms])
        for number, arm in enumerate(arms):
            size = 10 - min(1.5 * np.isclose(costs[:number], costs[number], rtol=0.03).sum(), 6)
            style = look(comparison, arm) | {"ms": size, "mec": GREY, "mew": 0.8}
            axes.errorbar(costs[number], means[number], 100 * arm.values().std(), **style)
        order = np.argsort(costs)
        best = np.maximum.accumulate(means[order])
        ends = [*costs[order], 1.15 * costs.max()]
        axes.step(ends, [*best, best[-1]], where="post", color=GREY, lw=0.9, ls="--", alpha=0.6)
        axes.set(title=comparison.place(arms[0].x), ylabel="test accuracy, %")
        axes.set(xlim=(0, ends[-1]), xlabel="gradient images of the training")
        axes.xaxis.set_major_formatter(EngFormatter())
    legend(figure, comparison, [a for a in comparison.latest.values() if a in drawn])
    return figure
