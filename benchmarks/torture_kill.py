"""SIGKILL at random places of runs on 1, 2 and 3 ranks; resumed runs end with the bits of uninterrupted ones.

A trial is one run directory, killed up to ``KILLS`` times (KILLS_SHORT in the short form) and then left to finish,
always by the same command (``--auto-resume``). After every kill the newest checkpoint must be intact. At the end the
last checkpoint, the record (but for times) and the summary's results must be those of the run that was never killed.
"""

import json
import random
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .lives import FIRST_RANK_ONLY, SITES, Fault, live
from .torture import Progress

KILLS, KILLS_SHORT = 4, 2
FULL, SHORT = 208, 6
PARALLEL = 2
SEED = 5

BASE: dict[str, Any] = {
    "global_batch_size": 192,
    "micro_batch_size": 32,
    "epochs": None,
    "steps": 12,
    "model__width": 4,
    "optim__lr": 2.0,
    "schedule__warmup_epochs": 0.5,
    "eval__every_epochs": 0.5,
    "eval__robust_images": 32,
    "eval__robust_steps": 1,
    "eval__train_images": 100,
    "checkpoint__every_epochs": 0.25,
    "checkpoint__keep": 2,
}
Setup = tuple[int, int, dict[str, Any]]  # ranks, how many of them only attack, settings
SETUPS: dict[str, Setup] = {
    "1 rank, tau 2, uint8": (1, 0, {"method": "conadv", "staleness": 2, "pending_dtype": "uint8"}),
    "2 ranks, background": (
        2,
        0,
        {"method": "conadv", "staleness": 2, "checkpoint__background": True},
    ),
    "3 ranks, 1 attacks": (3, 1, {"method": "conadv", "staleness": 1, "lookahead": True}),
    "1 rank, workers, background": (
        1,
        0,
        {
            "method": "conadv",
            "lookahead": True,
            "optim__name": "lamb",
            "optim__lr": 0.01,
            "data__augment": "basic",
            "data__num_workers": 2,
            "checkpoint__background": True,
        },
    ),
    "3 ranks": (3, 0, {"method": "disadv", "optim__name": "sgd", "optim__lr": 0.05}),
    "2 ranks, recycle, the best kept": (
        2,
        0,
        {"method": "recycle", "data__validation_images": 64, "checkpoint__keep_best": True},
    ),
}


def arguments(setup: str, out: Path) -> list[str]:
    """The program's options for a run of ``setup`` in ``out``; its config lies beside it."""
    from conadv.config import recipes
    from conadv.config.files import dump_yaml
    from conadv.config.schema import replace

    _, attackers, changes = SETUPS[setup]
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
        "60",
        "--quiet",
    ]
    return [
        "train",
        "--config",
        str(config),
        "--out",
        str(out),
        "--attack-ranks",
        str(attackers),
        *options,
    ]


def whole(setup: str, folder: Path) -> Path:
    """The run that is never killed."""
    out = folder / "whole" / str(list(SETUPS).index(setup))
    if not (out / "summary.json").exists():
        codes = live(arguments(setup, out), SETUPS[setup][0], out.with_suffix(".log"))
        assert not any(codes), f"{setup}: the uninterrupted run ended with {codes}; see {out}.log"
    return out


def draw(choices: random.Random, setup: str) -> tuple[Fault, int]:
    """A fault and the rank that has it."""
    ranks, attackers, _ = SETUPS[setup]
    site = choices.choice(["timer", *SITES])
    if site == "timer":
        return (site, choices.uniform(0.0, 3.0 + ranks)), choices.randrange(ranks)
    victim = 0 if site in FIRST_RANK_ONLY else choices.randrange(ranks - attackers)
    return (site, choices.randint(1, SITES[site])), victim


