"""summary.json, analysis.json, sweep.json and lines of the record as their readers need them. Needs
no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from conadv.safe_io import Count, Document, Number, Share, checked, read_document

LARGEST = 1e15  # beyond any time or rate that can be measured
Amount = Annotated[float, Field(ge=0, le=LARGEST)]
Rate = Annotated[float, Field(ge=1e-15, le=LARGEST)]
Plain = bool | int | float | str | None
Settings = dict[str, Plain | list[Plain]]


class Summary(Document):
    """summary.json (docs/record.md). Accuracies in [0, 1], times in seconds, rates in images per
    second.
    """

    ranks: Annotated[int, Field(ge=1, le=10**6)] | None = None
    train_accuracy: Share | None = None
    validation_accuracy: Share | None = None
    validation_loss: Number | None = None
    test_accuracy: Share | None = None
    robust_accuracy: Share | None = None
    seconds: Amount | None = None
    step_seconds_median: Amount | None = None
    clean_images_per_second: Rate | None = None
    gradient_images_per_second: Rate | None = None
    attack_seconds_share: Amount | None = None


Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]  # a number in every JSON reader


class RecordLine(Document):
    """What a line of the record holds (docs/record.md), whatever its type; null for what is not
    finite.
    """

    step: Whole = 0
    steps: Whole = 0
    phases: dict[str, float] = Field({})
    losses: dict[str, float | None] = Field({})
    seconds: float = 0.0
    loss: float | None = None
    split: str = ""
    accuracy: float | None = None
    images: Whole = 0
    rank: Whole = 0
    role: str = ""
    attack_rank: Whole = 0
    path: str = ""
    reason: str = ""
    message: str = ""


NEEDED: dict[str, tuple[str, ...]] = {
    "header": (),
    "bad_image": ("step", "path"),
    **dict.fromkeys(
        ("step", "eval", "timeline", "attack_loss", "error", "resume", "probe", "stop"), ("step",)
    ),
}
"""Type of a line of the record -> the fields that readers cannot do without."""


class Probe(Document):
    """A line of type probe, as the report and `conadv staleness` need it."""

    step: Count
    phase: Literal["warm-up", "peak", "decay"]
    tau: Annotated[int, Field(ge=0, le=10**6)]
    predictor: str
    cosine: Number | None
    loss_increase: Number
    relative_error: Number | None
    images: Count
    eps: Number


class Value(Document):
    """A measured number; null where it was not finite."""

    value: Number | None = None


class Hessian(Document):
    """Largest eigenvalues first."""

    eigenvalues: list[Number | None] = Field([])
    trace: Number | None = None
    trace_stderr: Number | None = None


class Sharpness(Document):
    """A part that was switched off is null."""

    sam: Value | None = None
    keskar: Value | None = None


class Robust(Document):
    """Under PGD."""

    accuracy: Share | None = None
    eps: Number | None = None
    steps: Count | None = None
    images: Count | None = None


class Analysis(Document):
    """analysis.json (docs/analysis.md)."""

    loss: Number | None = None
    accuracy: Share | None = None
    hessian: Hessian | None = None
    sharpness: Sharpness | None = None
    robust: Robust | None = None


class Trial(Document):
    """One setting that a sweep tried."""

    settings: Settings = Field({})
    runs: list[str] = Field([])
    validation: list[Share | None] = Field([])
    mean: Share | None = None


class Cell(Document):
    """One arm of a sweep at one point."""

    arm: str
    settings: Settings = Field({})
    trials: list[Trial] = Field([])
    tuned_on: str | None = None
    chosen: Settings = Field({})
    runs: list[str] = Field([])
    seeds: list[Annotated[int, Field(ge=0, lt=2**64)]] = Field([])


class Tune(Document):
    """How a sweep chose its settings."""

    by: str = "validation_accuracy"
    seeds: list[int] = Field([])
    tune_on: str | None = None


class Spec(Document):
    """A sweep's spec."""

    title: str | None = None
    tune: Tune | None = None
    base: dict[str, Any] = Field({})
    arms: dict[str, dict[str, Any]] = Field({})


class Failure(Document):
    """A run that failed, and why."""

    run: str
    error: str
    diverged: bool = False


class Sweep(Document):
    """sweep.json (docs/sweep.md)."""

    name: str = ""
    spec: Spec = Spec()
    baseline: str | None = None
    controls: list[str] = Field([])
    axis: str = "global_batch_size"
    cells: list[Cell]
    failed: list[Failure] = Field([])


def read_sweep(path: Path) -> Sweep:
    """A sweep.json. Raises ConadvError."""
    return read_document(Sweep, path, "Run `conadv sweep` again to rewrite it, or leave it out.")


def probes(lines: Iterable[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The lines of type probe among those of the record ``path``. Raises ConadvError."""
    found = [line for line in lines if line["type"] == "probe"]
    for line in found:
        checked(Probe, line, path, "Remove its probe lines, or leave the run out.")
    return found
