"""What was measured, as a JSON file that is checked when it is read. Seconds and bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from conadv.errors import ConadvError, printable
from conadv.safe_io import Document, read_document, write_atomic

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
PAYLOAD = 1448 / 1514
"""Share of an Ethernet frame that carries data (TCP over IPv4 with timestamps)."""


class Part(Document):
    """Frozen; a missing key, a wrong type, an infinity or a NaN is an error."""

    model_config = ConfigDict(strict=False)  # JSON has lists for tuples


class Point(Part):
    """Medians of one step with one micro-batch, while all processes of the host work.

    gradient: forward and backward of all views. attack: making the extra images. rest: everything
    else (the update, reading back the losses, the engine). micro_batch: clean images.
    """

    micro_batch: Count
    gradient: Positive
    attack: NotNegative
    rest: Positive


class Bucket(Part):
    """Gradients that travel together. ready: when they are final, a share of the last pass."""

    bytes: Count
    ready: Annotated[float, Field(ge=0, le=1)]


class Measured(Part):
    """One method: points by rising micro-batch, buckets in the order in which they leave.

    passes: forward-backward passes per micro-batch, one per view, or 1 where views are fused.
    """

    points: tuple[Point, ...] = Field(min_length=1)
    passes: Count
    buckets: tuple[Bucket, ...] = Field(min_length=1)

    @field_validator("points")
    @classmethod
    def _ordered(cls, points: tuple[Point, ...]) -> tuple[Point, ...]:
        sizes = [point.micro_batch for point in points]
        if sizes != sorted(set(sizes)):
            raise ValueError("points must have rising, different micro_batch")
        return points


class Sizes(Part):
    """Bytes of one process.

    image: one image as the model takes it. activations_per_image: what autograd keeps of one image
    from its forward pass until backward. memory: of the device, or the process's share of the
    host's.
    """

    weights: Count
    optimizer_state: Bytes
    image: Count
    activations_per_image: Bytes
    memory: Count


class Link(Part):
    """The network between ``ranks`` ranks, as measured by all-reduces.

    algorithm: gloo has a ring, NCCL a ring or a double binary tree. seconds_per_byte: per byte that
    a rank sends; latency: per step of the algorithm. busy_seconds_per_byte: what a rank's own work
    loses per byte that it sends meanwhile.
    """

    ranks: Annotated[int, Field(ge=2)]
    algorithm: Literal["ring", "ring-or-tree"]
    seconds_per_byte: Positive
    latency: NotNegative
    busy_seconds_per_byte: NotNegative


class Workload(Part):
    """What was run: a network, its images and its optimizer."""

    model: str
    width: int | None = None
    args: tuple[str, ...] = ()
    image_size: Count
    channels: Count
    num_classes: Count
    optimizer: str
    precision: Literal["fp32", "bf16"]
    channels_last: bool


class Profile(Part):
    """A machine and a workload, measured: everything that a plan needs.

    processes: per host, all at work while the points were taken.
    """

    format: Literal[1]
    workload: Workload
    device: Literal["cpu", "cuda"]
    processes: Count
    threads: Count
    methods: dict[str, Measured]
    sizes: Sizes
    link: Link | None = None
    machine: dict[str, Any] = Field({})
    versions: dict[str, str] = Field({})
    git: dict[str, Any] | None = None
    measured_at: str = ""

    def measured(self, name: str) -> Measured:
        """A method's points. Raises ConadvError where it was not measured."""
        if name not in self.methods:
            raise ConadvError(
                f"The profile has no points of {name!r}, only of {', '.join(sorted(self.methods))}."
                " Measure again: conadv plan PROFILE.json --measure phases."
            )
        return self.methods[name]


def load(path: Path) -> Profile:
    """Read a profile. Raises ConadvError that names the file, the key and what is wrong with it."""
    remedy = f"Measure a profile: conadv plan {printable(path)} --measure all."
    return read_document(Profile, path, remedy)


def save(profile: Profile, path: Path) -> None:
    """Write a profile so that :func:`load` reads it back equal; atomic."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(profile.model_dump(mode="json"), indent=1) + "\n")


def link_of(profile: Profile, gbit: float | None, latency_us: float | None) -> Link | None:
    """The profile's link with what the user gave in its place.

    ``gbit`` is the rate of the wire, of which PAYLOAD carries data. Where processors move the bytes
    themselves, no link is faster than they are.
    """
    if gbit is None and latency_us is None:
        return profile.link
    if profile.link is None and (gbit is None or latency_us is None):
        raise ConadvError(
            "The profile has no link: give both --link-gbit and --latency-us, or measure it with "
            "--measure link."
        )
    if (gbit is not None and gbit <= 0) or (latency_us is not None and latency_us < 0):
        raise ConadvError("--link-gbit must be more than 0, and --latency-us at least 0.")
    algorithm = "ring-or-tree" if profile.device == "cuda" else "ring"
    link = profile.link or Link(
        ranks=2, algorithm=algorithm, seconds_per_byte=1.0, latency=0.0, busy_seconds_per_byte=0.0
    )
    changes = {}
    if gbit is not None:
        changes["seconds_per_byte"] = max(8e-9 / gbit / PAYLOAD, link.busy_seconds_per_byte)
    if latency_us is not None:
        changes["latency"] = latency_us * 1e-6
    return link.model_copy(update=changes)
