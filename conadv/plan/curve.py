"""Time against size, between and beyond measured points."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class Curve:
    """Piecewise linear through measured (size, seconds) points, made non-decreasing.

    Beyond the largest point the last segment goes on, as a + b n. Below the smallest the first segment goes on, but
    never under that point's time per image: a smaller batch is not more efficient than a larger one.
    """

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self.sizes = [size for size, _ in points]
        self._seconds = list(accumulate((seconds for _, seconds in points), max))

    def __call__(self, size: float) -> float:
        if len(self.sizes) == 1:
            return self._seconds[0] * size / self.sizes[0]
        right = min(max(bisect_left(self.sizes, size), 1), len(self.sizes) - 1)
        x0, x1 = self.sizes[right - 1 : right + 1]
        y0, y1 = self._seconds[right - 1 : right + 1]
        value = y0 + (y1 - y0) * (size - x0) / (x1 - x0)
        return max(value, y0 * size / x0) if size < x0 else value

    def covers(self, size: float) -> bool:
        """Whether ``size`` lies within the measured range."""
        return self.sizes[0] <= size <= self.sizes[-1]
