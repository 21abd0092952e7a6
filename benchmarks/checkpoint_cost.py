"""What saving costs the steps beside it: no saving, saving on the training thread, saving in the
background.

    python benchmarks/checkpoint_cost.py [--turn 10] [--rounds 60] [--threads 1] [--out FILE.json]

ResNet-18 on random 32x32 images with LARS and conadv: a state of about 90 MB. A case is a turn of
``--turn`` steps with one checkpoint at its beginning, and ends when that is written. With a
checkpoint every 50 steps, a fifth of what the ratio to "none" is above 1 comes on top of a step.
Longer turns would meet more of the machine's own changes of speed. With every core in use by the
steps, a background write takes their time: leave it one (``--threads``).
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torchvision.models import resnet18

from conadv import FGSM, LARS, Comm, Concurrent, PixelSpace, TrainStep, split_batchnorm
from conadv.cli.bench import BenchArgs, prepare, show, write
from conadv.planning.timing import Case, Sample, measure
from conadv.training.writer import Writer


@dataclass
class Args(BenchArgs):
    rounds: int = 60
    turn: int = 10
    """Steps of a turn."""
    batch: int = 64


def turn(engine: TrainStep, batch: Any, steps: int, writer: Writer | None) -> Sample:
    """Save what a run saves (weights, optimizer, images that wait), then take the steps."""
    begin = time.perf_counter()
    if writer is not None:
        parts = {"model": engine.model, "optimizer": engine.optimizer, "engine": engine}
        writer.save(engine.version, {name: part.state_dict() for name, part in parts.items()})
    for _ in range(steps):
        engine(batch, batch)
    if writer is not None:
        writer.wait()
    return Sample(time.perf_counter() - begin)


def main() -> None:
    args = tyro.cli(Args)
    prepare(args)
    torch.manual_seed(0)
    space = PixelSpace((0.0,), (1.0,))
    model = split_batchnorm(resnet18(num_classes=10), "adv")
    method = Concurrent(FGSM(4 / 255, space=space))
    engine = TrainStep(model, LARS(model.parameters(), 0.1), method, space=space)
    batch = torch.rand(args.batch, 3, 32, 32), torch.arange(args.batch) % 10
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writers = {
            "none": None,
            "foreground": Writer(folder / "a", 1, background=False),
            "background": Writer(folder / "b", 1, background=True),
        }
        cases = {
            name: Case(partial(turn, engine, batch, args.turn, writer), "none")
            for name, writer in writers.items()
        }
        rows = [asdict(row) for row in measure(cases, args.rounds, Comm())]
        size = sum(file.stat().st_size for file in (folder / "b").iterdir())
    show(rows)
    write("checkpoint-cost", args, Comm(), rows, checkpoint_bytes=size)


if __name__ == "__main__":
    main()
