"""A link between two hosts that falls silent, for good or for five seconds, under two learners or
an attack rank.

The hosts are network namespaces (root and iproute2 needed). Five seconds must cost nothing but
time. For good: two learners both end by themselves with exit code 2 in time, and the same command
finishes the run; a learner whose attack rank is behind the link finishes by ``--on-attack-loss
continue``. All of them with the bits of a run without a fault.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from . import trials
from .lives import Setup, arguments, compare, finished, free_port, remove, whole

FULL, SHORT = 24, 1
SEED = 9
TIMEOUT = 20.0  # --comm-timeout; an attack rank is given up after half of it
MARGIN = 20.0
LIMIT = 240.0
OUTAGE = 5.0
HOSTS = ("10.178.0.1", "10.178.0.2")
_OPTIONS = "--method conadv --staleness 2 --steps 150 --eval.every-epochs None"
SETUPS = {
    "learners": Setup(2, 0, _OPTIONS),
    "attack": Setup(2, 1, f"{_OPTIONS} --on-attack-loss continue"),
}
KINDS = (
    ("five seconds", "learners"),
    ("for good", "learners"),
    ("for good", "attack"),
    ("five seconds", "attack"),
)


def ip(command: str, *, check: bool = True) -> None:
    subprocess.run(["ip", *command.split()], check=check, capture_output=True, timeout=20)


@contextmanager
def hosts() -> Iterator[list[str]]:
    """Two namespaces with an address each, joined by a pair of devices called "wire"."""
    a, b = names = [f"torture{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add wire netns {a} type veth peer name wire netns {b}")
        for name, host in zip(names, HOSTS, strict=True):
            ip(f"-n {name} address add {host}/24 dev wire")
            ip(f"-n {name} link set wire up")
            ip(f"-n {name} link set lo up")
        yield names
    finally:
        for name in names:
            ip(f"netns delete {name}", check=False)


def silence(names: list[str], on: bool = True) -> None:
    """Packets leave for an address that no device has: nothing arrives, and nobody is told. Or
    restore the link.
    """
    what = "replace {} lladdr 02:00:00:00:00:01 dev wire nud permanent" if on else "del {} dev wire"
    for name, other in zip(names, reversed(HOSTS), strict=True):
        ip(f"-n {name} neighbour {what.format(other)}")


@contextmanager
def started(names: list[str], args: list[str], log: Path) -> Iterator[list[Any]]:
    """A rank in each namespace; killed at the end if it is still there."""
    common = {**os.environ, "MASTER_ADDR": HOSTS[0], "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "wire"}
    common |= {"PYTHONPATH": os.pathsep.join(sys.path), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    processes = []
    with ExitStack() as stack, log.open("ab") as file:
        for rank, name in enumerate(names):
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "conadv", *args]
            environment = {**common, "RANK": str(rank)}
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)  # before it is waited for; ip has become the program
        yield processes


def wait_for(what: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < end, f"not after {LIMIT:g} s: {log.read_text()[-2000:]}"
        time.sleep(0.05)


def fault(kind: str, who: str, delay: float, args: list[str], out: Path) -> tuple[list[int], float]:
    """Exit codes, and the seconds from the fault to the end of both ranks (of the learner, where
    one attacks).
    """
    from conadv.training.checkpoint import steps

    log = out.with_suffix(".log")
    with hosts() as names, started(names, args, log) as ranks:
        awaited = ranks[:1] if (kind, who) == ("for good", "attack") else ranks
        wait_for(
            lambda: (steps(out / "checkpoints") or [0])[-1] >= 6 or ranks[0].poll() is not None, log
        )
        time.sleep(delay)
        assert ranks[0].poll() is None, f"ended before the fault: {log.read_text()[-2000:]}"
        silence(names)
        begin = time.monotonic()
        if kind == "five seconds":
            time.sleep(OUTAGE)
            silence(names, on=False)
        wait_for(lambda: all(rank.poll() is not None for rank in awaited), log)
        return [rank.poll() for rank in ranks], time.monotonic() - begin


def trial(number: int, folder: Path) -> dict[str, Any]:
    """One fault, and what became of the run."""
    from conadv.training.record import read_lines

    (kind, who), choices = KINDS[number % len(KINDS)], random.Random(f"{SEED}/{number}")
    setup, out = SETUPS[who], folder / str(number)
    remove(out)
    args, log = arguments(setup, out, TIMEOUT), out.with_suffix(".log")
    reference = whole(setup, folder / who, TIMEOUT)
    codes, seconds = fault(kind, who, choices.uniform(0.0, 1.0), args, out)
    what = f"trial {number}: silent {kind} under {who}; exit codes {codes} after {seconds:.1f} s; "
    what += log.read_text()[-1500:]
    if (kind, who) == ("for good", "learners"):
        assert codes == [2, 2], what
        assert seconds < TIMEOUT + MARGIN, what
        finished(args, 2, log, what)
    else:
        assert codes[0] == 0, what
        lost = sum(line["type"] == "attack_loss" for line in read_lines(out / "record.jsonl"))
        assert lost == (kind == "for good"), f"{lost} losses in the record: {what}"
    compare(out, reference, what)
    remove(out)
    return {"kind": f"{kind}, {who}", "seconds": seconds}


def run(short: bool, out: Path) -> dict[str, Any]:
    done = trials(out, SHORT if short else FULL, lambda n: trial(n, out))
    ended = [made["seconds"] for made in done if made["kind"] == "for good, learners"]
    return {
        "seed": SEED,
        "faults": len(done),
        "by_kind": dict(Counter(made["kind"] for made in done)),
        "outage_seconds": OUTAGE,
        "comm_timeout_seconds": TIMEOUT,
        "longest_until_both_ended": round(max(ended), 1) if ended else None,
        "runs_that_differ": 0,
    }
