"""Golden losses: five steps of every method in float64, to the last digits.

A change that turns these red has changed what is computed. If that is meant, regenerate them with

    python -m tests.test_golden

and say why in CHANGELOG.md under "Numerics". Another processor may sum in another order, hence a
tolerance of 1e-10.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .helpers import tiny_resnet
from .test_methods import CASES, OPTIMIZERS, make, run

GOLDEN = Path(__file__).parent / "golden" / "losses.json"


def losses(name: str, optimizer: str) -> list[float]:
    import torch

    engine = make(CASES[name](), tiny_resnet("adv", dtype=torch.float64), OPTIMIZERS[optimizer])
    return [record.loss for record in run(engine, 5, dtype=torch.float64)]


PAIRS = [(name, "sgd") for name in CASES] + [
    ("conadv-lookahead", name) for name in ("lars", "lamb", "adamw")
]


@pytest.mark.parametrize(("name", "optimizer"), PAIRS)
def test_losses_are_what_they_were(name: str, optimizer: str) -> None:
    # Red when: anything in the arithmetic of a step changes, such as the keys of the random draws.
    want = json.loads(GOLDEN.read_text())[f"{name}/{optimizer}"]
    assert losses(name, optimizer) == pytest.approx(want, rel=1e-10)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    golden = {f"{name}/{optimizer}": losses(name, optimizer) for name, optimizer in PAIRS}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
