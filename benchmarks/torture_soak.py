"""One long training with evaluations, checkpoints, a progress display and a reader of its record: nothing may grow.

Memory, file descriptors and threads of the process are sampled from outside. Flat means: the Theil-Sen slope of the
second half, over that half, is below ``LIMITS``. A shorter control run leaks all three on purpose and must be found.
Meanwhile the record is read as it is written: every line that ends must be whole. The display is on and off by turns of
so many steps as lie between two checkpoints; what it adds to a step is the median over pairs of turns.
"""

from __future__ import annotations

import json
import os
import pty
import random
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .lives import CONTEXT

LIMITS = {"memory": 4 * 2**20, "descriptors": 1.0, "threads": 1.0}
"""Growth in the second half that is still flat: bytes; counts, which a background write changes by one for a moment."""
MOST_DISPLAY = 0.005  # of the time: what the display may compute
SEED = 7
SLOPES = 20_000  # pairs of samples that a slope is taken from


@dataclass(frozen=True)
class Form:
    """``period``: steps from one evaluation and checkpoint to the next; ``every``: seconds between samples."""

    steps: int
    control_steps: int
    period: int
    every: float


FULL = Form(20_000, 2_000, 100, 0.5)
SHORT = Form(300, 200, 30, 0.02)


def settings(steps: int, period: int) -> Any:
    """A step of some milliseconds; ten steps are an epoch."""
    from conadv.config import recipes
    from conadv.config.schema import replace

    return replace(
        recipes.get("digits"),
        method="conadv",
        staleness=2,
        global_batch_size=32,
        epochs=None,
        steps=steps,
        data__train_images=320,
        model__width=4,
        optim__lr=1.0,
        schedule__warmup_epochs=0.5,
        eval__every_epochs=period / 10,
        eval__robust_images=0,
        eval__train_images=100,
        checkpoint__every_epochs=period / 10,
        checkpoint__background=True,
    )


# ---- in the process that trains


def turns_of(period: int) -> Any:
    """An observer that shows the display every second ``period`` of steps, and notes the mean step of each period.

    ``busy``: the seconds that the display computed, on the training's thread and on its own, while it was shown for
    ``wall``: under one interpreter lock, the most that it can take from the steps.
    """
    from conadv.cli.progress import Live

    class Turns(Live):
        def __init__(self) -> None:
            super().__init__()
            self._busy: list[list[float]] = []  # one sum per function, each of one thread
            self._bar.live.refresh = self._counted(self._bar.live.refresh)  # type: ignore[method-assign]
            self._show = self._counted(super().step)
            self.wall = 0.0
            self.shown = True
            self.means: list[tuple[bool, float]] = []
            self._seconds: list[float] = []
            self._last: float | None = None

        @property
        def busy(self) -> float:
            return sum(each[0] for each in self._busy)

        def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
            tally = [0.0]
            self._busy.append(tally)

            def counted(*args: Any, **options: Any) -> Any:
                begin = time.thread_time()
                try:
                    return function(*args, **options)
                finally:
                    tally[0] += time.thread_time() - begin

            return counted

        def step(self, record: Any) -> None:
            self._show(record) if self.shown else None
            now = time.perf_counter()
            if self._last is not None:
                self._seconds.append(now - self._last)
            self._last = now
            if (record.step + 1) % period == 0:
                self._turn()

        def _turn(self) -> None:
            """The next step's time, with the evaluation and the checkpoint in it, is left out."""
            self.wall += sum(self._seconds) if self.shown else 0.0
            if self._seconds:
                self.means.append((self.shown, statistics.fmean(self._seconds)))
            self._seconds, self._last = [], None
            self.shown = not self.shown
            self._bar.start() if self.shown else self._bar.stop()

    return Turns()


def leak(bytes_per_step: int) -> None:
    """Have every step keep memory, and every tenth a file descriptor and a thread."""
    from conadv.engine.step import TrainStep

    update, kept, calls = TrainStep.update, [], [0]

    def leaking(engine: TrainStep) -> Any:
        calls[0] += 1
        kept.append(os.urandom(bytes_per_step))
        if calls[0] % 10 == 0:
            os.open(os.devnull, os.O_RDONLY)
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        return update(engine)

    TrainStep.update = leaking  # type: ignore[method-assign]


def _train(form: Form, steps: int, out: str, terminal: str, leaked: int) -> None:
    """What the process does."""
    os.environ["TERM"] = "xterm-256color"
    screen = os.open(terminal, os.O_WRONLY | os.O_NOCTTY)
    os.dup2(screen, 1)
    os.close(screen)
    import torch

    from conadv.training.allocator import keep_freed_memory
    from conadv.training.loop import train

    keep_freed_memory()  # as the program does
    torch.set_num_threads(1)
    if leaked:
        leak(leaked)
    observer = turns_of(form.period)
    train(settings(steps, form.period), Path(out), observer=observer)
    turns = {"means": observer.means, "busy": observer.busy, "wall": observer.wall}
    (Path(out) / "turns.json").write_text(json.dumps(turns))


# ---- in the process that watches


