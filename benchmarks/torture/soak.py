"""One long training with evaluations, checkpoints and a reader of its record: nothing may grow.

Memory, file descriptors and threads of the process are sampled from outside. Flat means: the
Theil-Sen slope of the second half, over that half, is below LIMITS. A shorter control run leaks all
three on purpose and must be found. Meanwhile the record is read as it is written: every line that
ends must be whole.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conadv.cli.watch import RunState

from .lives import CONTEXT

LIMITS = {"memory": 4 * 2**20, "descriptors": 1.0, "threads": 1.0}
"""Growth that is still flat: bytes; counts, which a background write changes by one for a moment.
"""
SEED = 7
SLOPES = 20_000  # pairs of samples that a slope is taken from
FULL = {"steps": 20_000, "control": 2_000, "period": 100, "every": 0.5}
SHORT = {"steps": 300, "control": 200, "period": 30, "every": 0.02}
Sample = tuple[int, float, float, float]  # step, and what LIMITS names


def _leak(bytes_per_step: int) -> None:
    """Have every step keep memory, and every tenth a file descriptor and a thread."""
    from conadv.engine.step import TrainStep

    update, kept = TrainStep.update, []

    def leaking(engine: TrainStep) -> Any:
        kept.append(os.urandom(bytes_per_step))
        if len(kept) % 10 == 0:
            os.open(os.devnull, os.O_RDONLY)
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        return update(engine)

    TrainStep.update = leaking  # type: ignore[method-assign]


def _train(steps: int, period: float, out: str, leaked: int) -> None:
    """What the process does: steps of some milliseconds, ten of which are an epoch."""
    from conadv.cli.program import main

    if leaked:
        _leak(leaked)
    options = (
        f"--method conadv --staleness 2 --global-batch-size 32 --steps {steps} --model.width 4 "
        "--data.train-images 320 --optim.lr 1 --schedule.warmup-epochs 0.5 --eval.robust-images 0 "
        f"--eval.train-images 100 --eval.every-epochs {period / 10} --threads 1 --quiet "
        f"--checkpoint.every-epochs {period / 10} --checkpoint.background --out {out}"
    )
    os._exit(main(["train", "digits", *options.split()]))


def sample(pid: int, step: int) -> Sample:
    """What a process holds now (Linux). OSError when it has ended."""
    folder = Path(f"/proc/{pid}")
    resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    threads = int((folder / "stat").read_text().rpartition(")")[2].split()[17])
    return step, resident, sum(1 for _ in (folder / "fd").iterdir()), threads


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """What each of LIMITS has grown by in the second half of the steps: the median slope of pairs
    times the half.
    """
    last = samples[-1][0]
    half = [each for each in samples if each[0] >= last / 2]
    draw = random.Random(SEED)
    pairs = [(a, b) for a, b in (draw.sample(half, 2) for _ in range(SLOPES)) if a[0] != b[0]]
    found = {}
    for place, name in enumerate(LIMITS, start=1):
        slopes = [(b[place] - a[place]) / (b[0] - a[0]) for a, b in pairs]
        found[name] = statistics.median(slopes) * (last - half[0][0])
    return found


def not_flat(grown: dict[str, float]) -> list[str]:
    return [name for name, limit in LIMITS.items() if grown[name] >= limit]


def watch(
    steps: int, form: dict[str, float], out: Path, leaked: int
) -> tuple[list[Sample], RunState]:
    """Train in another process; returns samples and what `conadv watch` saw of the record."""
    shutil.rmtree(out, ignore_errors=True)
    reader, samples = RunState(out), list[Sample]()
    process = CONTEXT.Process(target=_train, args=(steps, form["period"], str(out), leaked))
    process.start()
    try:
        while process.is_alive():
            process.join(form["every"])
            reader.update()
            assert reader.counts["broken"] == 0, "a line of the record was not whole"
            if 0 < reader.done < steps:  # the last evaluation is another thing
                try:
                    samples.append(sample(process.pid or 0, reader.done))
                except OSError:
                    break
    finally:
        process.join(60)
        process.kill()
    assert process.exitcode == 0, f"the run ended with {process.exitcode}"
    reader.update()
    return samples, reader


def run(short: bool, out: Path) -> dict[str, Any]:
    """A soak that was cut off begins again: it is one run."""
    form = SHORT if short else FULL
    steps, control_steps = int(form["steps"]), int(form["control"])
    leaked = 6 * LIMITS["memory"] // control_steps
    control = growth(watch(control_steps, form, out / "control", int(leaked))[0])
    assert not_flat(control) == list(LIMITS), f"a leak on purpose was not found: {control}"
    samples, reader = watch(steps, form, out / "soak", 0)
    grown = growth(samples)
    assert not not_flat(grown), f"{not_flat(grown)} grew in the second half: {grown}"
    seen = reader.done, reader.counts["step"], reader.counts["broken"]
    assert seen == (steps, steps, 0), f"the reader missed or repeated a step: {seen}"
    return {
        "seed": SEED,
        "steps": steps,
        "evaluations_and_checkpoints": int(steps // form["period"]),
        "samples": len(samples),
        "limits_of_growth": LIMITS,
        "growth_in_the_second_half": grown,
        "at_the_end": dict(zip(LIMITS, samples[-1][1:], strict=True)),
        "control_growth": control,
    }
