"""Several results of one benchmark, measured alike but for one thing (a link's rate, a split of ranks), in one JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def read(files: Sequence[str], alike: Sequence[str]) -> list[Json]:
    """The results in ``files``; all must have the same values of ``alike``."""
    points: list[Json] = [json.loads(Path(file).read_text()) for file in files]
    for name in alike:
        if any(point[name] != points[0][name] for point in points):
            raise SystemExit(f"{', '.join(files)} differ in {name!r}: measure again with --force.")
    return points


def write(
    out: str, name: str, points: Sequence[Json], alike: Sequence[str], own: Sequence[str]
) -> None:
    """One JSON: what is alike once, and ``own`` of every point."""
    content = {"bench": name, **{key: points[0][key] for key in alike}}
    content["points"] = [{key: point[key] for key in own} for point in points]
    Path(out).write_text(json.dumps(content, indent=1) + "\n")
