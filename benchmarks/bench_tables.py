"""The tables of docs/benchmarks.md, from the records of the benchmarks."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import median

import pandas as pd
import two_hosts
from points import Json

from conadv.planning.timing import median_interval

RECORDS = Path(__file__).resolve().parent.parent / "results" / "benchmarks"


def table(name: str, options: dict[str, str]) -> tuple[pd.DataFrame, str]:
    """The table of results/benchmarks/NAME.json, and how it was made. Option ``overlap``: off, of
    two_hosts.
    """
    facts = json.loads((RECORDS / f"{name}.json").read_text())
    overlap = options.get("overlap", "on") == "on"
    kinds = {"two_hosts": lambda facts: links(facts, overlap), "attack_ranks": splits}
    rows = kinds.get(name, cases)(facts)
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


def splits(facts: Json) -> Iterator[dict[str, str]]:
    """Per split of ranks: the attack's overhead over noise on as many learners, and images per
    core.
    """
    points = facts["points"]
    ranks = [(p["ranks"]["learners"], p["ranks"]["attack_ranks"]) for p in points]
    for split in dict.fromkeys(ranks):
        samples = defaultdict[str, list[float]](list)  # of every round of every repeat
        repeats = [
            p["tables"]["attack-cost"] for p, r in zip(points, ranks, strict=True) if r == split
        ]
        for row in chain(*repeats):
            samples[row["name"]] += row["samples_ms"]
        for row in repeats[0]:
            labels = row["labels"]
            if not labels["method"].startswith("conadv") or (split[1] > 0) != (
                "ranks" in row["name"]
            ):
                continue
            ms = samples[row["name"]]
            over = median_interval(
                [a / b for a, b in zip(ms, samples[row["yardstick"]], strict=True)]
            )
            rate = 1e3 * labels["images"] / median(ms)
            yield {
                "learners : attack ranks": f"{split[0]}:{split[1]}",
                "method": row["name"].partition(",")[0],
                "images per learner": str(labels["local_batch_size"]),
                "over noise": f"{over.median:.2f} [{over.low:.2f}, {over.high:.2f}]",
                "images/s": f"{rate:.0f}",
                "per core in use": f"{rate / min(labels['ranks'], facts['machine']['cores']):.0f}",
            }


def links(facts: Json, overlap: bool) -> Iterator[dict[str, str]]:
    """Per rate of the link: noise, the all-reduce and the attack by themselves, every method's
    ratio to noise.
    """
    for point in facts["points"]:
        rate, measured = point["link"]["rate_mbit"], point["link"]["measured_mbit"]
        cells = {"link, Mbit/s": f"{rate:,}" if rate else f"no limit ({measured:,.0f})"}
        cells["noise, ms"] = f"{two_hosts.find(point, 'noise', overlap)['median_ms']:,.0f}"
        cells["all-reduce alone, ms"] = f"{two_hosts.sum_ms(point):,.0f}"
        cells["attack, ms"] = f"{two_hosts.attack_ms(point):,.0f}"
        names = two_hosts.METHODS | ({"ddp": "DDP over vanilla"} if overlap else {})
        ratios = {n: interval(two_hosts.find(point, m, overlap)) for m, n in names.items()}
        yield cells | ratios