def trial(setup: str, number: int, kills: int, folder: Path) -> dict[str, Any]:
    """Kill one run up to ``kills`` times, let it finish, compare."""
    choices = random.Random(f"{SEED}/{setup}/{number}")
    out = folder / f"{list(SETUPS).index(setup)}-{number}"
    log, places = out.with_suffix(".log"), []
    shutil.rmtree(out, ignore_errors=True)
    options, ranks = arguments(setup, out), SETUPS[setup][0]
    for _ in range(kills):
        fault, victim = draw(choices, setup)
        codes = live(options, ranks, log, fault, victim)
        if codes[victim] != -9:  # it finished before it came there
            assert not any(codes), (
                f"{setup}, trial {number}, {fault}: exit codes {codes}; {log.read_text()[-2000:]}"
            )
            continue
        places.append([fault[0], round(fault[1], 3), victim, check_intact(out)])
    codes = live(options, ranks, log)
    assert not any(codes), (
        f"{setup}, trial {number}, after {places}: exit codes {codes}; {log.read_text()[-2000:]}"
    )
    compare(out, whole(setup, folder), f"{setup}, trial {number}, after {places}", BASE["steps"])
    for left in (out, log, out.with_suffix(".yaml")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return {"setup": setup, "number": number, "kills": places}


def check_intact(out: Path) -> int:
    """The step of the newest checkpoint after a kill, which must be intact; 0 where there is none yet."""
    import torch

    from conadv.training.checkpoint import find_newest, steps

    if not steps(out / "checkpoints"):
        return 0
    state, damaged = find_newest(out / "checkpoints", torch.device("cpu"))
    assert not damaged, f"a kill has left a damaged checkpoint: {damaged}"
    return int(state["step"])


def compare(a: Path, b: Path, what: str, num_steps: int) -> None:
    """AssertionError unless two runs have the same bits and the same record."""
    import torch

    from conadv.training.checkpoint import load_newest, steps
    from conadv.training.record import read_lines

    assert steps(a / "checkpoints") == steps(b / "checkpoints"), (
        f"{what}: other checkpoints are kept"
    )
    states = [load_newest(run / "checkpoints", torch.device("cpu")) for run in (a, b)]
    assert same(*states), f"{what}: the last checkpoints differ"
    records = [numbers(read_lines(run / "record.jsonl")) for run in (a, b)]
    found = [line["step"] for line in records[0] if line["type"] == "step"]
    assert found == list(range(num_steps)), f"{what}: the record has the steps {found}"
    assert records[0] == records[1], f"{what}: the records differ"
    results = [json.loads((run / "summary.json").read_text()) for run in (a, b)]
    for name in (
        "train_loss",
        "test_loss",
        "test_accuracy",
        "robust_accuracy",
        "validation_accuracy",
    ):
        assert results[0][name] == results[1][name], f"{what}: {name} differs"


def numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps and evaluations without times."""
    times = ("time", "phases", "seconds", "spans")
    return [
        {k: v for k, v in line.items() if k not in times}
        for line in lines
        if line["type"] in ("step", "eval")
    ]


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


def run(short: bool, out: Path) -> dict[str, Any]:
    """At least FULL kills (SHORT in the short form, on the first setup of 1, 2 and 3 ranks)."""
    progress = Progress(out)
    wanted = SHORT if short else FULL
    setups = list(SETUPS)[:3] if short else list(SETUPS)
    order = ((setup, number) for number in range(10_000) for setup in setups)
    done = {(made["setup"], made["number"]) for made in progress.done}
    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(lambda setup: whole(setup, out), setups))
        while sum(len(made["kills"]) for made in progress.done) < wanted:
            batch = [next(key for key in order if key not in done) for _ in range(PARALLEL)]
            for made in pool.map(
                lambda key: trial(*key, KILLS_SHORT if short else KILLS, out), batch
            ):
                progress.add(made)
    return count(progress)


def count(progress: Progress) -> dict[str, Any]:
    kills = [kill for made in progress.done for kill in made["kills"]]
    return {
        "seed": SEED,
        "kills": len(kills),
        "runs": len(progress.done),
        "kills_by_site": dict(Counter(kill[0] for kill in kills).most_common()),
        "kills_by_setup": dict(Counter(m["setup"] for m in progress.done for _ in m["kills"])),
        "kills_by_newest_checkpoint": {
            str(k): n for k, n in sorted(Counter(kill[3] for kill in kills).items())
        },
        "runs_that_differ": 0,
        "damaged_checkpoints": 0,
    }
