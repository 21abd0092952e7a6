"""Bounds for numeric command-line options. conadv.config checks the settings of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from conadv.config.schema import LARGEST_SEED, MOST, WIDEST
from conadv.errors import ConadvError

THREADS = (1, 1024)  # beyond what a machine starts at once; OpenMP ends the program where it cannot
SIDE = (1, 2**14)
COUNT = (1, MOST)
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("threads", "jobs", "workers"), THREADS),
    "num_workers": (0, 1024),
    **dict.fromkeys(("image_size", "channels"), SIDE),
    "photo_size": (8, 2**14),  # torch's resizing asserts on pictures of one pixel
    **dict.fromkeys(("rounds", "classes", "num_classes", "micro_batch_size"), COUNT),
    **dict.fromkeys(("images", "batch", "batches", "steps", "accumulation", "burst"), COUNT),
    **dict.fromkeys(("attack_ranks", "price", "memory_gib"), (0, MOST)),
    **dict.fromkeys(("keskar_steps", "robust_steps"), COUNT),
    **dict.fromkeys(("eigenvalues", "probes", "robust_images"), (0, MOST)),
    **dict.fromkeys(("rho", "keskar_eps"), (1e-12, MOST)),
    "at_loss": (1e-9, MOST),
    "width": (1, WIDEST),
    "seed": (-MOST, LARGEST_SEED),
    "seeds": (1, 1000),
    "images_per_epoch": (-MOST, 10**12),
}


def check_numbers(options: Any) -> None:
    """Raise ConadvError for a number in a command's ``options`` that is out of bounds."""
    for name, value in _numbers(options):
        option = f"--{name.replace('_', '-')} {str(value)[:30]}"
        least, most = BOUNDS.get(name, (-MOST, MOST))
        if isinstance(value, float) and not math.isfinite(value):
            raise ConadvError(f"{option} must be a finite number, or be left out.")
        if value < least:
            raise ConadvError(f"{option} must be {least} or more.")
        if value > most:
            raise ConadvError(f"{option} must be {most} or less.")


def _numbers(options: Any) -> Iterator[tuple[str, int | float]]:
    """(name, number) of every number that ``options`` holds."""
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            yield from _numbers(value)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, (int, float)) and not isinstance(each, bool):
                yield field.name, each
