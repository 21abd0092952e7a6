"""SIGKILL at random places of runs on 1, 2 and 3 ranks; resumed runs end with the bits of
uninterrupted ones.

A trial is one run directory, killed up to KILLS times and then left to finish, always by the same
command (``--auto-resume``). After every kill the newest checkpoint must be intact.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

from . import trials
from .lives import SITES, Fault, Setup, arguments, compare, finished, live, remove, whole

KILLS = 4
FULL, SHORT = 78, 2  # trials
SEED = 5
_CONADV = "--method conadv --staleness 2"
_LAMB = "--optim.name lamb --optim.lr 0.01 --data.augment basic --data.num-workers 2"
SETUPS = {
    "1 rank, tau 2, uint8": Setup(1, 0, f"{_CONADV} --pending-dtype uint8"),
    "2 ranks, background": Setup(2, 0, f"{_CONADV} --checkpoint.background"),
    "3 ranks, 1 attacks": Setup(3, 1, "--method conadv --lookahead"),
    "1 rank, workers": Setup(1, 0, f"--method conadv --lookahead {_LAMB} --checkpoint.background"),
    "3 ranks": Setup(3, 0, "--method disadv --optim.name sgd --optim.lr 0.05"),
    "2 ranks, recycle, the best kept": Setup(
        2, 0, "--method recycle --data.validation-images 64 --checkpoint.keep-best"
    ),
}


def draw(choices: random.Random, setup: Setup, short: bool) -> tuple[Fault, int]:
    """A fault and the rank that has it. In the short form it is one that the first life reaches on
    any machine.
    """
    names = [name for name in SITES if name != "in an attack"]
    name = choices.choice(names if short else ["timer", *names])
    if name == "timer":
        return (name, choices.uniform(0.0, 3.0 + setup.ranks)), choices.randrange(setup.ranks)
    learners = setup.ranks - setup.attackers
    victim = 0 if SITES[name].first else choices.randrange(learners)
    return (name, choices.randint(1, max(1, SITES[name].count // (3 if short else 1)))), victim


def trial(number: int, short: bool, folder: Path) -> dict[str, Any]:
    """Kill one run up to KILLS times, let it finish, compare."""
    name = list(SETUPS)[number % len(SETUPS)]
    setup, choices, places = SETUPS[name], random.Random(f"{SEED}/{number}"), []
    out = folder / str(number)
    remove(out)
    log, args = out.with_suffix(".log"), arguments(setup, out)
    for _ in range(2 if short else KILLS):
        fault, victim = draw(choices, setup, short)
        codes, _ = live(args, setup.ranks, log, fault, victim)
        if codes[victim] == -9:
            places.append([fault[0], round(fault[1], 3), victim, intact(out)])
        else:  # it finished before it came there
            assert not any(codes), f"{name}, {fault}: exit codes {codes}; {log.read_text()[-2000:]}"
    what = f"trial {number}, {name}, after {places}"
    finished(args, setup.ranks, log, what)
    compare(out, whole(setup, folder / f"whole{number % len(SETUPS)}"), what)
    remove(out)
    return {"setup": name, "kills": places}


def intact(out: Path) -> int:
    """The step of the newest checkpoint after a kill, which must be intact; 0 where there is none
    yet.
    """
    import torch

    from conadv.training.checkpoint import find_newest, steps

    if not steps(out / "checkpoints"):
        return 0
    state, damaged = find_newest(out / "checkpoints", torch.device("cpu"))
    assert not damaged, f"a kill has left a damaged checkpoint: {damaged}"
    return int(state["step"])


def run(short: bool, out: Path) -> dict[str, Any]:
    """The short form takes the first setup of 1 and 2 ranks."""
    done = trials(out, SHORT if short else FULL, lambda n: trial(n, short, out))
    kills = [kill for made in done for kill in made["kills"]]
    return {
        "seed": SEED,
        "kills": len(kills),
        "runs": len(done),
        "kills_by_site": dict(Counter(kill[0] for kill in kills).most_common()),
        "kills_by_setup": dict(Counter(made["setup"] for made in done for _ in made["kills"])),
        "runs_that_differ": 0,
        "damaged_checkpoints": 0,
    }
