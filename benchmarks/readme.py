"""Draw the tables of README.md and docs/ from the records under results/.

    python benchmarks/readme.py [--check]

The demo's summary comes from `conadv demo` and the timings from `conadv bench`.
With --check nothing is written and the exit code says whether the pages are up to date.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attack_ranks as splitting
import study_answers
import study_prose
import study_tables
import two_hosts as link
from scipy.stats import binom

from conadv.planning.attack_cost import CONCURRENT
from conadv.report import words

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = (
    ROOT / "README.md",
    *(DOCS / f"{name}.md" for name in ("concurrency", "plan", "reliability", "results")),
)
RESULTS = ROOT / "results"
table = study_tables.table


def demo(summary: dict[str, Any]) -> str:
    """The demo's arms as the report shows them."""

    def percent(stat: dict[str, Any] | None) -> str:
        return "-" if stat is None else f"{100 * stat['mean']:.2f} ± {100 * stat['std']:.2f}"

    def difference(arm: dict[str, Any]) -> str:
        d = arm["difference"]
        return (
            "baseline"
            if d is None
            else f"{100 * d['mean']:+.2f} [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]"
        )

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
        "robust accuracy, %",
        "step, ms",
        "attack share, %",
    ]
    settings = summary["common_settings"]
    robust = words.pgd(
        *(settings[f"eval.robust_{name}"] for name in ("eps", "steps")),
        f"at most {settings['eval.robust_images']}",
    )
    made = f"`{summary['command']}`, two runs at a time; {machine}"
    how = f"{seeds} seeds, mean ± standard deviation; robust accuracy: {robust}; {made}"
    return f"{table(head, rows)}\n\n{how}"


def where(facts: dict[str, Any]) -> str:
    machine, versions = facts["machine"], facts["versions"]
    threads = f"{machine['threads']} thread" + ("s" if machine["threads"] > 1 else "")
    return (
        f"{machine['processor']}, {machine['cores']} cores, {threads}, torch {versions['torch']}."
    )


def timing(file: str) -> str:
    """The table of one benchmark's JSON, without the rows that are their own yardstick, and how it was made."""
    facts = json.loads((RESULTS / "benchmarks" / file).read_text())
    (rows,) = facts["tables"].values()
    others = [row for row in rows if row["name"] != row["yardstick"]]
    cells = [
        [row["name"], f"{row['median_ms']:.1f}", ratio(row), row["yardstick"]] for row in others
    ]
    spread = "95 % interval" if "ratio_low" in rows[0] else "range over rounds"
    rounds = len(rows[0]["samples_ms"]) if "samples_ms" in rows[0] else facts["rounds"]
    how = f"`{facts['command']}` at commit {facts['git']['commit'][:7]}, {rounds} interleaved rounds; {where(facts)}"
    return f"{table(['', 'median, ms', f'ratio [{spread}]', 'to'], cells)}\n\n{how}"


def ratio(row: dict[str, Any]) -> str:
    ends = ("ratio_low", "ratio_high") if "ratio_low" in row else ("ratio_min", "ratio_max")
    return f"{row['ratio']:.2f} [{row[ends[0]]:.2f}, {row[ends[1]]:.2f}]"


def brackets(row: dict[str, Any] | None) -> str:
    return "-" if row is None else ratio(row)


def made_by(file: str, command: str) -> str:
    facts = json.loads((RESULTS / "benchmarks" / file).read_text())
    point = facts["points"][0]
    rows = point["tables"]["attack-cost"]
    repeats = sum(
        p.get("ranks") == point.get("ranks") and p.get("link") == point.get("link")
        for p in facts["points"]
    )
    rounds = [
        repeats * len(row["samples_ms"])
        for p in facts["points"]
        for row in p["tables"]["attack-cost"]
    ]
    count = f"{min(rounds)} to {max(rounds)}" if min(rounds) < max(rounds) else f"{min(rounds)}"
    low = splitting.median_interval(range(min(rounds))).low
    coverage = 100 * (1 - 2 * binom.cdf(low, min(rounds), 0.5))
    options = facts.get("options") or point["options"]
    what = f"{options['model']} at {options['image_size']}x{options['image_size']}, {options['precision']}"
    return (
        f"`{command}` at commit {point['git']['commit'][:7]}: {what}, {rows[0]['labels']['local_batch_size']}"
        f"{' and ' + str(options['batches'][-1]) if len(options['batches']) > 1 else ''} images per rank, {count} "
        f"interleaved rounds, intervals of at least {coverage:.0f} %; {where(facts)}"
    )


