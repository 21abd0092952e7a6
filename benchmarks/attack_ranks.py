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
from typing import Any

from points import Json, read, write

from conadv.planning.timing import median_interval


def combine(out: str, *files: str) -> None:
    alike = ("machine", "versions")
    write(
        out,
        "attack-ranks",
        read(files, alike),
        alike,
        ("command", "date", "git", "options", "ranks", "tables"),
    )


def table(file: str) -> None:
    """Per split and case: step time, overhead over noise on the same learners, images per second and core."""
    content = json.loads(Path(file).read_text())
    splits: dict[tuple[int, int], list[Json]] = {}
    for point in content["points"]:
        splits.setdefault((point["ranks"]["learners"], point["ranks"]["attack_ranks"]), []).append(
            point
        )
    print(
        f"{'split':<6}{'':42} {'step ms':>8} {'over noise':>22} {'over busy noise':>22} {'images/s':>9} {'per core':>9}"
    )
    for (learners, attack_ranks), repeats in splits.items():
        for name in repeats[0]["tables"]["attack-cost"]:
            cells = line(repeats, name["name"], content["machine"]["cores"])
            print(f"{learners}:{attack_ranks:<4}{name['name']:<42} {cells}")


def line(repeats: Sequence[Json], name: str, cores: int) -> str:
    first = _row(repeats[0], name)
    ms = statistics.median(samples(repeats, name))
    per_second = 1e3 * first["labels"]["images"] / ms
    per_core = per_second / min(first["labels"]["ranks"], cores)
    busy = f"noise, attack ranks busy, batch {first['labels']['local_batch_size']}"
    over = " ".join(f"{ratio(repeats, name, other):>22}" for other in (first["yardstick"], busy))
    return f"{ms:8.1f} {over} {per_second:9.0f} {per_core:9.0f}"


def samples(repeats: Sequence[Json], name: str) -> list[float]:
    """Milliseconds of every round of every repeat; empty for a case that was not measured."""
    rows = [_row(repeat, name) for repeat in repeats]
    return [ms for row in rows if row for ms in row["samples_ms"]]


def ratio(repeats: Sequence[Json], name: str, other: str) -> str:
    """The median ratio within a round, with its interval."""
    theirs = samples(repeats, other)
    if not theirs or name == other:
        return "-"
    found = median_interval([a / b for a, b in zip(samples(repeats, name), theirs, strict=True)])
    return f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _row(point: Json, name: str) -> Any:
    return next((row for row in point["tables"]["attack-cost"] if row["name"] == name), None)


COMMANDS = {"combine": combine, "table": table}

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in COMMANDS:
        raise SystemExit((__doc__ or "").strip())
    COMMANDS[sys.argv[1]](*sys.argv[2:])
