"""`conadv plan` against measurements that it has not seen.

    python benchmarks/plan_check.py --out results/plan [--rates 1600,800,400] [--only PLACE...]

1. Profiles: `conadv plan --measure all` on one process, and on two at once (both cores busy), at local batches 4, 8, 16
   and 32. They are all that the planner gets.
2. Cases: step times of other batches, methods, ranks, links and splits, in fresh processes. Links of a given rate are
   between two network namespaces (benchmarks/two_hosts.sh, as root); their rate is given to the planner, not measured.
3. Predicted against measured: relative error of every case, median and worst. JSON in OUT/plan_check.json.

Profiles and cases lie in OUT as they are measured, and are not measured again: an interrupted check goes on where it
stopped (delete OUT to start anew). About 8 minutes on 2 quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WARMUP_STEPS, BURSTS, LONGEST_BURST = 3, 5, 6
SECONDS_PER_BURST = 2.0


@dataclass(frozen=True)
class Case:
    """Something to measure and to predict. place: "1", "2" or "3" processes on this machine, or the rate of a link."""

    place: str
    method: str
    micro_batch: int
    accumulation: int = 1
    attack_ranks: int = 0

    @property
    def name(self) -> str:
        split = (
            f" {self.processes - self.attack_ranks}:{self.attack_ranks}"
            if self.attack_ranks
            else ""
        )
        where = f"{self.place} process(es)" if self.place.isdigit() else f"2 hosts, {self.place}"
        return f"{self.method}{split}, {self.micro_batch} x {self.accumulation}, {where}"

    @property
    def processes(self) -> int:
        return int(self.place) if self.place.isdigit() else 2


def cases(rates: list[str]) -> list[Case]:
    """No batch is one of the profiles', and no profile has seen a link with a limit or an attack rank."""
    alone = [Case("1", "noise", 24), Case("1", "conadv", 12), Case("1", "recycle", 12, 2)]
    loopback = [
        Case("2", "vanilla", 24),
        Case("2", "noise", 12),
        Case("2", "disadv", 24),
        Case("2", "conadv", 12),
        Case("2", "conadv", 24),
        Case("2", "conadv-lookahead", 6, 2),
    ]
    split = [
        Case("2", "conadv", 12, 1, attack_ranks=1),
        Case("2", "conadv", 12, 2, attack_ranks=1),
        Case("2", "conadv-lookahead", 24, 1, attack_ranks=1),
        Case("3", "conadv", 12, 1, attack_ranks=1),
    ]
    limited = [
        Case(rate, method, 12)
        for rate in rates
        for method in ("noise", "disadv", "conadv", "conadv-lookahead")
    ]
    return [*alone, *loopback, *split, *limited]


# ---- one process of a place


def worker(profile_path: Path, out: Path, chosen: list[Case]) -> None:
    """Measure the cases that ``out`` lacks in this process, one of torchrun's; rank 0 writes after each of them."""
    import torch

    from conadv.distributed.comm import Comm
    from conadv.plan import load
    from conadv.training.allocator import keep_freed_memory
    from conadv.training.record import write_atomic

    torch.set_num_threads(1)
    keep_freed_memory()
    workload = load(profile_path).workload
    world = Comm.from_environment("cpu", 120.0)
    found = world.broadcast_object(read(out) if world.is_main else None)
    for case in (case for case in chosen if case.name not in found):
        seconds = measure(case, workload, world)
        if world.is_main:
            found[case.name] = {"case": asdict(case), "step_seconds": seconds}
            write_atomic(out, json.dumps(found, indent=1) + "\n")
            print(f"  {case.name}: {1e3 * statistics.median(seconds):.1f} ms", flush=True)
    world.close()