def two_hosts(overlap: bool) -> str:
    """Overhead over noise by the rate of the link."""
    points = json.loads((RESULTS / "benchmarks" / "two_hosts.json").read_text())["points"]
    rows = []
    for point in points:
        noise = link.find(point, "noise", overlap)
        limit = point["link"]["rate_mbit"]
        name = (
            f"no limit ({point['link']['measured_mbit']:,.0f})" if limit is None else f"{limit:,}"
        )
        times = [
            f"{ms:,.0f}"
            for ms in (
                noise["median_ms"] if noise else 0,
                link.sum_ms(point),
                link.attack_ms(point) or 0,
            )
        ]
        cells = [brackets(link.find(point, method, overlap)) for method in link.METHODS]
        rows.append(
            [name, *times, *cells, *([brackets(link.find(point, "ddp", True))] if overlap else [])]
        )
    head = ["link, Mbit/s", "noise, ms", "sum alone, ms", "attack, ms", *link.METHODS.values()]
    return table([*head, *(["DDP over vanilla"] if overlap else [])], rows)


def attack_ranks() -> str:
    """Splits of two cores: the learner's step beside noise, and images per second and core."""
    content = json.loads((RESULTS / "benchmarks" / "attack_ranks.json").read_text())
    splits: dict[tuple[int, int], list[Any]] = {}
    for point in content["points"]:
        splits.setdefault((point["ranks"]["learners"], point["ranks"]["attack_ranks"]), []).append(
            point
        )
    rows = []
    for (learners, attackers), repeats in splits.items():
        for row in repeats[0]["tables"]["attack-cost"]:
            labels = row["labels"]
            if labels["method"] not in CONCURRENT or (labels["executor"] == "inline" and attackers):
                continue
            busy = f"noise, attack ranks busy, batch {labels['local_batch_size']}"
            found = [
                splitting.ratio(repeats, row["name"], other) for other in (row["yardstick"], busy)
            ]
            per_second = (
                1e3 * labels["images"] / statistics.median(splitting.samples(repeats, row["name"]))
            )
            per_core = per_second / min(labels["ranks"], content["machine"]["cores"])
            what = [
                f"{learners}:{attackers}",
                link.METHODS[labels["method"]],
                str(labels["local_batch_size"]),
            ]
            rows.append([*what, *found, f"{per_second:.0f}", f"{per_core:.0f}"])
    head = [
        "learners : attack ranks",
        "",
        "images per learner",
        "over noise",
        "over noise beside busy cores",
    ]
    head += ["images/s", "per core in use"]
    return table(head, rows)


def plan_check() -> str:
    """Predicted against measured steps."""
    content = json.loads((RESULTS / "plan" / "plan_check.json").read_text())
    rows = [
        [
            row["name"],
            f"{row['measured_ms']:.0f}",
            f"{row['predicted_ms']:.0f}",
            f"{100 * row['error']:+.1f}",
            row["limit"],
        ]
        for row in content["rows"]
    ]
    found = content["summary"]
    how = f"`python benchmarks/plan_check.py --out results/plan` at commit {content['git']['commit'][:7]}"
    return (
        f"{table(['case', 'measured, ms', 'predicted, ms', 'error, %', 'limit'], rows)}\n\n{len(rows)} cases: "
        f"median error {100 * found['median_error']:.1f} %, worst {100 * found['worst_error']:.1f} %. "
        f"{how}; {where(content)}"
    )


