"""What was measured, as a JSON file that is checked when it is read. Times in seconds, sizes in bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from conadv.errors import ConadvError, printable, unknown
from conadv.safe_io import JSON_BYTES, read_text
from conadv.training.record import write_atomic

FORMAT = 1
Seconds = Annotated[float, Field(gt=0)]
SecondsOrNone = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """Frozen; an unknown key, a wrong type, an infinity or a NaN is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Point(Part):
    """Medians of one step with one micro-batch on one process, all processes of the host busy."""

    micro_batch: Count
    """Clean images."""
    gradient: Seconds
    """Forward and backward of all views."""
    attack: SecondsOrNone
    """Making the extra images: attack, noise, or recycle's perturbation."""
    rest: Seconds
    """Everything else of the step: the update, reading back the losses, the engine."""


class Bucket(Part):
    """Gradients that travel together."""

    bytes: Count
    ready: Annotated[float, Field(ge=0, le=1)]
    """When they are final, as a share of the step's last forward-backward pass; 0: before it begins."""


class Measured(Part):
    """One method's points, in order of micro_batch."""

    points: tuple[Point, ...] = Field(min_length=1)
    passes: Count
    """Forward-backward passes per micro-batch: the views, or 1 where they are fused."""
    buckets: tuple[Bucket, ...] = Field(min_length=1)
    """In the order in which they leave."""

    @model_validator(mode="after")
    def _ordered(self) -> Measured:
        sizes = [point.micro_batch for point in self.points]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"points must have rising, different micro_batch, not {sizes}")
        return self


class Sizes(Part):
    """Bytes of one process."""

    weights: Count
    optimizer_state: Bytes
    image: Count
    """One image as the model takes it."""
    activations_per_image: Bytes
    """What autograd keeps of the forward pass of one image until backward."""
    memory: Count
    """Memory of the device, or the process's share of the host's."""


class LinkSample(Part):
    """One timed operation between ranks."""

    bytes: Count
    seconds: Seconds


class Link(Part):
    """The network between ranks."""

    ranks: Annotated[int, Field(ge=2)]
    """Ranks that measured it."""
    algorithm: Literal["ring", "ring-or-tree"]
    """What the backend does for an all-reduce: gloo a ring; NCCL a ring or a double binary tree."""
    seconds_per_byte: Seconds
    """Of the bytes that a rank sends in an all-reduce, 2 (N - 1) / N times the tensor for a ring."""
    latency: SecondsOrNone
    """Seconds per step of an all-reduce; a ring has 2 (N - 1)."""
    busy_seconds_per_byte: SecondsOrNone
    """Processor time that a rank's own work loses per byte that it sends while it works."""
    point_seconds_per_byte: Seconds
    """A message from one rank to another."""
    point_latency: SecondsOrNone
    all_reduce: tuple[LinkSample, ...] = ()
    point_to_point: tuple[LinkSample, ...] = ()


class Workload(Part):
    """What was run."""

    model: str
    width: int | None = None
    args: tuple[str, ...] = ()
    """model.args. Profiles that do not name them were measured without any."""
    image_size: Count
    channels: Count
    num_classes: Count
    optimizer: str
    precision: Literal["fp32", "bf16"]
    channels_last: bool


class Profile(Part):
    """A machine and a workload, measured. Everything that a plan needs."""

    format: Literal[1]
    workload: Workload
    device: Literal["cpu", "cuda"]
    processes: Count
    """Processes per host that were busy while the points were taken."""
    threads: Count
    methods: dict[str, Measured]
    sizes: Sizes
    copy_seconds_per_byte: Seconds
    """Copying gradients or weights into a flat buffer."""
    link: Link | None = None
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    git: dict[str, Any] | None = None
    measured_at: str = ""

    def measured(self, name: str) -> Measured:
        """A method's points; ConadvError where it was not measured."""
        if name not in self.methods:
            raise ConadvError(
                f"The profile has no points of {name!r}, only of {', '.join(sorted(self.methods))}. "
                "Measure again: conadv plan PROFILE.json --measure phases."
            )
        return self.methods[name]


def load(path: Path) -> Profile:
    """Read a profile. Raises ConadvError that names the file, the key and what is wrong with it."""
    try:
        return Profile.model_validate_json(read_text(path, JSON_BYTES))
    except (OSError, UnicodeDecodeError) as error:
        raise ConadvError(
            f"Cannot read the profile {printable(path)}: {error}. Measure one: conadv plan {printable(path)} "
            "--measure all."
        ) from error
    except ValidationError as error:
        raise _explain(error, path) from error


def save(profile: Profile, path: Path) -> None:
    """Write a profile so that :func:`load` reads it back equal; atomic."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(profile.model_dump(mode="json"), indent=1) + "\n")


def _explain(error: ValidationError, path: Path) -> ConadvError:
    """The first of pydantic's errors as one line."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "json_invalid":
        return ConadvError(f"The profile {printable(path)} is not JSON: {first['ctx']['error']}.")
    if first["type"] == "extra_forbidden":
        known = (name for part in Part.__subclasses__() for name in part.model_fields)
        return ConadvError(
            f"The profile {printable(path)}: {unknown('key', where.rpartition('.')[2], known)} (in {where})"
        )
    if first["type"] == "missing":
        return ConadvError(
            f"The profile {printable(path)} has no {where}. Measure it again: conadv plan PROFILE.json --measure all."
        )
    if where == "format":
        return ConadvError(
            f"The profile {printable(path)} has format {first['input']!r}, this version reads {FORMAT}. Measure again."
        )
    return ConadvError(
        f"The profile {printable(path)}: {where} = {first['input']!r:.60}: {first['msg']}."
    )
