"""A link between two hosts that falls silent, for good or for five seconds, under two learners or an attack rank.

The hosts are network namespaces (root and iproute2 needed). Five seconds must cost nothing but time. For good: two
learners both end by themselves with exit code 2 in time, and the same command finishes the run; a learner whose attack
rank is behind the link finishes by ``--on-attack-loss continue``. All of them with the bits of a run without a fault.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .lives import free_port, live
from .torture import HERE, Progress
from .torture_kill import BASE, compare

FULL, SHORT = 24, 1
SEED = 9
TIMEOUT = 20.0  # --comm-timeout; an attack rank is given up after half of it
MARGIN = 20.0
LIMIT = 240.0
OUTAGE = 5.0
STEPS = 150
HOSTS = ("10.178.0.1", "10.178.0.2")
KINDS = (
    ("five seconds", "learners"),
    ("for good", "learners"),
    ("for good", "attack"),
    ("five seconds", "attack"),
)


def ip(*args: object) -> None:
    subprocess.run(["ip", *map(str, args)], check=True, capture_output=True, timeout=20)


@contextmanager
def hosts() -> Iterator[list[str]]:
    """Two namespaces with an address each, joined by a pair of devices called "wire"."""
    names = [f"torture{os.getpid()}{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "wire",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "wire",
            "netns",
            names[1],
        )
        for name, host in zip(names, HOSTS, strict=True):
            ip("-n", name, "address", "add", f"{host}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(
                ["ip", "netns", "delete", name], check=False, capture_output=True, timeout=20
            )


def silence(names: list[str]) -> None:
    """Packets leave for an address that no device has: nothing arrives, and nobody is told."""
    for name, other in zip(names, reversed(HOSTS), strict=True):
        ip(
            "-n",
            name,
            "neighbour",
            "replace",
            other,
            "lladdr",
            "02:00:00:00:00:01",
            "dev",
            "wire",
            "nud",
            "permanent",
        )


def restore(names: list[str]) -> None:
    for name, other in zip(names, reversed(HOSTS), strict=True):
        ip("-n", name, "neighbour", "del", other, "dev", "wire")


def arguments(who: str, out: Path) -> list[str]:
    """The program's options for two ranks, both of which learn or one of which attacks."""
    from conadv.config import recipes
    from conadv.config.files import dump_yaml
    from conadv.config.schema import replace

    changes = {"method": "conadv", "staleness": 2, "steps": STEPS, "eval__every_epochs": None}
    out.parent.mkdir(parents=True, exist_ok=True)
    config = out.parent / f"{out.name}.yaml"
    config.write_text(dump_yaml(replace(recipes.get("digits"), **{**BASE, **changes})))
    options = [
        "--auto-resume",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--comm-timeout",
        str(TIMEOUT),
        "--quiet",
    ]
    roles = ["--attack-ranks", "1", "--on-attack-loss", "continue"] if who == "attack" else []
    return ["train", "--config", str(config), "--out", str(out), *roles, *options]


def whole(who: str, folder: Path) -> Path:
    """The run without a fault."""
    out = folder / "whole" / who
    if not (out / "summary.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        codes = live(arguments(who, out), 2, out.with_suffix(".log"))
        assert not any(codes), f"the run without a fault ended with {codes}; see {out}.log"
    return out


@contextmanager
def started(
    names: list[str], options: list[str], log: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A rank in each namespace; killed at the end if they are still there."""
    port, processes = str(free_port()), []
    common = {
        **os.environ,
        "MASTER_ADDR": HOSTS[0],
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    common |= {"GLOO_SOCKET_IFNAME": "wire", "PYTHONPATH": str(HERE.parent)}
    try:
        with log.open("ab") as file:
            for rank, name in enumerate(names):
                environment = {
                    **common,
                    "RANK": str(rank),
                    "LOCAL_RANK": "0",
                    "LOCAL_WORLD_SIZE": "1",
                }
                command = ["ip", "netns", "exec", name, sys.executable, "-m", "conadv", *options]
                processes.append(
                    subprocess.Popen(command, stdout=file, stderr=file, env=environment)
                )
        yield processes
    finally:
        for process in processes:
            process.kill()  # ip has become the program
            process.wait()


def wait_for(processes: list[subprocess.Popen[bytes]], what: Any, log: Path) -> None:
    end = time.monotonic() + LIMIT
    while not what():
        assert time.monotonic() < end, f"not after {LIMIT:g} s: {log.read_text()[-2000:]}"
        time.sleep(0.05)


def fault(kind: str, who: str, delay: float, out: Path, log: Path) -> tuple[list[int], float]:
    """Exit codes, and the seconds from the fault to the end of both ranks (the learner, where one attacks)."""
    from conadv.training.checkpoint import steps

    with hosts() as names, started(names, arguments(who, out), log) as ranks:
        ended = [lambda rank=rank: rank.poll() is not None for rank in ranks]
        wait_for(
            ranks,
            lambda: any(end() for end in ended) or (steps(out / "checkpoints") or [0])[-1] >= 6,
            log,
        )
        time.sleep(delay)
        assert not any(end() for end in ended), f"ended before the fault: {log.read_text()[-2000:]}"
        silence(names)
        begin = time.monotonic()
        if kind == "five seconds":
            time.sleep(OUTAGE)
            restore(names)
        wait_for(
            ranks,
            lambda: all(
                end() for end in ended[: 1 if kind == "for good" and who == "attack" else 2]
            ),
            log,
        )
        return [rank.poll() for rank in ranks], time.monotonic() - begin


def trial(number: int, folder: Path) -> dict[str, Any]:
    """One fault, and what became of the run."""
    from conadv.training.record import read_lines

    (kind, who), choices = KINDS[number % len(KINDS)], random.Random(f"{SEED}/{number}")
    out = folder / str(number)
    log = out.with_suffix(".log")
    shutil.rmtree(out, ignore_errors=True)
    log.unlink(missing_ok=True)
    reference = whole(who, folder)
    codes, seconds = fault(kind, who, choices.uniform(0.0, 1.0), out, log)
    what = (
        f"trial {number}: silent {kind} under {who}; exit codes {codes}; {log.read_text()[-1500:]}"
    )
    if (kind, who) == ("for good", "learners"):
        assert codes == [2, 2], what
        assert seconds < TIMEOUT + MARGIN, f"{seconds:.1f} s: {what}"
        assert not any(live(arguments(who, out), 2, log)), what
    else:
        assert codes[0] == 0, what
        lost = sum(line["type"] == "attack_loss" for line in read_lines(out / "record.jsonl"))
        assert lost == (kind == "for good"), f"{lost} losses in the record: {what}"
    compare(out, reference, what, STEPS)
    for left in (out, log, out.with_suffix(".yaml")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return {"kind": f"{kind}, {who}", "seconds": seconds}


def run(short: bool, out: Path) -> dict[str, Any]:
    progress = Progress(out)
    for number in range(len(progress.done), SHORT if short else FULL):
        progress.add(trial(number, out))
    ended = [made["seconds"] for made in progress.done if made["kind"] == "for good, learners"]
    return {
        "seed": SEED,
        "faults": len(progress.done),
        "by_kind": dict(Counter(made["kind"] for made in progress.done)),
        "outage_seconds": OUTAGE,
        "comm_timeout_seconds": TIMEOUT,
        "longest_until_both_ended": round(max(ended), 1) if ended else None,
        "runs_that_differ": 0,
    }
