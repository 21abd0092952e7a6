"""Several results of one benchmark, measured alike but for one thing, in one JSON.

    python benchmarks/points.py two-hosts|attack-ranks OUT FILE...

The points are links of several rates, the slowest first, or splits of ranks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Json = dict[str, Any]
ALIKE = {
    "two-hosts": ("command", "machine", "versions", "options", "ranks"),
    "attack-ranks": ("machine", "versions"),
}


def combine(name: str, out: str, *files: str) -> None:
    """What is alike once, and the rest of every point. SystemExit if points were measured
    otherwise.
    """
    points: list[Json] = [json.loads(Path(file).read_text()) for file in files]
    for key in ALIKE[name]:
        if any(point[key] != points[0][key] for point in points):
            raise SystemExit(f"{', '.join(files)} differ in {key!r}: measure again with --force.")
    content = {"bench": name, **{key: points[0][key] for key in ALIKE[name]}}
    own = [{key: point[key] for key in point if key not in content} for point in points]
    content["points"] = sorted(own, key=rate) if name == "two-hosts" else own
    Path(out).write_text(json.dumps(content, indent=1) + "\n")


def rate(point: Json) -> float:
    """Mbit/s of the link's limit; infinity without one."""
    limit = point["link"]["rate_mbit"]
    return float("inf") if limit is None else float(limit)


if __name__ == "__main__":
    combine(*sys.argv[1:])
