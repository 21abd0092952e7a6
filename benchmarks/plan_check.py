"""`conadv plan` against measurements that it has not seen.

    python benchmarks/plan_check.py --out results/plan [--rates 1600,800,400] [--only PLACE...]

1. Profiles: `conadv plan --measure all` on one process, and on two at once (both cores busy), at
local batches 4, 8, 16
   and 32. They are all that the planner gets.
2. Cases: step times of other batches, methods, ranks, links and splits, in fresh processes. Links
of a given rate are
   between two network namespaces (benchmarks/two_hosts.sh, as root); their rate is given to the
   planner, not measured.
3. Predicted against measured: relative error of every case, median and worst. JSON in
OUT/plan_check.json.

Profiles and cases lie in OUT as they are measured, and are not measured again: an interrupted check
goes on where it stopped (delete OUT to start anew). About 8 minutes on 2 quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from conadv.distributed.comm import Comm
from conadv.distributed.teams import make_teams
from conadv.engine.attack_ranks.executor import Ranks
from conadv.planning.cost_model import Layout, Planner, Prediction
from conadv.planning.measure import build_trial
from conadv.planning.profile import Workload, link_of, load
from conadv.planning.timing import WARMUP, burst
from conadv.safe_io import write_atomic
from conadv.training.allocator import keep_freed_memory
from conadv.training.provenance import git_state, machine, now, versions

ROOT = Path(__file__).resolve().parent.parent
BURSTS, STEPS = 5, 4
PHASES = ("gradient", "attack", "wait", "receive", "rest")
TWO = ("vanilla 24", "noise 12", "disadv 24", "conadv 12", "conadv 24", "conadv-lookahead 6 2")
SPLIT = ("2 conadv 12 1 1", "2 conadv 12 2 1", "2 conadv-lookahead 24 1 1", "3 conadv 12 1 1")
LINKED = ("noise", "disadv", "conadv", "conadv-lookahead")


@dataclass(frozen=True)
class Case:
    """Something to measure and to predict. place: processes on this machine, or a link's rate."""

    place: str
    method: str
    micro_batch: int
    accumulation: int = 1
    attack_ranks: int = 0

    @property
    def name(self) -> str:
        learners = self.processes - self.attack_ranks
        split = f" {learners}:{self.attack_ranks}" if self.attack_ranks else ""
        where = f"{self.place} process(es)" if self.place.isdigit() else f"2 hosts, {self.place}"
        return f"{self.method}{split}, {self.micro_batch} x {self.accumulation}, {where}"

    @property
    def processes(self) -> int:
        return int(self.place) if self.place.isdigit() else 2

    @property
    def profile(self) -> str:
        return f"profile-{1 if self.place == '1' else 2}.json"


def cases(rates: list[str]) -> list[Case]:
    """Batches that no profile has, attack ranks, and links with a limit."""
    texts = ["1 noise 24", "1 conadv 12", "1 recycle 12 2", *(f"2 {case}" for case in TWO), *SPLIT]
    texts += [f"{rate}mbit {method} 12" for rate in rates for method in LINKED]
    words = (text.split() for text in texts)
    return [Case(place, method, *map(int, numbers)) for place, method, *numbers in words]


def measure(case: Case, workload: Workload, world: Comm) -> list[float]:
    """Mean step time of each burst, on rank 0, which is a learner."""
    teams = make_teams(world, case.attack_ranks)
    trial = build_trial(
        workload,
        case.method,
        teams.comm,
        case.micro_batch,
        numbers=teams.micro_batches(case.accumulation),
        executor=Ranks(teams) if case.attack_ranks else None,
    )
    if teams.attacking:
        steps, ahead = BURSTS * (WARMUP + STEPS), trial.engine.ahead
        trial.engine.serve(map(trial.batch, range(ahead, steps + ahead)))
    seconds = [] if teams.attacking else [burst(trial.step, STEPS).seconds for _ in range(BURSTS)]
    trial.engine.executor.close()
    return seconds


def worker(options: argparse.Namespace, here: list[Case]) -> None:
    """Measure the cases of a place in this process, one of torchrun's; rank 0 writes."""
    torch.set_num_threads(1)
    keep_freed_memory()
    world = Comm.from_environment("cpu", 120.0)
    workload = load(options.out / here[0].profile).workload
    found = {case.name: measure(case, workload, world) for case in here}
    if world.is_main:
        path = options.out / f"cases-{options.place}.json"
        write_atomic(path, json.dumps(found, indent=1) + "\n")
    world.close()


