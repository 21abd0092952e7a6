"""Torture campaigns: faults by the hundred, each checked, and one JSON per campaign.

A campaign is a module of this folder whose docstring begins with what it does, with ``run(short,
out)``, which returns counts and seeds, and raises AssertionError where the product did not do what
it promises.
"""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CAMPAIGNS = ("kill", "corrupt", "ranks", "links", "soak", "fuzz")
Json = dict[str, Any]


def trials(out: Path, total: int, trial: Callable[[int], Json]) -> list[Json]:
    """The results of trial(0) to trial(total - 1). ``out`` keeps one JSON line each: a cut-off
    campaign goes on.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "trials.jsonl"
    text = path.read_text() if path.exists() else ""
    text = text[: text.rfind("\n") + 1]  # a line that was cut off counts for nothing
    path.write_text(text)
    done = [json.loads(line) for line in text.splitlines()]
    for number in range(len(done), total):
        done.append(trial(number))
        with path.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
    return done


def run(name: str, short: bool, folder: Path) -> Json:
    """One campaign, from its start or from where it was cut off; returns what was written to
    FOLDER/<name>.json.
    """
    import torch

    from conadv.training import provenance

    work = folder / f".{name}{'-short' if short else ''}"
    begin = time.monotonic()
    module = importlib.import_module(f"benchmarks.torture.{name}")
    result = {
        "campaign": name,
        "what": (module.__doc__ or "").splitlines()[0],
        "form": "short" if short else "full",
        "time": provenance.now(),
        "versions": provenance.versions(),
        "machine": provenance.machine("cpu", torch.get_num_threads()),
        "git": provenance.git_state(),
        **module.run(short, work),
        "seconds_of_the_last_start": round(time.monotonic() - begin, 1),
    }
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(work, ignore_errors=True)
    return result
