"""Seconds per optimizer step on ResNet-50's parameters, beside torch's and timm's optimizers.

    python benchmarks/optim.py [--device cuda] [--rounds 15] [--threads 2] [--out FILE.json]

Interleaved: every round runs each optimizer once, in a new random order, so that a busy machine slows all of them. A
line shows the median and the best over rounds, and the median and range of the ratio to the yardstick *within a
round*: for LARS and SGD torch's fused SGD, for LAMB and AdamW torch's fused AdamW. Norm and bias parameters are without
weight decay and trust ratio in all of them (timm's optimizers see that from weight_decay=0).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision

from conadv.optim import LAMB, LARS, parameter_groups

try:
    import timm
    from timm.optim import Lamb as TimmLamb
    from timm.optim import Lars as TimmLars
except ImportError:
    timm = None

Step = Callable[[], Any]
FIRST_ORDER, SECOND_ORDER = "torch SGD fused", "torch AdamW fused"


def build(kind: Callable[..., Any], device: str, **options: Any) -> Step:
    """The step of an optimizer over ResNet-50 with random gradients; each has weights and state of its own."""
    model = torchvision.models.resnet50().to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in parameter_groups(model, **_DECAY)]
    if kind in (LARS, LAMB):
        groups = parameter_groups(model, **_DECAY)
    step: Step = kind(groups, lr=1e-3, **options).step
    return step


_DECAY = {"weight_decay": 5e-5}


def cases(device: str) -> dict[str, tuple[Step, str]]:
    """name -> (step, the yardstick of its ratio)."""
    sgd, adamw = torch.optim.SGD, torch.optim.AdamW
    made: dict[str, tuple[Step, str]] = {}
    forms: tuple[tuple[str, dict[str, Any]], ...] = (
        ("loop", {"foreach": False}),
        ("foreach", {"foreach": True}),
        ("fused", {"fused": True}),
    )
    for form, options in forms:
        made[f"torch SGD {form}"] = build(sgd, device, momentum=0.9, **options), FIRST_ORDER
        made[f"torch AdamW {form}"] = build(adamw, device, **options), SECOND_ORDER
    for form, foreach in (("loop", False), ("foreach", True), ("default", None)):
        made[f"conadv LARS {form}"] = build(LARS, device, foreach=foreach), FIRST_ORDER
        made[f"conadv LAMB {form}"] = build(LAMB, device, foreach=foreach), SECOND_ORDER
    if timm is not None:
        made["timm LARS"] = build(TimmLars, device, momentum=0.9), FIRST_ORDER
        made["timm LAMB"] = build(TimmLamb, device), SECOND_ORDER
    return made


def measure(made: dict[str, tuple[Step, str]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step in each round; two rounds to warm up are thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    order = list(made)
    for number in range(rounds + 2):
        random.Random(number).shuffle(order)
        for name in order:
            _synchronize(device)
            start = time.perf_counter()
            made[name][0]()
            _synchronize(device)
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def summarize(made: dict[str, tuple[Step, str]], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row per optimizer, fastest first within each yardstick."""
    rows = []
    for name, (_, yardstick) in made.items():
        ratios = [a / b for a, b in zip(seconds[name], seconds[yardstick], strict=True)]
        rows.append(
            {
                "name": name,
                "median_ms": statistics.median(seconds[name]) * 1e3,
                "min_ms": min(seconds[name]) * 1e3,
                "yardstick": yardstick,
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        )
    return sorted(rows, key=lambda row: (row["yardstick"] != FIRST_ORDER, row["median_ms"]))


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    versions["timm"] = timm.__version__ if timm is not None else "not installed"
    name = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": device,
        "name": name,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    } | versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if timm is None:
        print("timm is not installed: its two lines are left out (pip install timm).")
    made = cases(arguments.device)
    rows = summarize(made, measure(made, arguments.rounds, arguments.device))
    about = machine(arguments.device)
    print(", ".join(f"{key} {value}" for key, value in about.items()), f", {arguments.rounds} rounds", sep="")
    print(f"{'optimizer':22} {'median ms':>9} {'min ms':>8}   ratio [min, max] to its yardstick")
    for row in rows:
        span = f"[{row['ratio_min']:.2f}, {row['ratio_max']:.2f}]"
        times = f"{row['median_ms']:9.2f} {row['min_ms']:8.2f}"
        print(f"{row['name']:22} {times}   {row['ratio']:5.2f} {span:14} {row['yardstick']}")
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"machine": about, "rounds": arguments.rounds, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