@dataclass
class Follower:
    """Reads a record while it is written, from where it was; keeps how often it met half a line."""

    path: Path
    steps: list[int] = field(default_factory=list)
    lines: int = 0
    halves: int = 0
    reads: int = 0
    _end: int = 0

    def look(self) -> None:
        """AssertionError where a line that ends is not whole."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._end)
            found = file.read()
        whole, newline, rest = found.rpartition(b"\n")
        self.reads += 1
        self.halves += bool(rest)
        self._end += len(whole) + len(newline)
        for line in whole.splitlines():
            try:
                values = json.loads(line)
            except ValueError as error:
                raise AssertionError(
                    f"line {self.lines + 1} of the record is no JSON: {line[:200]!r}"
                ) from error
            self.lines += 1
            if values["type"] == "step":
                self.steps.append(values["step"])

    def look_by_the_program(self) -> None:
        """Its own reader must take what is there at any moment; sees no fewer steps than this one has."""
        from conadv.training.record import read_lines

        if self.path.exists():
            lines = read_lines(self.path)
            assert sum(line["type"] == "step" for line in lines) >= len(self.steps)


Sample = tuple[int, float, float, float]  # step, and what LIMITS names


def sample(pid: int, step: int) -> Sample:
    """What a process holds now (Linux). OSError when it has ended."""
    folder = Path(f"/proc/{pid}")
    resident = int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    threads = int((folder / "stat").read_text().rpartition(")")[2].split()[17])
    return step, resident, sum(1 for _ in (folder / "fd").iterdir()), threads


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """What each of LIMITS has grown by in the second half of the steps: the median slope of pairs times the half."""
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


def _drain(terminal: int, shown: list[int]) -> None:
    """Read what the display writes, or it would block."""
    while True:
        try:
            shown[0] += len(os.read(terminal, 65536))
        except OSError:  # nobody writes any more
            return


def watch(form: Form, steps: int, out: Path, leaked: int = 0) -> tuple[list[Sample], Follower, int]:
    """Train ``steps`` steps in another process; returns samples, what the reader saw, and bytes on the display."""
    shutil.rmtree(out, ignore_errors=True)
    ours, theirs = pty.openpty()
    shown, follower, samples = [0], Follower(out / "record.jsonl"), []
    threading.Thread(target=_drain, args=(ours, shown), daemon=True).start()
    process = CONTEXT.Process(
        target=_train, args=(form, steps, str(out), os.ttyname(theirs), leaked)
    )
    process.start()
    try:
        while process.is_alive():
            process.join(form.every)
            follower.look()
            if follower.reads % 100 == 1:
                follower.look_by_the_program()
            if (
                follower.steps and len(follower.steps) < steps
            ):  # the last evaluation is another thing
                try:
                    samples.append(sample(process.pid or 0, follower.steps[-1]))
                except OSError:
                    break
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        os.close(theirs)
    assert process.exitcode == 0, f"the run ended with {process.exitcode}"
    follower.look()
    return samples, follower, shown[0]


def display_cost(turns: Mapping[str, Any]) -> dict[str, Any]:
    """What the display computed, as a share of the time; and a step with it over one without, in each pair of turns.

    The ratio holds whatever it does to a step, and the machine's noise; the first pair warms up.
    """
    from conadv.planning.timing import median_interval

    means = turns["means"]
    pairs = list(zip(means[2::2], means[3::2], strict=False))
    ratios = [on[1] / off[1] for on, off in pairs]
    found = median_interval(ratios)
    return {
        "share_of_time": turns["busy"] / turns["wall"],
        "pairs_of_turns": len(ratios),
        "step_seconds_without": statistics.median(off[1] for _, off in pairs),
        "ratio": found.median,
        "ratio_low": found.low,
        "ratio_high": found.high,
    }


def run(short: bool, out: Path) -> dict[str, Any]:
    """A soak that was cut off begins again: it is one run."""
    form = SHORT if short else FULL
    leaked = 3 * LIMITS["memory"] // (form.control_steps // 2)
    control, _, _ = watch(form, form.control_steps, out / "control", int(leaked))
    found = growth(control)
    assert not_flat(found) == list(LIMITS), f"a leak on purpose was not found: {found}"

    samples, follower, shown = watch(form, form.steps, out / "soak")
    grown = growth(samples)
    assert not not_flat(grown), (
        f"{not_flat(grown)} grew in the second half: {grown}; samples {samples[::20]}"
    )
    assert follower.steps == list(range(form.steps)), (
        "the reader of the record missed or repeated a step"
    )
    assert shown > 0, "the display was not shown"
    display = display_cost(json.loads((out / "soak" / "turns.json").read_text()))
    # so few steps as in the short form say nothing about time
    assert short or display["share_of_time"] <= MOST_DISPLAY, f"the display costs time: {display}"
    return {
        "seed": SEED,
        "steps": form.steps,
        "evaluations_and_checkpoints": form.steps // form.period,
        "samples": len(samples),
        "limits_of_growth": LIMITS,
        "growth_in_the_second_half": grown,
        "at_the_end": dict(zip(LIMITS, samples[-1][1:], strict=True)),
        "series": samples[:: max(1, len(samples) // 40)],
        "control_steps": form.control_steps,
        "control_leaks_bytes_per_step": int(leaked),
        "control_growth": found,
        "record_lines": follower.lines,
        "record_reads": follower.reads,
        "reads_that_met_half_a_line": follower.halves,
        "bytes_shown": shown,
        "display": display,
    }
