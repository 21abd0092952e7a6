"""One life of a run for the campaigns: the program in processes that come from a fork server, killed at a given place.

A place is (site, count): the count-th time that the process comes there it kills itself with SIGKILL, which nothing can
catch. The sites lie inside the writes: half a checkpoint, half a line of the record, between a rename and the fsync of
its folder. ("timer", seconds) kills wherever the process is by then.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["benchmarks.lives", "conadv.training.loop", "conadv.cli.program", "sklearn.datasets"]
)
Fault = tuple[str, float]
LIMIT = 180.0


END = [signal.SIGKILL]  # what a fault sends to its process


def die() -> None:
    os.kill(os.getpid(), END[0])


def _at(
    owner: Any,
    name: str,
    count: float,
    before: Callable[..., None] | None = None,
    *,
    after: bool = False,
) -> None:
    """Kill this process at the count-th call of owner.name: before it (and after ``before``), or after it."""
    original, calls = getattr(owner, name), [0]

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == count and not after:
            if before is not None:
                before(*args)
            die()
        found = original(*args, **options)
        if calls[0] == count:
            die()
        return found

    setattr(owner, name, counted)


def _half_a_write(sealed: Any, data: Any) -> None:
    sealed._file.write(bytes(data)[: len(data) // 2])
    sealed._file.flush()


def _half_a_line(record: Any, kind: str, **_: Any) -> None:
    if record._file is not None:
        os.write(record._file.fileno(), b'{"type": "' + kind.encode()[:2])


def arm(fault: Fault) -> None:
    """Set the fault in this process."""
    from conadv.engine import gradient, pending, step
    from conadv.training import checkpoint, record, trainer
    from conadv.training import run_dir as run

    site, count = fault
    if site == "timer":
        timer = threading.Timer(count, die)
        timer.daemon = True
        timer.start()
    elif site == "half a checkpoint":
        _at(checkpoint._Sealed, "write", count, _half_a_write)
    elif site == "half a line":
        _at(record.Record, "write", count, _half_a_line)
    else:
        owner, name, after = {
            "checkpoint before its rename": (checkpoint, "verify", True),
            "between rename and fsync": (checkpoint, "sync_folder", False),
            "before older ones are removed": (checkpoint, "prune", False),
            "in the start of the folder": (run.RunDir, "mark", False),
            "record cut, not yet renamed": (os, "fsync", True),
            "in an evaluation": (trainer, "evaluate", False),
            "in accumulation": (gradient.GradientPass, "_micro_gradient", True),
            "a batch has begun to wait": (pending.Pending, "put", True),
            "before the update": (step.TrainStep, "update", False),
            "in an attack": (step.TrainStep, "attack_batch", False),
        }[site]
        _at(owner, name, count, after=after)


FIRST_RANK_ONLY = (
    "half a checkpoint",
    "half a line",
    "checkpoint before its rename",
    "between rename and fsync",
    "before older ones are removed",
    "in the start of the folder",
    "record cut, not yet renamed",
)
SITES = {  # how often a process may come there in a run of about 12 steps
    "half a checkpoint": 150,
    "half a line": 20,
    "checkpoint before its rename": 12,
    "between rename and fsync": 12,
    "before older ones are removed": 12,
    "in the start of the folder": 1,
    "record cut, not yet renamed": 25,
    "in an evaluation": 6,
    "in accumulation": 60,
    "a batch has begun to wait": 12,
    "before the update": 12,
}


def _live(
    arguments: list[str], environment: dict[str, str], fault: Fault | None, log: str, end: int
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
    END[0] = signal.Signals(end)
    if fault is not None:
        arm(fault)
    os._exit(main(arguments))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def live(
    arguments: list[str], ranks: int, log: Path, fault: Fault | None = None, victim: int = 0
) -> list[int]:
    """Run the program on ``ranks`` processes, of which ``victim`` has the fault; returns their exit codes.

    As a launcher does, the others are killed when one has died. AssertionError if a process outlives LIMIT seconds.
    """
    return _end(_begin(arguments, ranks, log, fault, victim, signal.SIGKILL), log, alone=None)


def live_alone(
    arguments: list[str], ranks: int, log: Path, fault: Fault, victim: int, end: signal.Signals
) -> tuple[list[int], float]:
    """As :func:`live`, but no launcher ends the others; the fault kills its process or, with SIGSTOP, silences it.

    Returns exit codes, the victim's being -9, and the seconds from the victim's end to that of the last other one.
    """
    processes = _begin(arguments, ranks, log, fault, victim, end)
    lost = [0.0]
    watcher = threading.Thread(target=_await_loss, args=(processes[victim].pid, lost), daemon=True)
    watcher.start()
    codes = _end(processes, log, alone=victim)
    return codes, time.monotonic() - lost[0] if lost[0] else 0.0


def _await_loss(pid: int, lost: list[float]) -> None:
    """Note when a process is stopped, a zombie, or gone (Linux)."""
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            state = "gone"
        if state in ("T", "Z", "X", "gone"):
            lost[0] = time.monotonic()
            return
        time.sleep(0.05)


def _begin(
    arguments: list[str],
    ranks: int,
    log: Path,
    fault: Fault | None,
    victim: int,
    end: signal.Signals,
) -> list[Any]:
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    common |= {"WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(ranks):
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        mine = fault if rank == victim else None
        processes.append(
            CONTEXT.Process(target=_live, args=(arguments, environment, mine, str(log), int(end)))
        )
        processes[-1].start()
    return processes


def _end(processes: list[Any], log: Path, alone: int | None) -> list[int]:
    """Wait for all processes, or until one has failed; with ``alone``, for all but that one, whatever they do."""
    end = time.monotonic() + LIMIT
    others = [process for rank, process in enumerate(processes) if rank != alone]
    try:
        while any(p.is_alive() for p in others) and (
            alone is not None or not any(p.exitcode for p in processes)
        ):
            assert time.monotonic() < end, f"alive after {LIMIT:g} s: {log.read_text()[-2000:]}"
            multiprocessing.connection.wait([p.sentinel for p in others if p.is_alive()], timeout=1)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [int(process.exitcode or 0) for process in processes]
