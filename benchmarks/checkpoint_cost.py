"""What saving costs the steps beside it: no saving, saving on the training thread, saving in the background.

python benchmarks/checkpoint_cost.py [--every 50] [--turn 10] [--rounds 60] [--threads 1] [--out FILE.json]

ResNet-18 on random 32x32 images with LARS and conadv: a state of about 90 MB. The arms take turns of ``--turn`` steps,
in an order drawn anew each round, with one checkpoint at the beginning of a turn. A turn ends when its last step does;
a checkpoint that is then still being written has not paid for all of itself: such turns are counted, and with any of
them there is no verdict (give longer turns). ``seconds_of_a_checkpoint`` is what one adds to all steps of its turn;
``added_to_a_step`` is the same as a share of ``--every`` steps of that round without a checkpoint. Turns are short
since the machine's own changes of speed grow with them, and what a checkpoint costs does not. With every core in use by
the steps, a background write takes their time: leave it one (``--threads``).
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torchvision.models import resnet18

from conadv import FGSM, LARS, Concurrent, PixelSpace, TrainStep, split_batchnorm
from conadv.planning.timing import median_interval
from conadv.training.allocator import keep_freed_memory
from conadv.training.provenance import git_state, machine, now, versions
from conadv.training.writer import Writer

ARMS = ("none", "foreground", "background")
LIMIT = 0.02  # what a background checkpoint may add to the steps between it and the next one


@dataclass
class Options:
    every: int = 50
    """Steps per checkpoint."""
    turn: int = 10
    """Steps of a turn."""
    rounds: int = 60
    batch: int = 64
    threads: int = 1
    out: Path | None = None


@dataclass(frozen=True)
class Turn:
    """Seconds of the steps with the save in it, of the call that saves, and of the wait afterwards."""

    total: float
    call: float
    wait: float

    @property
    def unfinished(self) -> bool:
        return self.wait > 0.001 * self.total


def turn(engine: TrainStep, batch: Any, steps: int, writer: Writer | None) -> Turn:
    begin = time.perf_counter()
    if writer is not None:  # what a run saves: weights, optimizer state, images that wait
        parts = {"model": engine.model, "optimizer": engine.optimizer, "engine": engine}
        writer.save(engine.version, {name: part.state_dict() for name, part in parts.items()})
    saved = time.perf_counter()
    for _ in range(steps):
        engine(batch, batch)
    end = time.perf_counter()
    if writer is not None:
        writer.wait()
    return Turn(end - begin, saved - begin, time.perf_counter() - end)


def measure(options: Options) -> dict[str, Any]:
    keep_freed_memory()  # as the program does
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    space = PixelSpace((0.0,), (1.0,))
    model = split_batchnorm(resnet18(num_classes=10), "adv")
    method = Concurrent(FGSM(4 / 255, space=space))
    engine = TrainStep(model, LARS(model.parameters(), 0.1), method, space=space)
    batch = torch.rand(options.batch, 3, 32, 32), torch.arange(options.batch) % 10
    turns: dict[str, list[Turn]] = {arm: [] for arm in ARMS}
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folders = {arm: Path(name) / arm for arm in ARMS[1:]}
        writers = {
            arm: Writer(folder, 1, background=arm == "background")
            for arm, folder in folders.items()
        }
        for _ in range(options.rounds + 1):
            for arm in order.sample(ARMS, len(ARMS)):
                turns[arm].append(turn(engine, batch, options.turn, writers.get(arm)))
        size = sum(file.stat().st_size for file in folders["background"].iterdir())
    turns = {arm: found[1:] for arm, found in turns.items()}  # the first round warms up
    facts = {"time": now(), "versions": versions(), "git": git_state(), "checkpoint_bytes": size}
    facts |= {"machine": machine("cpu", options.threads), "options": asdict(options)}
    return facts | costs(turns, options.turn, options.every)


def costs(turns: Mapping[str, Sequence[Turn]], steps: int, every: int) -> dict[str, Any]:
    """What saving adds to ``steps`` steps of a round, with intervals of the median; and whether the promise is kept.

    "under_limit" is true or false where the whole interval of the background's share is below or above ``LIMIT``, and
    null where it is not, or where a turn ended before its checkpoint was written.
    """
    none = [each.total for each in turns["none"]]
    added = {
        arm: [each.total - n for each, n in zip(turns[arm], none, strict=True)] for arm in ARMS[1:]
    }
    shares = {  # of the time from one checkpoint to the next
        arm: median_interval([x / (n / steps * every) for x, n in zip(extra, none, strict=True)])
        for arm, extra in added.items()
    }
    unfinished = sum(each.unfinished for each in turns["background"])
    share = shares["background"]
    sure = not unfinished and not share.low <= LIMIT <= share.high
    seconds = {arm: median_interval(values)._asdict() for arm, values in added.items()}
    return {
        "step_seconds": {
            arm: statistics.median(each.total for each in found) / steps
            for arm, found in turns.items()
        },
        "added_to_a_step": {arm: interval._asdict() for arm, interval in shares.items()},
        "seconds_of_a_checkpoint": seconds,
        "unfinished_turns": unfinished,
        "limit": LIMIT,
        "under_limit": share.high < LIMIT if sure else None,
        "turns": {arm: [asdict(each) for each in found] for arm, found in turns.items()},
    }


if __name__ == "__main__":
    options = tyro.cli(Options)
    text = json.dumps(measure(options), indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
