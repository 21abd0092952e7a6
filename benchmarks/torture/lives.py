"""Lives of a run: the program in processes from a fork server, one of which is killed or silenced
at a chosen place.

A place is (site, count): the count-th time that the process comes there it ends itself with
SIGKILL, which nothing can catch, or stops itself with SIGSTOP. ("timer", seconds) does so wherever
the process is by then.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "benchmarks.torture.lives",
        "conadv.training.loop",
        "conadv.cli.program",
        "sklearn.datasets",
    ]
)
LIMIT = 180.0  # seconds after which a process that is still alive is a failure
Fault = tuple[str, float]
STEPS = 12
BASE = (
    f"--global-batch-size 192 --micro-batch-size 32 --steps {STEPS} --model.width 4 --optim.lr 2 "
    "--schedule.warmup-epochs 0.5 --eval.every-epochs 0.5 --eval.robust-images 32 "
    "--eval.robust-steps 1 "
    "--eval.train-images 100 --checkpoint.every-epochs 0.25 --checkpoint.keep 2"
)


class Setup(NamedTuple):
    """How many ranks there are, how many of them only attack, and the options that differ from
    BASE.
    """

    ranks: int
    attackers: int
    options: str


class Site(NamedTuple):
    """The call owner.name. ``count``: how often a process may come there in STEPS steps; ``after``:
    fail behind it.

    ``before`` does half of what the call would do. ``first``: only rank 0 comes there.
    """

    owner: str
    name: str
    count: int
    after: bool = False
    first: bool = False
    before: Callable[..., None] = lambda *_, **__: None


def _half_a_write(sealed: Any, data: Any) -> None:
    sealed._file.write(bytes(data)[: len(data) // 2])
    sealed._file.flush()


def _half_a_line(record: Any, kind: str, **_: Any) -> None:
    if record._file is not None:
        os.write(record._file.fileno(), b'{"type": "' + kind.encode()[:2])


_CHECKPOINT = "conadv.training.checkpoint"
SITES = {
    "half a checkpoint": Site(
        f"{_CHECKPOINT}:_Sealed", "write", 150, first=True, before=_half_a_write
    ),
    "half a line": Site(
        "conadv.training.record:Record", "write", 20, first=True, before=_half_a_line
    ),
    "checkpoint before its rename": Site(_CHECKPOINT, "verify", 12, after=True, first=True),
    "between rename and fsync": Site(_CHECKPOINT, "sync_folder", 12, first=True),
    "before older ones are removed": Site(_CHECKPOINT, "prune", 12, first=True),
    "in the start of the folder": Site("conadv.training.run_dir:RunDir", "mark", 1, first=True),
    "record cut, not yet renamed": Site("os", "fsync", 25, after=True, first=True),
    "in an evaluation": Site("conadv.training.results", "evaluate", 6),
    "in accumulation": Site("torch.autograd", "backward", 60, after=True),
    "a batch has begun to wait": Site("conadv.engine.pending:Pending", "put", 12, after=True),
    "before the update": Site("conadv.engine.step:TrainStep", "update", 12),
    "in an attack": Site("torch.autograd", "grad", 12),
}


def arm(fault: Fault, end: int) -> None:
    """Set the fault in this process, which then sends itself the signal ``end``."""
    name, count = fault

    def die() -> None:
        os.kill(os.getpid(), end)

    if name == "timer":
        timer = threading.Timer(count, die)
        timer.daemon = True
        timer.start()
        return
    site = SITES[name]
    owner, calls = resolve_name(site.owner), [0]
    original = getattr(owner, site.name)

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == count and not site.after:
            site.before(*args)
            die()
        found = original(*args, **options)
        if calls[0] == count and site.after:
            die()
        return found

    setattr(owner, site.name, counted)


def arguments(setup: Setup, out: Path, timeout: float = 60) -> list[str]:
    """The program's command line for a run in ``out``, the same at every start."""
    common = f"--auto-resume --device cpu --threads 1 --quiet --comm-timeout {timeout}"
    roles = f"--attack-ranks {setup.attackers} --out"
    return ["train", "digits", *f"{BASE} {setup.options} {common} {roles}".split(), str(out)]


