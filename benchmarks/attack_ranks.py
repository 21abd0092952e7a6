"""The results of benchmarks/attack_ranks.sh in one JSON, and as a table.

python benchmarks/attack_ranks.py combine FILE SPLIT_FILE...
python benchmarks/attack_ranks.py table FILE
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from points import Json, read, write

from conadv.planning.timing import median_interval


def combine(out: str, *files: str) -> None:
    alike, own = ("machine", "versions"), ("command", "date", "git", "options", "ranks", "tables")
    write(out, "attack-ranks", read(files, alike), alike, own)


def table(file: str) -> None:
    """Per split and case: step time, overhead over noise on the same learners, images per second and core."""
    content = json.loads(Path(file).read_text())
    splits: dict[tuple[int, int], list[Json]] = {}
    for point in content["points"]:
        ranks = point["ranks"]
        splits.setdefault((ranks["learners"], ranks["attack_ranks"]), []).append(point)
    print(
        f"{'split and case':<48} {'step ms':>8} {'over noise':>22} {'images/s':>9} {'per core':>9}"
    )
    for (learners, attackers), repeats in splits.items():
        for row in repeats[0]["tables"]["attack-cost"]:
            ms = statistics.median(samples(repeats, row["name"]))
            per_second = 1e3 * row["labels"]["images"] / ms
            cores = min(row["labels"]["ranks"], content["machine"]["cores"])
            over = ratio(repeats, row["name"], row["yardstick"])
            case = f"{learners}:{attackers} {row['name']}"
            print(f"{case:<48} {ms:8.1f} {over:>22} {per_second:9.0f} {per_second / cores:9.0f}")


def samples(repeats: Sequence[Json], name: str) -> list[float]:
    """Milliseconds of every round of every repeat."""
    rows = [
        row for point in repeats for row in point["tables"]["attack-cost"] if row["name"] == name
    ]
    return [ms for row in rows for ms in row["samples_ms"]]


def ratio(repeats: Sequence[Json], name: str, other: str) -> str:
    """The median ratio within a round, with its interval."""
    pairs = zip(samples(repeats, name), samples(repeats, other), strict=True)
    found = median_interval([a / b for a, b in pairs])
    return f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"


if __name__ == "__main__":
    {"combine": combine, "table": table}[sys.argv[1]](*sys.argv[2:])
