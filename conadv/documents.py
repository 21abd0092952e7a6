"""summary.json, sweep.json and analysis.json as their readers need them: types and ranges, checked once, where read.

Fields that nobody reads are let through, so that older and newer versions' files stay readable. Nothing here imports
torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from conadv.errors import ConadvError, printable
from conadv.safe_io import JSON_BYTES, parse_json, read_text

LARGEST = 1e15
"""Beyond any time or rate that can be measured. Losses and eigenvalues may be anything whose square is a number."""

Number = Annotated[float, Field(ge=-1e100, le=1e100)]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, le=LARGEST)]
Rate = Annotated[float, Field(ge=1e-15, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Plain = bool | int | float | str | None
Settings = dict[str, Plain | list[Plain]]


class Document(BaseModel):
    """Strict: a number is no text, true is no number."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class Summary(Document):
    """What is read of summary.json (docs/record.md). Accuracies in [0, 1], times in seconds, images per second."""

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


class Trial(Document):
    """One setting that was tried."""

    settings: Settings = Field(default_factory=dict)
    runs: list[str] = Field(default_factory=list)
    validation: list[Share | None] = Field(default_factory=list)
    mean: Share | None = None


class Cell(Document):
    """One arm at one point."""

    arm: str
    settings: Settings = Field(default_factory=dict)
    trials: list[Trial] = Field(default_factory=list)
    tuned_on: str | None = None
    chosen: Settings = Field(default_factory=dict)
    runs: list[str] = Field(default_factory=list)
    seeds: list[Seed] = Field(default_factory=list)


class Tune(Document):
    """What a report says of the choice."""

    by: str = "validation_accuracy"
    seeds: list[Seed] = Field(default_factory=list)
    tune_on: str | None = None


class Spec(Document):
    """What is read of the spec."""

    title: str | None = None
    tune: Tune | None = None


class Failure(Document):
    """A run that failed, and why."""

    run: str
    error: str
    diverged: bool = False


class Sweep(Document):
    """What is read of sweep.json (docs/sweep.md)."""

    name: str = ""
    spec: Spec = Spec()
    baseline: str | None = None
    controls: list[str] = Field(default_factory=list)
    axis: str = "global_batch_size"
    cells: list[Cell]
    failed: list[Failure] = Field(default_factory=list)


class Value(Document):
    """A measured number; null where it was not finite."""

    value: Number | None = None


class Hessian(Document):
    """Largest eigenvalues first."""

    eigenvalues: list[Number | None] = Field(default_factory=list)
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


class Line(Document):
    """Losses along a direction, one for each alpha."""

    alphas: list[Number]
    train_loss: list[Number | None] | None = None
    test_loss: list[Number | None] | None = None

    @model_validator(mode="after")
    def _of_one_length(self) -> Line:
        if any(
            len(losses) != len(self.alphas)
            for losses in (self.train_loss, self.test_loss)
            if losses is not None
        ):
            raise ValueError("not one loss for each alpha")
        return self


class Analysis(Document):
    """What is read of analysis.json (docs/analysis.md)."""

    loss: Number | None = None
    accuracy: Share | None = None
    hessian: Hessian | None = None
    sharpness: Sharpness | None = None
    robust: Robust | None = None
    landscape_1d: Line | None = None


class Probe(Document):
    """A line of type probe (docs/record.md), as far as it is read."""

    step: Count
    phase: Literal["warm-up", "peak", "decay"]
    tau: Annotated[int, Field(ge=0, le=10**6)]
    predictor: str
    cosine: Number | None
    loss_increase: Number
    relative_error: Number | None
    images: Count
    eps: Number


D = TypeVar("D", bound=Document)


def read_sweep(path: Path) -> Sweep:
    """A sweep.json. Raises ConadvError."""
    try:
        values = parse_json(read_text(path, JSON_BYTES))
    except (OSError, ValueError) as error:
        raise ConadvError(
            f"{printable(path)} is not a readable sweep: {printable(error)}. Run `conadv sweep` again to go on."
        ) from error
    return checked(
        Sweep,
        values,
        path,
        "Is it of a sweep? `conadv sweep` writes it anew; otherwise leave it out.",
    )


def probes(lines: Iterable[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The lines of type probe among those of the record ``path``. Raises ConadvError."""
    found = [line for line in lines if line["type"] == "probe"]
    for line in found:
        checked(Probe, line, path, "Take its probe lines out, or leave the run out.")
    return found


def checked(kind: type[D], values: Any, path: Path, remedy: str) -> D:
    """``values`` of the JSON file ``path`` as a ``kind``.

    Raises ConadvError that names the file, the first field that is wrong and what stands there, and ends in ``remedy``.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        given = printable(repr(first.get("input"))[:80])
        raise ConadvError(
            f"{printable(path)} is not what conadv writes: {printable(field)[:200]} is {given}: {first['msg']}. "
            f"{remedy}"
        ) from error
