"""What split batch norm costs: forward and backward of a clean and an adversarial half."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from conadv.bench import output
from conadv.bench.harness import Case, measure, timed
from conadv.bench.options import NormArgs
from conadv.bench.workload import random_images
from conadv.distributed.environment import pick_device
from conadv.models.small import SmallResNet
from conadv.nn.split_batchnorm import route, split_batchnorm

COUNT = 64
ONE, TWO = "plain, one forward of both halves", "plain, two forwards"


def command(options: NormArgs) -> None:
    """Measure, print a table, write JSON."""
    output.prepare(options)
    device = pick_device(options.device)
    rows = measure(cases(device), options.rounds, seconds=options.seconds, seed=options.seed)
    output.finish("norm", options, device, rows)


def cases(device: torch.device) -> dict[str, Case]:
    torch.manual_seed(0)
    plain = SmallResNet(20, 16, 3, 10).to(device)
    x, _ = random_images((COUNT, 3, 32, 32), 10, 0, device)
    both = torch.cat([x, x + 0.01])
    split = split_batchnorm(copy.deepcopy(plain), "adv")
    runs = {
        ONE: (_pass(plain, both), ONE),
        TWO: (_pass(copy.deepcopy(plain), *both.split(COUNT)), TWO),
        "conadv split, one forward": (_together(split, both), ONE),
        "conadv split, one forward (against two)": (_together(split, both), TWO),
        "conadv split, two forwards (the CPU's default)": (_apart(split, both), TWO),
    }
    try:
        from timm.layers import convert_splitbn_model
    except ImportError:
        sys.stderr.write("timm is not installed: its line is left out (pip install timm).\n")
    else:
        runs["timm split, one forward"] = (
            _pass(convert_splitbn_model(copy.deepcopy(plain), 2), both),
            ONE,
        )
    return {name: Case(timed(run, device), yardstick) for name, (run, yardstick) in runs.items()}


def _pass(model: nn.Module, *inputs: Tensor) -> Callable[[], None]:
    def step() -> None:
        torch.stack([model(x).square().sum() for x in inputs]).sum().backward()  # type: ignore[no-untyped-call]
        model.zero_grad()

    return step


def _together(split: nn.Module, both: Tensor) -> Callable[[], None]:
    step = _pass(split, both)

    def run() -> None:
        with route(split, {"clean": COUNT, "adv": COUNT}):
            step()

    return run


def _apart(split: nn.Module, both: Tensor) -> Callable[[], None]:
    steps = [
        (name, _pass(split, half))
        for name, half in zip(("clean", "adv"), both.split(COUNT), strict=True)
    ]

    def run() -> None:
        for name, step in steps:
            with route(split, name):
                step()

    return run