def fuzz() -> str:
    """The targets of the recorded fuzzing campaign, in the words of the functions that they are."""
    content = json.loads((RESULTS / "reliability" / "fuzz.json").read_text())
    source = ast.parse((ROOT / "benchmarks" / "torture_fuzz.py").read_text())
    words = {
        node.name: ast.get_docstring(node) or ""
        for node in source.body
        if isinstance(node, ast.FunctionDef)
    }
    rows = [
        [
            f"`{name}`",
            words[f"fuzz_{name}"].splitlines()[0],
            f"{found['inputs']:,}",
            f"{found['accepted']:,}",
        ]
        for name, found in content["targets"].items()
    ]
    accepted = sum(found["accepted"] for found in content["targets"].values())
    rows.append(["all", "", f"{content['inputs']:,}", f"{accepted:,}"])
    how = (
        "guided by coverage (libFuzzer)"
        if content["guided_by_coverage"]
        else "mutations of seeds, not guided by coverage"
    )
    return (
        f"{table(['target', 'what gets the input', 'inputs', 'accepted'], rows)}\n\nCrashes: {content['crashes']}. "
        f"{how[0].upper()}{how[1:]}; `python -m benchmarks.torture fuzz` at commit {content['git']['commit'][:7]}, "
        f"{content['time'][:10]}; {where(content)}"
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "demo": lambda: demo(json.loads((RESULTS / "demo" / "summary.json").read_text())),
    "methods": lambda: "\n\n".join(
        map(timing, ("attack-cost-resnet20.json", "attack-cost-resnet8.json"))
    ),
    "engine": lambda: timing("engine.json"),
    "norm": lambda: timing("norm.json"),
    "optim": lambda: timing("optim.json"),
    "two-hosts": lambda: (
        f"{two_hosts(True)}\n\n{made_by('two_hosts.json', 'benchmarks/two_hosts.sh')}"
    ),
    "two-hosts-without": lambda: two_hosts(False),
    "attack-ranks": lambda: (
        f"{attack_ranks()}\n\n{made_by('attack_ranks.json', 'benchmarks/attack_ranks.sh')}"
    ),
    "plan": plan_check,
    "fuzz": fuzz,
    "answers": lambda: table(*study_answers.answers(RESULTS / "studies")),
}


MARK = re.compile(r"(<!-- begin (?P<name>[\w -]+) -->\n).*?(<!-- end (?P=name) -->)", re.S)
STUDY = "study "


def section(name: str) -> str:
    """What stands between the marks of ``name``; "study NAME TABLE" comes from results/studies/NAME."""
    if name.startswith(STUDY):
        return study_tables.section(RESULTS / "studies", *name.removeprefix(STUDY).split(" ", 1))
    return SECTIONS[name]()


def drawn(text: str) -> str:
    """``text`` with every section drawn anew."""
    return MARK.sub(lambda found: f"{found[1]}{section(found['name'])}\n{found[3]}", text)


def check_prose(pages: dict[Path, str]) -> None:
    """SystemExit where a sentence types an interval that is in no record of a study."""
    known = study_prose.figures(RESULTS / "studies")
    told = {
        page: text
        for page, text in pages.items()
        if page.stem in ("README", "results") or page.parent.name == "results"
    }
    wrong = {
        page.name: found
        for page, text in told.items()
        if (found := study_prose.unknown(MARK.sub("", text), known))
    }
    if wrong:
        raise SystemExit(f"Intervals in no record of a study: {wrong}")


def main() -> None:
    pages = {page: page.read_text() for page in (*PAGES, *sorted((DOCS / "results").glob("*.md")))}
    names = [mark["name"] for text in pages.values() for mark in MARK.finditer(text)]
    found = sorted(name for name in names if not name.startswith(STUDY))
    if found != sorted(SECTIONS):
        raise SystemExit(
            f"The pages have the sections {found}, wanted {sorted(SECTIONS)}, each once."
        )
    for page, before in pages.items():
        after = drawn(before)
        if "--check" in sys.argv and after != before:
            raise SystemExit(f"{page.name} is not what results/ says: run benchmarks/readme.py")
        page.write_text(after)
    check_prose(pages)


if __name__ == "__main__":
    main()
