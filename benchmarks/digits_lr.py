"""How the demo's learning rates were chosen: plain training only, on seeds that the demo does not use.

    python benchmarks/digits_lr.py [--out runs/digits_lr]

The full batch with LARS and the small batch with SGD each get five learning rates and three seeds; the best mean test
accuracy decides. All full-batch arms of the demo use the rate chosen here for plain LARS.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import mean
from typing import Any

from conadv.cli.demo import ARMS, Job, run_all
from conadv.config import recipes
from conadv.config.schema import replace

SEEDS = (100, 101, 102)
GRID = {
    "full batch, LARS": (0.5, 1.0, 2.0, 3.0, 4.0),
    "small batch 32, SGD": (0.02, 0.05, 0.1, 0.2, 0.4),
}


def jobs(out: Path) -> list[Job]:
    made = []
    for seed in SEEDS:
        for arm, rates in GRID.items():
            for lr in rates:
                changes: dict[str, Any] = {
                    **ARMS[arm],
                    "optim__lr": lr,
                    "seed": seed,
                    "eval__robust_images": 0,
                }
                config = replace(recipes.get("digits"), **changes)
                made.append(
                    Job(f"{arm}, lr {lr:g}", config, out / f"{arm.split()[0]}-lr{lr:g}-seed{seed}")
                )
    return made


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("runs/digits_lr"))
    out = options.parse_args().out
    planned = jobs(out)
    run_all(planned, os.cpu_count() or 1, quiet=False)
    accuracies: dict[str, list[float]] = {}
    for job in planned:
        accuracy = json.loads((job.out / "summary.json").read_text())["test_accuracy"]
        accuracies.setdefault(job.arm, []).append(accuracy)
    for arm, values in sorted(accuracies.items()):
        print(
            f"{arm:32} {100 * mean(values):6.2f} %   {[round(100 * value, 2) for value in values]}"
        )
    (out / "summary.json").write_text(
        json.dumps({"seeds": SEEDS, "test_accuracy": accuracies}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
