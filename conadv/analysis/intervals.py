"""Sets of moments as float64 arrays of shape (n, 2): rows of (start, end) in seconds.

What comes in may overlap and be in any order; what comes out is sorted, without overlap, touching intervals joined and
empty ones left out. So the length of a result is the time that it covers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Intervals = npt.NDArray[np.float64]

NOTHING: Intervals = np.empty((0, 2))


def union(*sets: Intervals) -> Intervals:
    """The moments in at least one interval. Also brings one set into the form that results have."""
    return _covered(np.concatenate([NOTHING, *sets]), 1)


def intersection(a: Intervals, b: Intervals) -> Intervals:
    """The moments in both sets."""
    return _covered(np.concatenate([union(a), union(b)]), 2)


def difference(a: Intervals, b: Intervals) -> Intervals:
    """The moments in ``a`` and not in ``b``."""
    a = union(a)
    if not len(a):
        return a
    b = union(b)
    inside = b[(b[:, 1] > a[0, 0]) & (b[:, 0] < a[-1, 1])]
    edges = np.concatenate([[a[0, 0]], inside.ravel(), [a[-1, 1]]]).reshape(-1, 2)
    gaps = edges[edges[:, 1] > edges[:, 0]]
    return intersection(a, gaps)


def length(a: Intervals) -> float:
    """Seconds that a set covers; where intervals overlap they count once."""
    return float(np.sum(np.diff(union(a))))


def lengths_by_group(
    a: Intervals, group: npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.float64]:
    """:func:`length` of the intervals of each group 0..count-1: ``group[i]`` is the group of ``a[i]``."""
    if not len(a):
        return np.zeros(count)
    # one sweep for all: groups are moved so far apart that they cannot meet
    apart = 1.0 + a.max() - a.min()
    joined = union(a - a.min() + apart * group[:, None])
    where = np.floor(joined[:, 0] / apart).astype(np.int64)
    found = np.zeros(count)
    np.add.at(found, where, joined[:, 1] - joined[:, 0])
    return found


def _covered(a: Intervals, times: int) -> Intervals:
    """The moments that lie in at least ``times`` of the intervals."""
    a = a[a[:, 1] > a[:, 0]]
    moments = a.T.ravel()
    change = np.repeat([1, -1], len(a))
    order = np.lexsort(
        (-change, moments)
    )  # at one moment starts come before ends, which joins touching intervals
    moments, depth = moments[order], np.cumsum(change[order])
    inside = np.concatenate([[False], depth >= times])
    starts, ends = moments[inside[1:] & ~inside[:-1]], moments[~inside[1:] & inside[:-1]]
    found = np.stack([starts, ends], axis=1)
    return found[found[:, 1] > found[:, 0]]
