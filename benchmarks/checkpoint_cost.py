"""What saving costs the steps beside it: no saving, saving on the training thread, saving in the background.

python benchmarks/checkpoint_cost.py [--every 20] [--rounds 5] [--batch 64] [--threads 1] [--out FILE.json]

ResNet-18 on random 32x32 images with LARS: a state of about 90 MB. The arms take turns, ``--every`` steps at a time
with one checkpoint at the beginning of each turn; a turn ends when its last step does, so that what is still being
written by then counts for nobody (it is waited for, and reported, apart). With every core in use by the steps, a
background write takes their time: leave it one (``--threads``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torchvision.models import resnet18

from conadv import LARS, PixelSpace, TrainStep, record
from conadv.writer import Writer

ARMS = ("none", "foreground", "background")


def turn(engine: TrainStep, batch: Any, every: int, writer: Writer | None) -> tuple[float, float, float]:
    """Seconds of the steps with the save in it, of the call that saves, and of the wait afterwards."""
    begin = time.perf_counter()
    if writer is not None:
        state = {"model": engine.model.state_dict(), "optimizer": engine.optimizer.state_dict()}
        writer.save(engine.version, state)
    saved = time.perf_counter()
    for _ in range(every):
        engine(batch)
    end = time.perf_counter()
    if writer is not None:
        writer.wait()
    return end - begin, saved - begin, time.perf_counter() - end


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    engine = TrainStep(model, LARS(model.parameters(), 0.1), space=PixelSpace((0.0,), (1.0,)))
    batch = torch.rand(options.batch, 3, 32, 32), torch.arange(options.batch) % 10
    turns: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        writers = {arm: Writer(Path(folder) / arm, 1, background=arm == "background") for arm in ARMS[1:]}
        for _ in range(options.rounds + 1):
            for arm in ARMS:
                turns[arm].append(turn(engine, batch, options.every, writers.get(arm)))
        size = sum(file.stat().st_size for file in (Path(folder) / "background").iterdir())
    turns = {arm: found[1:] for arm, found in turns.items()}  # the first round warms up
    steps = {arm: statistics.median(total for total, _, _ in found) / options.every for arm, found in turns.items()}
    shares = {
        arm: statistics.median(t[0] / n[0] - 1 for t, n in zip(turns[arm], turns["none"], strict=True)) for arm in ARMS
    }
    return {
        "bench": "checkpoint_cost",
        "time": record.now(),
        "versions": record.versions(),
        "machine": record.machine("cpu", options.threads),
        "git": record.git_state(),
        "every": options.every,
        "rounds": options.rounds,
        "global_batch_size": options.batch,
        "checkpoint_bytes": size,
        "step_seconds": steps,
        "added_to_a_step": shares,
        "spread": {
            arm: [round(t[0] / n[0] - 1, 4) for t, n in zip(turns[arm], turns["none"], strict=True)] for arm in ARMS
        },
        "call_seconds": {arm: statistics.median(call for _, call, _ in turns[arm]) for arm in ARMS[1:]},
        "wait_seconds": {arm: statistics.median(wait for _, _, wait in turns[arm]) for arm in ARMS[1:]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=20, help="steps per checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = measure(options)
    print(json.dumps(found, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
