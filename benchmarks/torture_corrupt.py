"""Random damage to the newest checkpoints of a run: all of it is found, and the newest intact checkpoint is used.

A mutation spoils the newest one to three of four checkpoints: cut off, bits flipped, blocks of zeros or of noise, bytes
put in or left out, the files of two steps exchanged. The folder must then give the newest intact state, bit for bit,
with a message for each damaged file. After every ``RESUME_EVERY``-th mutation the run is also resumed, and must end
with the bits of the run that nothing happened to.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .torture import Progress
from .torture_kill import compare, same

FULL, SHORT = 600, 40
RESUME_EVERY = 20
SEED = 6
STEPS = 8

Mutation = Callable[[random.Random, bytes], bytes]


def _place(choices: random.Random, data: bytes, length: int = 1) -> int:
    """A byte to begin at; the ends of the file, where headers and seals lie, are chosen as often as the rest."""
    last = len(data) - length
    near = choices.randrange(min(200, last + 1))
    return choices.choice(
        [near, last - near, choices.randrange(last + 1), choices.randrange(last + 1)]
    )


def _replaced(data: bytes, at: int, part: bytes) -> bytes:
    return data[:at] + part + data[at + len(part) :]


def _cut(choices: random.Random, data: bytes) -> bytes:
    return data[: _place(choices, data)]


def _flip(choices: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(choices.choice([1, 1, 1, 2, 8])):
        changed[_place(choices, data)] ^= 1 << choices.randrange(8)
    return bytes(changed)


def _zero(choices: random.Random, data: bytes) -> bytes:
    length = choices.choice([64, 512, 4096])
    at = _place(choices, data, length) // length * length
    return _replaced(data, at, bytes(length))


def _noise(choices: random.Random, data: bytes) -> bytes:
    length = choices.choice([1, 16, 512])
    return _replaced(data, _place(choices, data, length), choices.randbytes(length))


def _insert(choices: random.Random, data: bytes) -> bytes:
    at = _place(choices, data)
    return data[:at] + choices.randbytes(choices.choice([1, 7, 512])) + data[at:]


def _drop(choices: random.Random, data: bytes) -> bytes:
    length = choices.choice([1, 7, 512])
    at = _place(choices, data, length)
    return data[:at] + data[at + length :]


MUTATIONS: dict[str, Mutation] = {
    "cut off": _cut,
    "bits flipped": _flip,
    "a block of zeros": _zero,
    "a block of noise": _noise,
    "bytes put in": _insert,
    "bytes left out": _drop,
}


def settings() -> Any:
    from conadv.config import recipes
    from conadv.config.schema import replace

    from .torture_kill import BASE

    changes = {
        "steps": STEPS,
        "checkpoint__every_epochs": 0.2,
        "checkpoint__keep": 4,
        "eval__every_epochs": None,
    }
    return replace(recipes.get("digits"), **{**BASE, **changes, "method": "conadv", "staleness": 2})


def mutate(choices: random.Random, folder: Path) -> tuple[str, list[int], int]:
    """Damage the newest checkpoints; returns how, which steps, and the newest intact one."""
    from conadv.training.checkpoint import steps

    saved = steps(folder)
    kind = choices.choice([*MUTATIONS, "files exchanged"])
    files = [folder / f"step_{step:08d}.pt" for step in saved]
    if kind == "files exchanged":
        other = choices.randrange(1, len(files) - 1)
        contents = files[-1].read_bytes(), files[other].read_bytes()
        files[other].write_bytes(contents[0])
        files[-1].write_bytes(contents[1])
        bad = {saved[-1], saved[other]}
    else:
        count = choices.choice([1, 1, 2, 3])
        for file in files[-count:]:
            data = file.read_bytes()
            spoilt = data
            while spoilt == data:  # zeros on zeros are no damage
                spoilt = MUTATIONS[kind](choices, data)
            file.write_bytes(spoilt)
        bad = set(saved[-count:])
    return kind, sorted(bad), max(set(saved) - bad)


def trial(number: int, whole: Path, folder: Path) -> dict[str, Any]:
    import torch

    from conadv.training.checkpoint import find_newest, load_step
    from conadv.training.loop import train

    choices = random.Random(f"{SEED}/{number}")
    out = folder / "cut"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(whole, out)
    kind, bad, newest = mutate(choices, out / "checkpoints")
    what = f"mutation {number} ({kind} of {bad})"
    state, messages = find_newest(out / "checkpoints", torch.device("cpu"))
    assert state["step"] == newest, f"{what}: step {state['step']} was used, not {newest}"
    assert len(messages) == sum(step > newest for step in bad), f"{what}: {messages}"
    assert same(state, load_step(whole / "checkpoints", newest, torch.device("cpu"))), (
        f"{what}: other bits"
    )
    if resumed := number % RESUME_EVERY == 0:
        train(settings(), out, resume=True)
        compare(out, whole, what, STEPS)
    return {"kind": kind, "damaged": len(bad), "resumed": resumed}


def run(short: bool, out: Path) -> dict[str, Any]:
    from conadv.training.loop import train

    progress, whole = Progress(out), out / "whole"
    if not (whole / "summary.json").exists():
        train(settings(), whole, overwrite=(whole / "config.yaml").exists())
    for number in range(len(progress.done), SHORT if short else FULL):
        progress.add(trial(number, whole, out))
    return {
        "seed": SEED,
        "mutations": len(progress.done),
        "found": len(progress.done),
        "files_damaged": sum(made["damaged"] for made in progress.done),
        "mutations_by_kind": dict(Counter(made["kind"] for made in progress.done).most_common()),
        "resumed_to_the_same_bits": sum(made["resumed"] for made in progress.done),
    }
