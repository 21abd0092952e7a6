"""Draw the tables of README.md from the records under results/.

    python benchmarks/readme.py [--check]

The demo's summary comes from `conadv demo` and the timings from `conadv bench`.
With --check nothing is written and the exit code says whether the README is up to date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "results"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo(summary: dict[str, Any]) -> str:
    """The demo's arms as the report shows them."""

    def percent(stat: dict[str, Any] | None) -> str:
        return "-" if stat is None else f"{100 * stat['mean']:.2f} ± {100 * stat['std']:.2f}"

    def difference(arm: dict[str, Any]) -> str:
        d = arm["difference"]
        return "baseline" if d is None else f"{100 * d['mean']:+.2f} [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]"

    rows = [
        [
            arm["label"],
            percent(arm["test_accuracy"]),
            difference(arm),
            percent(arm["robust_accuracy"]),
            f"{1000 * arm['step_seconds']['median']:.0f}",
            f"{100 * arm['attack_share']['median']:.0f}",
        ]
        for arm in summary["arms"]
    ]
    seeds = len(summary["arms"][0]["seeds"])
    machine = "; ".join([*summary["machines"], *summary["versions"]]) + "."
    head = [
        "arm",
        "test accuracy, %",
        "difference, points [95 % interval]",
        "under PGD-10, %",
        "step, ms",
        "attack share, %",
    ]
    how = f"{seeds} seeds, mean ± standard deviation; `{summary['command']}`, two runs at a time; {machine}"
    return f"{table(head, rows)}\n\n{how}"


def where(facts: dict[str, Any]) -> str:
    machine, versions = facts["machine"], facts["versions"]
    threads = f"{machine['threads']} thread" + ("s" if machine["threads"] > 1 else "")
    return f"{machine['processor']}, {machine['cores']} cores, {threads}, torch {versions['torch']}."


def timing(file: str) -> str:
    """The table of one benchmark's JSON, without the rows that are their own yardstick, and how it was made."""
    facts = json.loads((RESULTS / "benchmarks" / file).read_text())
    (rows,) = facts["tables"].values()
    others = [row for row in rows if row["name"] != row["yardstick"]]
    cells = [[row["name"], f"{row['median_ms']:.1f}", ratio(row), row["yardstick"]] for row in others]
    spread = "95 % interval" if "ratio_low" in rows[0] else "range over rounds"
    rounds = len(rows[0]["samples_ms"]) if "samples_ms" in rows[0] else facts["rounds"]
    how = f"`{facts['command']}` at commit {facts['git']['commit'][:7]}, {rounds} interleaved rounds; {where(facts)}"
    return f"{table(['', 'median, ms', f'ratio [{spread}]', 'to'], cells)}\n\n{how}"


def ratio(row: dict[str, Any]) -> str:
    ends = ("ratio_low", "ratio_high") if "ratio_low" in row else ("ratio_min", "ratio_max")
    return f"{row['ratio']:.2f} [{row[ends[0]]:.2f}, {row[ends[1]]:.2f}]"


SECTIONS: dict[str, Callable[[], str]] = {
    "demo": lambda: demo(json.loads((RESULTS / "demo" / "summary.json").read_text())),
    "methods": lambda: "\n\n".join(map(timing, ("attack-cost-resnet20.json", "attack-cost-resnet8.json"))),
    "engine": lambda: timing("engine.json"),
    "norm": lambda: timing("norm.json"),
    "optim": lambda: timing("optim.json"),
}


def drawn(text: str) -> str:
    """``text`` with every section drawn anew."""
    for name, draw in SECTIONS.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, count = re.subn(pattern, lambda m, d=draw: f"{m[1]}{d()}\n{m[2]}", text, flags=re.S)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"README.md has {count} sections {name!r}, wanted 1")
    return text


def main() -> None:
    before = README.read_text()
    after = drawn(before)
    if "--check" in sys.argv:
        raise SystemExit(0 if after == before else "README.md is not what results/ says: run benchmarks/readme.py")
    README.write_text(after)


if __name__ == "__main__":
    main()
