"""What a number among a program's options can be at all: something that can be made so many times, and finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from conadv.config.schema import LARGEST_SEED, MOST, WIDEST
from conadv.errors import ConadvError

THREADS = 1024
"""More threads or processes no machine starts at once, and OpenMP ends the program where it cannot."""
LARGEST = {
    **dict.fromkeys(("threads", "jobs", "workers", "num_workers"), THREADS),
    **dict.fromkeys(("image_size", "photo_size", "channels"), 2**14),
    "width": WIDEST,
    "grid": 1001,
    "seed": LARGEST_SEED,
    "images_per_epoch": 10**12,
    "seeds": 1000,
}
"""Option -> its largest value, where that is not MOST."""
_POSITIVE = (
    *(
        "threads",
        "jobs",
        "workers",
        "rounds",
        "image_size",
        "photo_size",
        "channels",
        "classes",
        "num_classes",
        "width",
    ),
    *("micro_batch_size", "images", "batch", "seeds", "steps"),
)
LEAST = {
    **dict.fromkeys(_POSITIVE, 1),
    "photo_size": 8,
}  # torch's resizing asserts on pictures of one pixel


def check_numbers(options: Any) -> None:
    """Raise ConadvError for a number in ``options``, a dataclass of a command, that is absurdly large or not finite.

    What else a number must be is up to its command. The settings of a run are checked by conadv.config.schema.
    """
    for name, value in _numbers(options):
        option = f"--{name.replace('_', '-')} {str(value)[:30]}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ConadvError(f"{option} must be a finite number, or be left out.")
        if value < LEAST.get(name, -MOST):
            raise ConadvError(f"{option} must be {LEAST.get(name, -MOST)} or more.")
        if isinstance(value, int) and value > LARGEST.get(name, MOST):
            raise ConadvError(f"{option} must be {LARGEST.get(name, MOST)} or less.")


def _numbers(options: Any) -> Iterator[tuple[str, int | float]]:
    """(name, number) of all that ``options`` holds."""
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            yield from _numbers(value)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, (int, float)) and not isinstance(each, bool):
                yield field.name, each
