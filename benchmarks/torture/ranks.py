"""Ranks that die or fall silent at random places, learners and attack ranks, with no launcher that
ends the others.

By ``--on-attack-loss continue`` the learners of a run that loses an attack rank must finish it with
the bits of the run that lost nothing, and the record must say so. Otherwise every other rank must
end by itself with exit code 2 and an error, within the timeout and what the diagnosis may take; the
same command then finishes the run with the same bits.
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from . import trials
from .lives import STEPS, Fault, Setup, arguments, compare, finished, live, remove, whole

FULL, SHORT = 60, 2
SEED = 8
TIMEOUT = 10.0  # --comm-timeout of runs that lose a rank
MARGIN = 15.0  # seconds: 5 for the diagnosis, the rest for the end of a process on a busy machine
SETUPS = {
    "1 learner, 1 attack rank": Setup(2, 1, "--method conadv --staleness 1 --lookahead"),
    "2 learners, 1 attack rank": Setup(3, 1, "--method conadv --staleness 2 --pending-dtype uint8"),
    "1 learner, 2 attack ranks": Setup(3, 2, "--method conadv --staleness 3"),
}
LEARNERS_SITES = {"in accumulation": 60, "before the update": STEPS}


def draw(choices: random.Random, setup: Setup, policy: str) -> tuple[Fault, int]:
    """A fault and the rank that has it, which is an attack rank where learners go on."""
    learners = setup.ranks - setup.attackers
    victim = choices.randrange(learners if policy == "continue" else 0, setup.ranks)
    if victim >= learners:
        return ("in an attack", choices.randint(1, STEPS - 3)), victim
    site = choices.choice(list(LEARNERS_SITES))
    return (site, choices.randint(1, LEARNERS_SITES[site] // learners)), victim


def trial(number: int, folder: Path) -> dict[str, Any]:
    """Lose one rank, compare."""
    from conadv.training.record import read_lines

    choices = random.Random(f"{SEED}/{number}")
    policy = ("continue", "stop")[number % 2]
    end = signal.SIGKILL if number % 4 < 2 else signal.SIGSTOP
    name = list(SETUPS)[number // 4 % len(SETUPS)]
    setup, out = SETUPS[name], folder / str(number)
    fault, victim = draw(choices, setup, policy)
    remove(out)
    log = out.with_suffix(".log")
    setup = setup._replace(options=f"{setup.options} --on-attack-loss {policy}")
    args = arguments(setup, out, TIMEOUT)
    codes, seconds = live(args, setup.ranks, log, fault, victim, end=end, alone=True)
    what = (
        f"trial {number}: {name}, {policy}, {end.name} of rank {victim} {fault}; exit codes {codes}"
    )
    what += f" after {seconds:.1f} s; {log.read_text()[-1500:]}"
    others = {code for rank, code in enumerate(codes) if rank != victim}
    assert codes[victim] == -signal.SIGKILL, f"the fault was not reached: {what}"
    if policy == "continue":
        assert others == {0}, what
        lines = read_lines(out / "record.jsonl")
        lost = {line["attack_rank"] for line in lines if line["type"] == "attack_loss"}
        assert lost == {victim}, f"the record says that {lost} were lost: {what}"
    else:
        assert others == {2}, what
        assert "communication failed in phase" in what
        assert seconds < TIMEOUT + MARGIN, what
        finished(args, setup.ranks, log, what)
    reference = folder / f"whole{number // 4 % len(SETUPS)}"
    compare(out, whole(setup, reference, TIMEOUT), what)
    remove(out)
    values = {"policy": policy, "signal": end.name, "setup": name, "site": fault[0]}
    return {**values, "seconds": seconds}


def run(short: bool, out: Path) -> dict[str, Any]:
    done = trials(out, SHORT if short else FULL, lambda n: trial(n, out))
    by = {f"by_{key}": dict(Counter(made[key] for made in done)) for key in list(done[0])[:4]}
    ended = [made["seconds"] for made in done if made["policy"] == "stop"]
    return {
        "seed": SEED,
        "ranks_lost": len(done),
        **by,
        "comm_timeout_seconds": TIMEOUT,
        "longest_until_the_others_ended": round(max(ended, default=0.0), 1),
        "runs_that_differ": 0,
    }
