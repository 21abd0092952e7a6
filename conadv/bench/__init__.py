"""``conadv bench WHAT``: interleaved timings, as JSON and as a table. docs/benchmarks.md has the format.

This table is all that the command line needs, so it imports no torch; a benchmark's own module is imported on use.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conadv.bench.options import (
    AttackCostArgs,
    BenchArgs,
    DataArgs,
    EngineArgs,
    NormArgs,
    OptimArgs,
)
from conadv.cli.limits import check_numbers
from conadv.errors import unknown


@dataclass(frozen=True)
class Row:
    """The options of a benchmark and the module whose ``command(options)`` runs it."""

    options: type[BenchArgs]
    module: str
    summary: str


BENCHES: dict[str, Row] = {
    "attack-cost": Row(
        AttackCostArgs,
        "attack_cost",
        "a step of each method beside noise, on 1 to N ranks (torchrun)",
    ),
    "engine": Row(EngineArgs, "engine", "TrainStep beside the same arithmetic written by hand"),
    "norm": Row(NormArgs, "norm", "split batch norm beside plain and timm's"),
    "optim": Row(OptimArgs, "optim", "LARS and LAMB beside torch's and timm's optimizers"),
    "data": Row(
        DataArgs, "data", "the loader beside torchvision's transforms in a plain DataLoader"
    ),
}


def overview() -> str:
    """The benchmarks with one line each."""
    width = max(map(len, BENCHES))
    lines = [f"  {name:<{width}}  {row.summary}" for name, row in BENCHES.items()]
    return "\n".join(
        [
            "usage: conadv bench WHAT [options]",
            "",
            *lines,
            "",
            "`conadv bench WHAT --help` has the options",
        ]
    )


def parse(args: Sequence[str]) -> tuple[str, BenchArgs]:
    """The benchmark named first, and its options."""
    import tyro

    if args[0] not in BENCHES:
        raise unknown("benchmark", args[0], BENCHES)
    options: Any = tyro.cli(BENCHES[args[0]].options, args=args[1:], prog=f"conadv bench {args[0]}")
    check_numbers(options)
    return args[0], options


def run(args: Sequence[str]) -> None:
    """Run the benchmark that a command line asks for. Raises ConadvError before measuring for what is wrong with it."""
    name, options = parse(args)
    options.check()
    importlib.import_module(f".{BENCHES[name].module}", __name__).command(options)
