"""A curve as text, for a terminal, and the schedule as a PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from conadv.errors import ConadvError, printable

EIGHTHS = " ▁▂▃▄▅▆▇█"
ASCII = "        #"


def bars(values: Sequence[float], height: int, *, ascii_only: bool = False) -> list[str]:
    """``height`` lines of one column per value, from 0 at the bottom to the largest value at the top.

    A value above 0 shows at least the smallest block.
    """
    blocks = ASCII if ascii_only else EIGHTHS
    top = max(max(values), 0.0) or 1.0
    levels = [0 if value <= 0 else max(1, round(8 * height * value / top)) for value in values]
    if ascii_only:  # whole characters only
        levels = [-(-level // 8) * 8 for level in levels]
    rows = range(height - 1, -1, -1)
    return ["".join(blocks[min(8, max(0, level - 8 * row))] for level in levels) for row in rows]


def plot(
    curve: Callable[[int], float],
    steps: int,
    width: int,
    height: int,
    label: str,
    *,
    ascii_only: bool = False,
) -> list[str]:
    """``curve`` over the steps 0 .. steps - 1 as lines of at most ``width`` characters, with both axes' ends.

    A column shows the largest value of its steps, so that no peak is lost.
    """
    margin = 10
    columns = max(1, min(width - margin, steps))
    stretch = max(1, (width - margin) // columns)
    edges = [steps * column // columns for column in range(columns + 1)]
    values = [max(map(curve, _some(first, last))) for first, last in pairwise(edges)]
    lines = bars([value for value in values for _ in range(stretch)], height, ascii_only=ascii_only)
    axis, corner, line = ("|", "+", "-") if ascii_only else ("┤", "└", "─")
    top = f"{max(values):.4g}"
    marks = [top, *[""] * (height - 2), "0"] if height > 1 else [top]
    drawn = [f"{mark:>{margin - 2}} {axis}{text}" for mark, text in zip(marks, lines, strict=True)]
    shown = columns * stretch
    last = f"{steps}"
    below = f"{'0':<{max(1, shown - len(last))}}{last}" if shown > len(last) else last
    return [label, *drawn, " " * (margin - 1) + corner + line * shown, " " * margin + below]


def _some(first: int, last: int) -> Sequence[int]:
    """At most 64 of the steps first .. last - 1, with both ends."""
    stride = max(1, (last - first) // 64)
    return [*range(first, last, stride), last - 1]


def draw(
    curves: Sequence[tuple[str, Callable[[int], float]]],
    steps: int,
    steps_per_epoch: int,
    path: Path,
) -> None:
    """The named curves over epochs as a PNG, one below another. Raises ConadvError where it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 2.0 * len(curves)), layout="constrained")
    shown = _some(0, steps) if steps <= 64 else [round(i * (steps - 1) / 999) for i in range(1000)]
    for number, (name, curve) in enumerate(curves, 1):
        axes = figure.add_subplot(len(curves), 1, number)
        axes.plot([step / steps_per_epoch for step in shown], [curve(step) for step in shown])
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.set_xlabel("epoch")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise ConadvError(
            f"Cannot write {printable(path)}: {error.strerror}. Choose another --figure."
        ) from error
