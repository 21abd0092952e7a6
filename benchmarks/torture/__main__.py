"""Run torture campaigns.

python -m benchmarks.torture                     list the campaigns
python -m benchmarks.torture all                 every campaign in full (`make torture`)
python -m benchmarks.torture NAME... [--short]   some; --short is the form that the tests run
    [--out FOLDER]                               default results/reliability (--short: give another)
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from . import CAMPAIGNS, run

RESULTS = Path(__file__).resolve().parents[2] / "results" / "reliability"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torture")
    parser.add_argument("names", nargs="*", choices=[*CAMPAIGNS, "all", []], metavar="NAME")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.names:
        for name in CAMPAIGNS:
            doc = importlib.import_module(f"benchmarks.torture.{name}").__doc__ or ""
            print(f"{name:<14}{doc.splitlines()[0]}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in CAMPAIGNS if "all" in options.names else options.names:
        print(f"== {name}", flush=True)
        try:
            print(json.dumps(run(name, options.short, options.out.resolve()), indent=1), flush=True)
        except AssertionError as error:
            failed.append(name)
            print(f"FAILED: {error}", flush=True)
    print(f"failed: {', '.join(failed) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
