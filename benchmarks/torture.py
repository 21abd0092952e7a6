"""Torture campaigns: faults by the hundred, each checked, and one JSON per campaign.

python -m benchmarks.torture                     list the campaigns
python -m benchmarks.torture all                 every campaign in full (`make torture`)
python -m benchmarks.torture NAME... [--short]   some of them; --short is the form that CI runs
    [--out FOLDER]                               default results/reliability (--short: another, or it is replaced)

`all --short` also writes FOLDER/short.json: what each took, and all together.

A campaign is a module benchmarks/torture_<name>.py whose docstring begins with what it does, with

    def run(short: bool, out: Path) -> dict[str, Any]

which returns counts and seeds, and raises AssertionError where the product did not do what it promises. ``out`` is a
folder of the campaign's own for what it has done so far: a campaign that was cut off goes on from there (see
``Progress``). What ``run`` returns goes into FOLDER/<name>.json with machine, versions, git and the time it took.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Json = dict[str, Any]


def campaigns() -> dict[str, str]:
    """Campaign -> module, of the files that are there."""
    return {
        file.stem.removeprefix("torture_"): f"benchmarks.{file.stem}"
        for file in sorted(HERE.glob("torture_*.py"))
    }


class Progress:
    """What a campaign has done so far, one JSON line per trial, so that it can go on after it was cut off."""

    def __init__(self, out: Path, name: str = "trials") -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._path = out / f"{name}.jsonl"
        text = self._path.read_text() if self._path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # cut off within a line
            self._path.write_text(whole)
        self.done: list[Json] = [json.loads(line) for line in whole.splitlines()]

    def add(self, trial: Json) -> None:
        self.done.append(trial)
        with self._path.open("a") as file:
            file.write(json.dumps(trial) + "\n")


def run(name: str, short: bool, folder: Path) -> Json:
    """One campaign, from its start or from where it was cut off; returns what was written to FOLDER/<name>.json."""
    import torch

    from conadv.training import record

    work = folder / f".{name}{'-short' if short else ''}"
    begin = time.monotonic()
    module = importlib.import_module(campaigns()[name])
    found = module.run(short, work)
    result = {
        "campaign": name,
        "what": (module.__doc__ or "").strip().splitlines()[0],
        "form": "short" if short else "full",
        "time": record.now(),
        "versions": record.versions(),
        "machine": record.machine("cpu", torch.get_num_threads()),
        "git": record.git_state(),
        "seconds_of_the_last_start": round(time.monotonic() - begin, 1),
        **found,
    }
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(work, ignore_errors=True)
    return result


def together(found: Sequence[Json]) -> Json:
    """What all campaigns took, one after the other, with the machine they ran on."""
    seconds = {result["campaign"]: result["seconds_of_the_last_start"] for result in found}
    facts = {name: found[0][name] for name in ("form", "time", "versions", "machine", "git")}
    return {**facts, "seconds": seconds, "seconds_in_all": round(sum(seconds.values()), 1)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.torture", description="Torture campaigns."
    )
    parser.add_argument("names", nargs="*", choices=[*campaigns(), "all", []], metavar="NAME")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "reliability")
    options = parser.parse_args(argv)
    if not options.names:
        for name, module in campaigns().items():
            doc = importlib.import_module(module).__doc__ or ""
            print(f"{name:<14}{doc.strip().splitlines()[0]}")
        return 0
    failed, found = [], []
    options.out.mkdir(parents=True, exist_ok=True)
    for name in campaigns() if "all" in options.names else options.names:
        print(f"== {name}", flush=True)
        try:
            found.append(run(name, options.short, options.out.resolve()))
            print(json.dumps(found[-1], indent=1), flush=True)
        except AssertionError as error:
            failed.append(name)
            print(f"FAILED: {error}", flush=True)
    if options.short and not failed and "all" in options.names:
        (options.out / "short.json").write_text(json.dumps(together(found), indent=1) + "\n")
    print(f"failed: {', '.join(failed) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
