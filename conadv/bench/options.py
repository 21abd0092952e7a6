"""The options of each benchmark. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from conadv.config.schema import AugmentName, OptimizerName
from conadv.errors import ConadvError, printable

MethodName = Literal[
    "vanilla",
    "multiview",
    "noise",
    "disadv",
    "conadv",
    "conadv-lookahead",
    "recycle",
    "noise-busy",
    "plain",
    "ddp",
]
ExecutorName = Literal["inline", "stream", "ranks"]
CompileMode = Literal["off", "default", "reduce-overhead", "max-autotune"]
CONCURRENT = ("conadv", "conadv-lookahead")


@dataclass
class BenchArgs:
    """What all benchmarks have in common."""

    rounds: int = 10
    """Rounds at least; each runs every case once, in a random order."""
    seconds: float = 0.0
    """Go on with further rounds until this much time is spent."""
    threads: int = 1
    """CPU threads of torch in each process."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    seed: int = 0
    """Of the order of the cases."""
    system_allocator: bool = False
    """Let glibc give freed memory back to the system (the program keeps it)."""
    out: Path | None = None
    """Write the result as JSON here."""

    def check(self) -> None:
        """Raise ConadvError for options that cannot be meant."""
        for name in ("rounds", "threads"):
            _at_least(name, getattr(self, name), 1)
        if self.out is not None and self.out.is_dir():
            raise ConadvError(
                f"--out {printable(self.out)} is a folder. Name a file, such as {printable(self.out / 'bench.json')}."
            )

    def facts(self) -> dict[str, Any]:
        """The options as plain values; of a path only its name, since folders belong to one machine."""
        values = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name != "out"
        }
        return {
            name: value.name if isinstance(value, Path) else value for name, value in values.items()
        }


@dataclass
class AttackCostArgs(BenchArgs):
    """Time of a training step by method, beside `noise`: the same views and gradients without an attack.

    Under torchrun each rank trains on its share; with --attack-ranks M, M of the ranks only attack. A case is timed in
    bursts of consecutive steps, since an adversarial batch is made steps ahead of its use.
    """

    methods: tuple[MethodName, ...] = (
        "vanilla",
        "noise",
        "disadv",
        "conadv",
        "conadv-lookahead",
        "recycle",
    )
    """Also multiview, noise-busy (noise while the attack ranks attack for nobody), and vanilla in a loop of one's own:
    plain (one rank) and ddp (torch's DistributedDataParallel, several ranks)."""
    batches: tuple[int, ...] = (64,)
    """Clean images per rank and step."""
    executors: tuple[ExecutorName, ...] | None = None
    """How conadv's attack runs: inline, stream (CUDA), ranks. Default: inline, and ranks if there are attack ranks."""
    attack_ranks: int = 0
    """Ranks of the world that only attack; the others learn, and noise runs on these learners alone."""
    overlap: Literal["on", "off", "both"] = "on"
    """Whether gradients leave for the other ranks while backward still runs."""
    model: str = "resnet20"
    """A network for small images (resnet8 to resnet56) or a torchvision classifier."""
    width: int | None = None
    """Channels of the first stage of the networks for small images."""
    image_size: int = 32
    channels: int = 3
    classes: int = 10
    optimizer: OptimizerName = "sgd"
    staleness: int = 1
    """tau of conadv."""
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: CompileMode = "off"
    """torch.compile's mode for the model."""
    burst: int = 6
    """Consecutive steps of one case, of which the first `dropped` are not timed."""
    dropped: int = 2
    comm_timeout: float = 120.0
    """Seconds after which a rank that does not answer ends the others."""

    def check(self) -> None:
        super().check()
        _at_least("staleness", self.staleness, 1)
        _at_least("attack-ranks", self.attack_ranks, 0)
        for size in self.batches:
            _at_least("batches", size, 1)
        if not 1 <= self.dropped < self.burst:
            raise ConadvError(
                f"--dropped {self.dropped} must be 1 or more (the first step after another case is not like the "
                f"others) and less than --burst {self.burst}."
            )
        if not self.methods or not self.batches:
            raise ConadvError("Name at least one method (--methods) and one batch (--batches).")
        if "ranks" in self.how() and not self.attack_ranks:
            raise ConadvError("--executors ranks needs --attack-ranks M, under torchrun.")
        if "stream" in self.how() and self.device == "cpu":
            raise ConadvError("--executors stream needs a CUDA device: give --device cuda.")
        if "noise-busy" in self.methods and not self.attack_ranks:
            raise ConadvError(
                "noise-busy keeps attack ranks busy: it needs --attack-ranks M, under torchrun."
            )

    def how(self) -> tuple[ExecutorName, ...]:
        """The executors to measure."""
        if self.executors is not None:
            return self.executors
        return ("inline", "ranks") if self.attack_ranks else ("inline",)


@dataclass
class EngineArgs(BenchArgs):
    """TrainStep against a loop written by hand that does the same arithmetic.

    The loop has the same forward, backward, attack and optimizer; no clock, no check for non-finite numbers, no keyed
    randomness.
    """

    rounds: int = 20


@dataclass
class NormArgs(BenchArgs):
    """A forward and backward pass of two halves through split batch norm, beside the same images through plain ones.

    Also two plain passes, and timm's split batch norm where timm is installed.
    """

    rounds: int = 20


@dataclass
class OptimArgs(BenchArgs):
    """Time of an optimizer step on ResNet-50's parameters, beside torch's and timm's optimizers.

    The yardstick is torch's fused SGD for LARS and SGD, torch's fused AdamW for LAMB and AdamW. Norm and bias
    parameters have neither weight decay nor trust ratio in any of them (timm's see that from weight_decay=0).
    """

    rounds: int = 15
    threads: int = 2


@dataclass
class DataArgs(BenchArgs):
    """Images per second and peak memory of the loader, beside a plain DataLoader with the same torchvision transforms.

    Without --data, `folder` and `cifar10` read images made at random in a temporary folder. To see what a training step
    leaves of it, give the step's --accumulation and the seconds that it computes as --pause: workers read on meanwhile.
    """

    rounds: int = 5
    source: Literal["digits", "cifar10", "folder"] = "folder"
    data: Path | None = None
    """Image folder DIR/{train,test}/<class>/*."""
    augment: AugmentName = "basic"
    batch: int = 64
    """Images of a micro-batch."""
    accumulation: int = 1
    """Micro-batches that are taken at once, as a training step takes those of one rank."""
    pause: float = 0.0
    """Seconds after each accumulation in which nothing is taken, as while a step computes; part of the time."""
    images: int = 1024
    """Images that are timed in each round, once the loader is running."""
    image_size: int | None = None
    """Default: 224 for folder, the images' own size otherwise."""
    num_workers: int = 0
    photo_size: int = 256
    """Height and width of the images made where no --data is given."""

    @property
    def step(self) -> int:
        """Images that are taken at once."""
        return self.batch * self.accumulation

    def check(self) -> None:
        super().check()
        for name in ("batch", "accumulation", "images"):
            _at_least(name, getattr(self, name), 1)
        _at_least("num-workers", self.num_workers, 0)
        _at_least("pause", self.pause, 0)
        if self.data is not None and self.source == "digits":
            raise ConadvError("--data has no effect with --source digits. Leave it out.")


def _at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise ConadvError(f"--{name} {value} must be {least} or more.")
