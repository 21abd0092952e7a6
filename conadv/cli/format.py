"""Numbers as text for a terminal."""

from __future__ import annotations


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
