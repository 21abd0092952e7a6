"""Numbers and curves as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

BLOCKS = " ▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """Seconds in words: 12.3 ms, 4.56 s, 78.9 min, 12.3 h, 3.4 days."""
    units = (
        (1.0, "ms", 1e3),
        (120.0, "s", 1.0),
        (7200.0, "min", 1 / 60),
        (172800.0, "h", 1 / 3600),
    )
    for limit, unit, factor in units:
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"


def bars(values: Sequence[float], height: int, *, ascii_only: bool = False) -> list[str]:
    """``height`` lines of one column per value, from 0 at the bottom to the largest at the top.

    A value above 0 shows at least the smallest block.
    """
    blocks = "        #" if ascii_only else BLOCKS
    top = max(max(values), 0.0) or 1.0
    levels = [0 if value <= 0 else max(1, round(8 * height * value / top)) for value in values]
    if ascii_only:  # whole characters only
        levels = [-(-level // 8) * 8 for level in levels]
    rows = range(height - 1, -1, -1)
    return ["".join(blocks[min(8, max(0, level - 8 * row))] for level in levels) for row in rows]


def plot(
    curve: Callable[[int], float], steps: int, width: int, height: int, *, ascii_only: bool = False
) -> list[str]:
    """``curve`` over the steps 0 .. steps - 1, in at most ``width`` columns, with its largest value.

    A column shows the largest value at up to 64 of its steps.
    """
    columns = max(1, min(width - 10, steps))
    edges = [steps * column // columns for column in range(columns + 1)]
    values = [
        max(map(curve, [*range(first, last, max(1, (last - first) // 64)), last - 1]))
        for first, last in pairwise(edges)
    ]
    lines = bars(values, height, ascii_only=ascii_only)
    marks = [f"{max(values):.4g}", *[""] * (height - 2), "0"][:height]
    axis = "|" if ascii_only else "┤"
    drawn = [f"{mark:>8} {axis}{line}" for mark, line in zip(marks, lines, strict=True)]
    return [*drawn, " " * 10 + f"0{steps:>{columns - 1}}" if columns > len(str(steps)) else ""]