def _live(
    args: list[str], environment: dict[str, str], fault: Fault | None, log: str, end: int
) -> None:
    """What a process does: become the program."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    import torch

    from conadv.cli.program import main

    torch.set_num_threads(1)
    if fault is not None:
        arm(fault, end)
    os._exit(main(args))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def live(
    args: list[str],
    ranks: int,
    log: Path,
    fault: Fault | None = None,
    victim: int = 0,
    *,
    end: signal.Signals = signal.SIGKILL,
    alone: bool = False,
) -> tuple[list[int], float]:
    """Run the program on ``ranks`` processes, of which ``victim`` has the fault.

    As a launcher does, the others are killed when one has died; with ``alone`` nobody ends them.
    Returns exit codes, and the seconds from the victim's end to that of the last other one.
    AssertionError if a process outlives LIMIT seconds.
    """
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    common |= {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    processes: list[Any] = []
    for rank in range(ranks):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        values = (args, environment, fault if rank == victim else None, str(log), int(end))
        processes.append(CONTEXT.Process(target=_live, args=values))
        processes[-1].start()
    waited = [process for rank, process in enumerate(processes) if not (alone and rank == victim)]
    limit, lost = time.monotonic() + LIMIT, 0.0
    try:
        while any(p.is_alive() for p in waited) and (
            alone or not any(p.exitcode for p in processes)
        ):
            assert time.monotonic() < limit, f"alive after {LIMIT:g} s: {log.read_text()[-2000:]}"
            sentinels = [p.sentinel for p in waited if p.is_alive()]
            multiprocessing.connection.wait(sentinels, timeout=0.1)
            if not lost and _is_lost(processes[victim].pid):
                lost = time.monotonic()
        seconds = time.monotonic() - lost if lost else 0.0
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [int(process.exitcode or 0) for process in processes], seconds


def _is_lost(pid: int) -> bool:
    """Whether a process is stopped, a zombie, or gone (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TZX"
    except OSError:
        return True


def finished(args: list[str], ranks: int, log: Path, what: str) -> None:
    """Run the program to its end. AssertionError if it does not end well."""
    codes, _ = live(args, ranks, log)
    assert not any(codes), f"{what}: exit codes {codes}; {log.read_text()[-2000:]}"


def whole(setup: Setup, out: Path, timeout: float = 60) -> Path:
    """The run that nothing happens to."""
    if not (out / "summary.json").exists():
        remove(out)
        args = arguments(setup, out, timeout)
        finished(args, setup.ranks, out.with_suffix(".log"), "the run without a fault")
    return out


def remove(out: Path) -> None:
    """A trial's run and its log; the folder for both is made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    out.with_suffix(".log").unlink(missing_ok=True)


def compare(a: Path, b: Path, what: str) -> None:
    """AssertionError unless two runs have the same bits, the same results and, but for times, the
    same record.
    """
    import torch

    from conadv.training.checkpoint import load_newest, steps
    from conadv.training.record import read_lines

    assert steps(a / "checkpoints") == steps(b / "checkpoints"), f"{what}: other checkpoints"
    states = [load_newest(run / "checkpoints", torch.device("cpu")) for run in (a, b)]
    assert same(*states), f"{what}: the last checkpoints differ"
    records = [numbers(read_lines(run / "record.jsonl")) for run in (a, b)]
    found = [line["step"] for line in records[0] if line["type"] == "step"]
    assert found == list(range(states[0]["step"])), f"{what}: the record has the steps {found}"
    assert records[0] == records[1], f"{what}: the records differ"
    results = [json.loads((run / "summary.json").read_text()) for run in (a, b)]
    for name in ("train_loss", "test_accuracy", "robust_accuracy", "validation_accuracy"):
        assert results[0][name] == results[1][name], f"{what}: {name} differs"


def numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps and evaluations without times."""
    times = ("time", "phases", "seconds", "spans")
    kept = (line for line in lines if line["type"] in ("step", "eval"))
    return [{key: value for key, value in line.items() if key not in times} for line in kept]


def same(a: Any, b: Any) -> bool:
    """Same structure, same bits."""
    import torch

    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        # as bytes: -0.0 equals 0.0, and NaN nothing
        return alike and torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