def predict(case: Case, folder: Path) -> tuple[Planner, Prediction]:
    """By the profile in ``folder`` alone; the rate of a limited link is given."""
    profile = load(folder / case.profile)
    rate = None if case.place.isdigit() else float(case.place.removesuffix("mbit")) * 1e-3
    link = link_of(profile, rate, None) if case.processes > 1 else None
    planner = Planner(profile, link)
    learners = case.processes - case.attack_ranks
    layout = Layout(learners, case.attack_ranks, case.micro_batch, case.accumulation)
    return planner, planner.predict(case.method, layout)


def compare(case: Case, folder: Path, bursts: list[float]) -> dict[str, Any]:
    """Predicted and measured step time of a case."""
    planner, found = predict(case, folder)
    measured = statistics.median(bursts)
    return {
        "name": case.name,
        "case": asdict(case),
        "measured_ms": 1e3 * measured,
        "predicted_ms": 1e3 * found.step,
        "error": found.step / measured - 1,
        "limit": planner.limit(found),
        "bursts_ms": [1e3 * value for value in bursts],
        "phases_ms": {name: 1e3 * getattr(found, name) for name in PHASES},
    }


# ---- launching


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHON": sys.executable}


def torchrun(processes: int, arguments: list[str]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", str(processes), *arguments]
    subprocess.run(command, check=True, env=environment(), cwd=ROOT)


def two_hosts(out: Path, place: str, arguments: list[str]) -> None:
    """Run a worker on each of two hosts (benchmarks/two_hosts.sh) with a link of that rate."""
    node = ["--nnodes", "2", "--nproc-per-node", "1", "--master-port", "29500"]
    launcher = f"{shlex.quote(sys.executable)} -m torch.distributed.run"
    host = '--node-rank "$HOST" --master-addr "$MASTER"'
    command = f"{launcher} {host} {shlex.join([*node, *arguments])}"
    given = environment() | {"CONADV_TWO_HOSTS_COMMAND": command}
    script, scratch = ROOT / "benchmarks" / "two_hosts.sh", out / f"hosts-{place}"
    asked = ["bash", str(script), "--out", str(scratch), "--force", place.removesuffix("mbit")]
    subprocess.run(asked, env=given, cwd=ROOT, check=False)  # it misses its own benchmark's result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rates", default="1600,800,400", help="of the link, Mbit/s; needs root")
    parser.add_argument("--only", nargs="*", default=[], help="places: 1, 2, 3, or such as 400mbit")
    parser.add_argument("--rounds", default="4", help="of the profiles")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--place", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    rates = [rate for rate in options.rates.split(",") if rate]
    chosen = [case for case in cases(rates) if not options.only or case.place in options.only]
    if options.place is not None:
        worker(options, [case for case in chosen if case.place == options.place])
        return
    options.out.mkdir(parents=True, exist_ok=True)
    workload = f"--workload.threads 1 --workload.model {options.model} --workload.batches 4,8,16,32"
    for count in (1, 2):
        path = options.out / f"profile-{count}.json"
        asked = ["-m", "conadv", "plan", str(path), "--measure", "all", *workload.split()]
        if not path.exists():
            torchrun(count, [*asked, "--workload.rounds", options.rounds])
    measured: dict[str, list[float]] = {}
    for place in dict.fromkeys(case.place for case in chosen):
        path = options.out / f"cases-{place}.json"
        asked = [__file__, "--out", str(options.out), "--rates", options.rates, "--place", place]
        if not path.exists():
            print(f"cases of {place}", flush=True)
            torchrun(int(place), asked) if place.isdigit() else two_hosts(options.out, place, asked)
        measured |= json.loads(path.read_text())
    rows = [compare(case, options.out, measured[case.name]) for case in chosen]
    errors = [abs(row["error"]) for row in rows]
    for row in rows:
        times = f"{row['measured_ms']:10.1f} {row['predicted_ms']:10.1f} {row['error']:+8.1%}"
        print(f"{row['name']:<48}{times}  {row['limit']}")
    print(f"median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    summary = {"cases": len(rows), "median_error": statistics.median(errors)}
    facts = {"machine": machine("cpu", 1), "versions": versions(), "git": git_state()}
    content = facts | {"measured_at": now(), "rows": rows}
    content["summary"] = summary | {"worst_error": max(errors)}
    (options.out / "plan_check.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
