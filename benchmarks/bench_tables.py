"""The tables of docs/benchmarks.md, from the records of the benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import two_hosts
from points import Json

RECORDS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"


def table(name: str, options: dict[str, str]) -> tuple[pd.DataFrame, str]:
    """The table of results/benchmarks/NAME.json, and how it was made. Option ``overlap``: off, of two_hosts."""
    facts = json.loads((RECORDS / f"{name}.json").read_text())
    overlap = options.get("overlap", "on") == "on"
    rows = links(facts, overlap) if name == "two_hosts" else cases(facts)
    command = f"benchmarks/{name}.sh" if "points" in facts else facts["command"]
    machine, commit = facts["machine"], facts.get("points", [facts])[0]["git"]["commit"][:7]
    cores = f"{machine['processor']}, {machine['cores']} cores, threads {machine['threads']}"
    made = f"`{command}` at commit {commit}; {cores}, torch {facts['versions']['torch']}."
    return pd.DataFrame(rows), made


def interval(row: Json) -> str:
    return f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"


def cases(facts: Json) -> Iterator[dict[str, str]]:
    """The rows that are not their own yardstick."""
    for row in next(iter(facts["tables"].values())):
        if row["name"] != row["yardstick"]:
            cells = {"case": row["name"], "median, ms": f"{row['median_ms']:.1f}"}
            yield {**cells, "ratio [95 % interval]": interval(row), "to": row["yardstick"]}


def links(facts: Json, overlap: bool) -> Iterator[dict[str, str]]:
    """Per rate of the link: noise, the all-reduce and the attack by themselves, every method's ratio to noise."""
    for point in facts["points"]:
        rate, measured = point["link"]["rate_mbit"], point["link"]["measured_mbit"]
        cells = {"link, Mbit/s": f"{rate:,}" if rate else f"no limit ({measured:,.0f})"}
        cells["noise, ms"] = f"{two_hosts.find(point, 'noise', overlap)['median_ms']:,.0f}"
        cells["all-reduce alone, ms"] = f"{two_hosts.sum_ms(point):,.0f}"
        cells["attack, ms"] = f"{two_hosts.attack_ms(point):,.0f}"
        names = two_hosts.METHODS | ({"ddp": "DDP over vanilla"} if overlap else {})
        ratios = {n: interval(two_hosts.find(point, m, overlap)) for m, n in names.items()}
        yield cells | ratios