def read(path: Path) -> dict[str, Any]:
    """The cases that are measured already."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def measure(case: Case, workload: Any, world: Any) -> list[float]:
    """Mean step time of each burst, on rank 0, which is a learner."""
    from conadv.distributed.teams import make_teams
    from conadv.plan.workload import batches, build_step
    from conadv.types import Batch

    teams = make_teams(world, case.attack_ranks) if case.attack_ranks else None
    comm, executor = world, None
    numbers = range(world.rank * case.accumulation, (world.rank + 1) * case.accumulation)
    if teams is not None:
        from conadv.engine import Ranks

        comm, executor, numbers = teams.comm, Ranks(teams), teams.micro_batches(case.accumulation)
    engine = build_step(workload, case.method, comm, executor)
    source = batches(workload, numbers, case.micro_batch, engine.device, engine.ahead)
    if teams is not None and teams.attacking:
        engine.serve(source)
        engine.executor.close()
        return []
    micro = next(source).micro

    def step(last: bool = False) -> None:
        t = engine.version
        engine(
            Batch(t, micro), Batch(t + engine.ahead, micro) if engine.ahead and not last else None
        )

    seconds = bursts(step, comm)
    step(last=True)
    if teams is not None:
        engine.executor.close()
    return seconds


def bursts(step: Callable[[], None], comm: Any) -> list[float]:
    """Mean seconds of a step in each burst; slow steps have shorter bursts."""
    for _ in range(WARMUP_STEPS):
        begin = time.perf_counter()
        step()
    once = time.perf_counter() - begin
    steps = comm.broadcast_object(max(2, min(LONGEST_BURST, round(SECONDS_PER_BURST / once))))
    seconds = []
    for _ in range(BURSTS):
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        seconds.append((time.perf_counter() - begin) / steps)
    return seconds


# ---- the check


def main() -> None:
    options = _options()
    chosen = [
        case for case in cases(options.rates) if not options.only or case.place in options.only
    ]
    if options.worker is not None:
        worker(
            options.profile,
            options.worker,
            [case for case in chosen if case.place == options.place],
        )
        return
    options.out.mkdir(parents=True, exist_ok=True)
    profiles = {number: profile(options, number) for number in (1, 2)}
    measured: dict[str, Any] = {}
    for place in dict.fromkeys(case.place for case in chosen):
        here = [case for case in chosen if case.place == place]
        measured |= run_place(options, place, here, profiles[1 if place == "1" else 2])
    rows = [compare(case, measured[case.name], profiles) for case in chosen]
    show(rows)
    write(options, rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--rates", default="1600,800,400", help="of the link between two hosts, Mbit/s; needs root"
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        help="places: 1, 2 or 3 processes, or a rate such as 400mbit",
    )
    parser.add_argument("--rounds", type=int, default=4, help="of the profiles")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--two-hosts", type=Path, default=ROOT / "benchmarks" / "two_hosts.sh")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    parser.add_argument("--profile", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rates = [f"{rate}mbit" for rate in options.rates.split(",") if rate]
    options.out = options.out.resolve()
    return options


def profile(options: argparse.Namespace, processes: int) -> Path:
    """The profile with that many busy processes, measured if it is not there."""
    path: Path = options.out / f"profile-{processes}.json"
    if not path.exists():
        print(f"profile with {processes} process(es)", flush=True)
        asked = ["-m", "conadv", "plan", str(path), "--measure", "all", "--workload.threads", "1"]
        asked += ["--workload.model", options.model, "--workload.batches", "4,8,16,32"]
        torchrun(processes, [*asked, "--workload.rounds", str(options.rounds)])
    return path


def run_place(
    options: argparse.Namespace, place: str, here: list[Case], profile_path: Path
) -> dict[str, Any]:
    """All cases of one place, in one launch for those that are not measured yet."""
    path = options.out / f"cases-{place}.json"
    if missing(path, here):
        print(
            f"cases on {place} process(es)"
            if place.isdigit()
            else f"cases between two hosts at {place}",
            flush=True,
        )
        asked = [
            str(Path(__file__).resolve()),
            "--out",
            str(options.out),
            "--rates",
            ",".join(rate.removesuffix("mbit") for rate in options.rates),
        ]
        asked += [
            "--worker",
            str(path.resolve()),
            "--place",
            place,
            "--profile",
            str(profile_path.resolve()),
        ]
        if place.isdigit():
            torchrun(int(place), asked)
        else:
            two_hosts(options, place, asked, lambda: not missing(path, here))
    return read(path)


def missing(path: Path, here: list[Case]) -> bool:
    return not read(path).keys() >= {case.name for case in here}


def torchrun(processes: int, arguments: list[str]) -> None:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    subprocess.run([*launcher, *arguments], check=True, env=environment(), cwd=ROOT)


def two_hosts(
    options: argparse.Namespace, place: str, arguments: list[str], done: Callable[[], bool]
) -> None:
    """Run a worker on each of two hosts with a link of that rate between them: benchmarks/two_hosts.sh makes them."""
    node = ["--nnodes", "2", "--nproc-per-node", "1", "--master-port", "29500"]
    launcher = f'{shlex.quote(sys.executable)} -m torch.distributed.run --node-rank "$HOST" --master-addr "$MASTER"'
    command = f"{launcher} {shlex.join([*node, *arguments])}"
    scratch = options.out / f"hosts-{place}"
    given = environment() | {"CONADV_TWO_HOSTS_COMMAND": command, "PYTHON": sys.executable}
    asked = [
        "bash",
        str(options.two_hosts),
        "--out",
        str(scratch),
        "--force",
        place.removesuffix("mbit"),
    ]
    ran = subprocess.run(asked, env=given, cwd=ROOT, capture_output=True, text=True)
    if not done():  # what the script says of its own benchmark, which did not run, does not matter
        logs = [f"{log}:\n{log.read_text()[-1500:]}" for log in scratch.glob("*.log")]
        raise SystemExit("\n".join([f"{shlex.join(asked)} failed:", ran.stdout, ran.stderr, *logs]))


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def compare(case: Case, found: Any, profiles: dict[int, Path]) -> dict[str, Any]:
    """Predicted and measured step time of a case."""
    from conadv.plan import Layout, Planner, load
    from conadv.plan.command import link_of

    loaded = load(profiles[1 if case.place == "1" else 2])
    rate = None if case.place.isdigit() else gbit(case.place)
    link = link_of(loaded, rate, None) if case.processes > 1 else None
    planner = Planner(loaded, link, processors=os.cpu_count())
    layout = Layout(
        case.processes - case.attack_ranks, case.attack_ranks, case.micro_batch, case.accumulation
    )
    predicted = planner.predict(case.method, layout)
    measured = statistics.median(found["step_seconds"])
    return {
        "name": case.name,
        "case": asdict(case),
        "measured_ms": 1e3 * measured,
        "predicted_ms": 1e3 * predicted.step,
        "error": predicted.step / measured - 1,
        "limit": planner.limit(predicted),
        "bursts_ms": [1e3 * value for value in found["step_seconds"]],
        "phases_ms": {
            name: 1e3 * getattr(predicted, name)
            for name in ("gradient", "attack", "wait", "receive", "rest")
        },
    }


def gbit(rate: str) -> float:
    """ "400mbit" in Gbit/s."""
    return float(rate.removesuffix("mbit")) * 1e-3


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    errors = [abs(row["error"]) for row in rows]
    return {
        "cases": len(rows),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
    }


def show(rows: list[dict[str, Any]]) -> None:
    width = max(len(row["name"]) for row in rows)
    print(f"{'':{width}} {'measured ms':>12} {'predicted ms':>13} {'error':>8}  limit")
    for row in rows:
        numbers = (
            f"{row['measured_ms']:12.1f} {row['predicted_ms']:13.1f} {100 * row['error']:+7.1f}%"
        )
        print(f"{row['name']:{width}} {numbers}  {row['limit']}")
    found = summary(rows)
    print(
        f"median error {100 * found['median_error']:.1f} %, worst {100 * found['worst_error']:.1f} %"
    )


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from conadv.training.record import git_state, machine, now, versions

    facts = {
        "machine": machine("cpu", 1),
        "versions": versions(),
        "git": git_state(),
        "measured_at": now(),
    }
    content = facts | {"summary": summary(rows), "rows": rows}
    (options.out / "plan_check.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
