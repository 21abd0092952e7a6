"""Random damage to the newest checkpoints of a run: all of it is found, and the newest intact
checkpoint is used.

A mutation spoils the newest one to three of four checkpoints, or exchanges two of them. The folder
must then give the newest intact state, bit for bit, with a message for each damaged file. After
every RESUME_EVERY-th mutation the run is also resumed, and must end with the bits of the run that
nothing happened to.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import trials
from .lives import Setup, arguments, compare, same, whole

FULL, SHORT = 600, 20
RESUME_EVERY = 20
SEED = 6

Mutation = Callable[[random.Random, bytes, int], bytes]


def _flip(choices: random.Random, data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << choices.randrange(8)]) + data[at + 1 :]


def _zero(choices: random.Random, data: bytes, at: int) -> bytes:
    length = choices.choice([64, 512, 4096])
    at = at // length * length
    return (data[:at] + bytes(length) + data[at + length :])[: len(data)]


def _noise(choices: random.Random, data: bytes, at: int) -> bytes:
    length = choices.choice([1, 16, 512])
    return (data[:at] + choices.randbytes(length) + data[at + length :])[: len(data)]


MUTATIONS: dict[str, Mutation] = {
    "cut off": lambda choices, data, at: data[:at],
    "a bit flipped": _flip,
    "a block of zeros": _zero,
    "a block of noise": _noise,
    "bytes put in": lambda choices, data, at: data[:at] + choices.randbytes(7) + data[at:],
    "bytes left out": lambda choices, data, at: data[:at] + data[at + choices.choice([1, 512]) :],
}


SETUP = Setup(
    1,
    0,
    "--method conadv --staleness 2 --steps 8 --eval.every-epochs None "
    "--checkpoint.every-epochs 0.2 --checkpoint.keep 4",
)


def spoil(choices: random.Random, file: Path, kind: str) -> None:
    data = spoilt = file.read_bytes()
    while spoilt == data:  # zeros on zeros are no damage
        # the ends of the file, where headers and seals lie, are chosen as often as the rest
        ends = choices.choice([range(200), range(len(data) - 200, len(data)), range(len(data))])
        spoilt = MUTATIONS[kind](choices, data, choices.choice(ends))
    file.write_bytes(spoilt)


def damage(choices: random.Random, folder: Path) -> tuple[str, set[int], int]:
    """Damage the newest checkpoints; returns how, which steps, and the newest intact one."""
    from conadv.training.checkpoint import steps

    saved = steps(folder)
    files = {step: folder / f"step_{step:08d}.pt" for step in saved}
    kind = choices.choice([*MUTATIONS, "files exchanged"])
    if kind == "files exchanged":
        bad = {saved[-1], saved[choices.randrange(1, len(saved) - 1)]}
        contents = [files[step].read_bytes() for step in bad]
        for step, content in zip(bad, reversed(contents), strict=True):
            files[step].write_bytes(content)
    else:
        bad = set(saved[-choices.choice([1, 1, 2, 3]) :])
        for step in bad:
            spoil(choices, files[step], kind)
    return kind, bad, max(set(saved) - bad)


def trial(number: int, intact: Path, out: Path) -> dict[str, Any]:
    import torch

    from conadv.cli.program import main
    from conadv.training.checkpoint import find_newest, load_step

    choices, cpu = random.Random(f"{SEED}/{number}"), torch.device("cpu")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(intact, out)
    kind, bad, newest = damage(choices, out / "checkpoints")
    what = f"mutation {number} ({kind} of {bad})"
    state, messages = find_newest(out / "checkpoints", cpu)
    assert state["step"] == newest, f"{what}: step {state['step']} was used, not {newest}"
    assert len(messages) == sum(step > newest for step in bad), f"{what}: {messages}"
    assert same(state, load_step(intact / "checkpoints", newest, cpu)), f"{what}: other bits"
    if resumed := number % RESUME_EVERY == 0:
        assert main(arguments(SETUP, out)) == 0, what
        compare(out, intact, what)
    return {"kind": kind, "damaged": len(bad), "resumed": resumed}


def run(short: bool, out: Path) -> dict[str, Any]:
    made = whole(SETUP, out / "whole")
    done = trials(out, SHORT if short else FULL, lambda n: trial(n, made, out / "cut"))
    return {
        "seed": SEED,
        "mutations": len(done),
        "found": len(done),
        "files_damaged": sum(made["damaged"] for made in done),
        "mutations_by_kind": dict(Counter(made["kind"] for made in done).most_common()),
        "resumed_to_the_same_bits": sum(made["resumed"] for made in done),
    }
