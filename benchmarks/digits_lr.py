"""How the demo's learning rates were chosen: plain training only, on seeds that the demo does not use.

    python benchmarks/digits_lr.py [--out runs/digits_lr]

The full batch with LARS and the small batch with SGD each get five learning rates and three seeds; the best mean test
accuracy decides. All full-batch arms of the demo use the rate chosen here for plain LARS.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import product
from pathlib import Path
from statistics import mean

from conadv.cli.demo import ARMS, Job, run_all
from conadv.config import recipes
from conadv.config.schema import replace

SEEDS = (100, 101, 102)
GRID = {
    "full batch, LARS": (0.5, 1.0, 2.0, 3.0, 4.0),
    "small batch 32, SGD": (0.02, 0.05, 0.1, 0.2, 0.4),
}


def main(out: Path) -> None:
    jobs = []
    for seed, (arm, rates) in product(SEEDS, GRID.items()):
        for lr in rates:
            changes = ARMS[arm] | {"optim__lr": lr, "seed": seed, "eval__robust_images": 0}
            config = replace(recipes.get("digits"), **changes)
            name = f"{arm.split()[0]}-lr{lr:g}-seed{seed}"
            jobs.append(Job(f"{arm}, lr {lr:g}", config, out / name))
    run_all(jobs, os.cpu_count() or 1, quiet=False)
    found: dict[str, list[float]] = {}
    for job in jobs:
        summary = json.loads((job.out / "summary.json").read_text())
        found.setdefault(job.arm, []).append(summary["test_accuracy"])
    for arm, values in sorted(found.items()):
        print(f"{arm:32} {mean(values):.2%}   {[round(100 * value, 2) for value in values]}")
    content = {"seeds": SEEDS, "test_accuracy": found}
    (out / "summary.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[2] if sys.argv[1:2] == ["--out"] else "runs/digits_lr"))
