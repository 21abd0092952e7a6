"""Ranks that die or fall silent at random places, learners and attack ranks, with no launcher that ends the others.

By ``--on-attack-loss continue`` the learners of a run that loses an attack rank must finish it with the bits of the run
that lost nothing, and the record must say so. Otherwise every other rank must end by itself with exit code 2 and an
error, within the timeout and what the diagnosis may take; the same command then finishes the run with the same bits.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from .lives import Fault, live, live_alone
from .torture import Progress
from .torture_kill import BASE, compare

FULL, SHORT = 60, 2
SEED = 8
TIMEOUT = 10.0  # --comm-timeout of runs that lose a rank
MARGIN = 15.0  # seconds beyond it: 5 for the diagnosis, the rest for the end of a process on a busy machine

SETUPS: dict[
    str, tuple[int, int, dict[str, Any]]
] = {  # ranks, how many of them only attack, settings
    "1 learner, 1 attack rank": (2, 1, {"staleness": 1, "lookahead": True}),
    "2 learners, 1 attack rank": (3, 1, {"staleness": 2, "pending_dtype": "uint8"}),
    "1 learner, 2 attack ranks": (3, 2, {"staleness": 3}),
}
LEARNERS_SITES = {
    "in accumulation": 60,
    "before the update": 12,
}  # how often a learner may come there


def arguments(setup: str, out: Path, policy: str) -> list[str]:
    """The program's options for a run of ``setup`` in ``out``; its config lies beside it."""
    from conadv.config import recipes
    from conadv.config.files import dump_yaml
    from conadv.config.schema import replace

    _, attackers, changes = SETUPS[setup]
    out.parent.mkdir(parents=True, exist_ok=True)
    config = out.parent / f"{out.name}.yaml"
    config.write_text(
        dump_yaml(replace(recipes.get("digits"), **{**BASE, **changes, "method": "conadv"}))
    )
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
    roles = ["--attack-ranks", str(attackers), "--on-attack-loss", policy]
    return ["train", "--config", str(config), "--out", str(out), *roles, *options]


def whole(setup: str, folder: Path) -> Path:
    """The run that loses nothing."""
    out = folder / "whole" / str(list(SETUPS).index(setup))
    if not (out / "summary.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        codes = live(arguments(setup, out, "stop"), SETUPS[setup][0], out.with_suffix(".log"))
        assert not any(codes), (
            f"{setup}: the run that loses nothing ended with {codes}; see {out}.log"
        )
    return out


def draw(choices: random.Random, setup: str, policy: str) -> tuple[Fault, int]:
    """A fault and the rank that has it, which is an attack rank where learners go on."""
    ranks, attackers, changes = SETUPS[setup]
    learners = ranks - attackers
    victim = choices.randrange(learners if policy == "continue" else 0, ranks)
    if victim >= learners:
        return ("in an attack", choices.randint(1, BASE["steps"] - changes["staleness"])), victim
    site = choices.choice(list(LEARNERS_SITES))
    return (site, choices.randint(1, LEARNERS_SITES[site] // learners)), victim


def trial(number: int, folder: Path) -> dict[str, Any]:
    """Lose one rank, compare."""
    choices = random.Random(f"{SEED}/{number}")
    policy = ("continue", "stop")[number % 2]
    end = signal.SIGKILL if number % 4 < 2 else signal.SIGSTOP
    setup = list(SETUPS)[number // 4 % len(SETUPS)]
    fault, victim = draw(choices, setup, policy)
    what = f"trial {number}: {setup}, {policy}, {end.name} of rank {victim} {fault}"
    out, options = folder / str(number), arguments(setup, folder / str(number), policy)
    log = out.with_suffix(".log")
    shutil.rmtree(out, ignore_errors=True)
    log.unlink(missing_ok=True)
    codes, seconds = live_alone(options, SETUPS[setup][0], log, fault, victim, end)
    check = check_went_on if policy == "continue" else check_ended
    check(out, codes, victim, seconds, f"{what}; exit codes {codes}; {log.read_text()[-1500:]}")
    if policy == "stop" and codes[victim] != 0:
        codes = live(options, SETUPS[setup][0], log)
        assert not any(codes), f"{what}: the resumed run ended with {codes}"
    compare(out, whole(setup, folder), what, BASE["steps"])
    for left in (out, log, out.with_suffix(".yaml")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return {
        "policy": policy,
        "signal": end.name,
        "setup": setup,
        "victim": victim,
        "site": fault[0],
        "seconds": seconds,
    }


def check_went_on(out: Path, codes: list[int], victim: int, seconds: float, what: str) -> None:
    """The learners have finished, and the record names the attack rank; other attack ranks have ended well."""
    from conadv.training.record import read_lines

    assert codes[victim] == -signal.SIGKILL, f"the fault was not reached: {what}"
    assert not any(code for rank, code in enumerate(codes) if rank != victim), what
    lost = {
        line["attack_rank"]
        for line in read_lines(out / "record.jsonl")
        if line["type"] == "attack_loss"
    }
    assert lost == {victim}, f"the record says that {lost} were lost: {what}"


def check_ended(out: Path, codes: list[int], victim: int, seconds: float, what: str) -> None:
    """All others have ended with an error of their own, in time."""
    assert codes[victim] == -signal.SIGKILL, f"the fault was not reached: {what}"
    assert {code for rank, code in enumerate(codes) if rank != victim} == {2}, what
    assert "communication failed in phase" in what, what
    assert seconds < TIMEOUT + MARGIN, f"{seconds:.1f} s: {what}"


def run(short: bool, out: Path) -> dict[str, Any]:
    progress = Progress(out)
    for number in range(len(progress.done), SHORT if short else FULL):
        progress.add(trial(number, out))
    done = progress.done
    return {
        "seed": SEED,
        "ranks_lost": len(done),
        "by_policy": dict(Counter(made["policy"] for made in done)),
        "by_signal": dict(Counter(made["signal"] for made in done)),
        "by_setup": dict(Counter(made["setup"] for made in done)),
        "by_site": dict(Counter(made["site"] for made in done)),
        "comm_timeout_seconds": TIMEOUT,
        "longest_until_the_others_ended": max(
            (round(made["seconds"], 1) for made in done if made["policy"] == "stop"), default=None
        ),
        "runs_that_differ": 0,
    }
