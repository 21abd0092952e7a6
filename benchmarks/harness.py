"""Interleaved timing: every round runs each case once, in a new random order, so that a busy machine slows all alike.

A row shows a case's median and best time over the rounds, and the median and the range of its ratio to its yardstick
within a round. Quote the ratios; absolute times say something about one machine on one day.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from conadv.record import git_state, machine, versions

WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class Case:
    """Something to time, and the case that its ratio refers to."""

    run: Callable[[], Any]
    yardstick: str


@dataclass(frozen=True)
class Row:
    """The timing of one case in milliseconds, and its ratio to the yardstick within each round."""

    name: str
    median_ms: float
    min_ms: float
    yardstick: str
    ratio: float
    ratio_min: float
    ratio_max: float


def parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--out", type=Path, help="write the rows as JSON here")
    return made


def measure(cases: Mapping[str, Case], rounds: int, device: str) -> list[Row]:
    """Time all cases, interleaved; the first rounds are thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    for number in range(rounds + WARMUP_ROUNDS):
        random.Random(number).shuffle(order)
        for name in order:
            synchronize(device)
            start = time.perf_counter()
            cases[name].run()
            synchronize(device)
            if number >= WARMUP_ROUNDS:
                seconds[name].append(time.perf_counter() - start)
    return [_row(name, case, seconds) for name, case in cases.items()]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _row(name: str, case: Case, seconds: Mapping[str, list[float]]) -> Row:
    ratios = [a / b for a, b in zip(seconds[name], seconds[case.yardstick], strict=True)]
    median = statistics.median(seconds[name]) * 1e3
    best = min(seconds[name]) * 1e3
    return Row(name, median, best, case.yardstick, statistics.median(ratios), min(ratios), max(ratios))


def show(title: str, rows: list[Row]) -> None:
    """Print a table."""
    width = max(len(row.name) for row in rows)
    print(f"\n{title}\n{'':{width}} {'median ms':>10} {'min ms':>9}   ratio [min, max] to")
    for row in rows:
        span = f"[{row.ratio_min:.2f}, {row.ratio_max:.2f}]"
        print(f"{row.name:{width}} {row.median_ms:10.2f} {row.min_ms:9.2f}   {row.ratio:.3f} {span:14} {row.yardstick}")


def about(arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What the numbers depend on."""
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    where = machine(device, torch.get_num_threads())
    return {"machine": where, "versions": versions() | more, "git": git_state(), "rounds": arguments.rounds}


def write(path: Path | None, facts: dict[str, Any], tables: Mapping[str, list[Row]]) -> None:
    """Write all tables as JSON, if a file was asked for."""
    if path is not None:
        content = facts | {"tables": {title: [asdict(row) for row in rows] for title, rows in tables.items()}}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
