"""The methods by name: what is computed in a step, apart from when it runs (that is conadv.engine).

Torch-free: the config and ``--help`` read this table before torch is imported. A new method is a
file with its class, a row here, a row in the table of tests/test_methods.py and a row in
docs/methods/README.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One method.

    target: "module:Class". summary: what it is, in a few words. settings: the top-level settings of
    a config that have an effect on it, with their defaults. attack: the settings of the section
    ``attack`` that have one.
    """

    target: str
    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    attack: Collection[str] = ()


# Shared by rows: a setting has the same default with every method that has it.
_EXTRA_VIEW = {"adv_weight": 1.0, "adv_route": "own", "mix": "add"}
_PENDING = {"pending_dtype": "float32"}
# recycle has one gradient and no choice of route, so the rest has no effect there.
_ONE_GRADIENT = ("name", "eps", "norm", "step_size", "share")
_ATTACK = (*_ONE_GRADIENT, "num_steps", "targeted", "random_start", "route", "statistics")

METHODS = {
    "vanilla": Row("conadv.methods.vanilla:Vanilla", "clean images only"),
    "sam": Row(
        "conadv.methods.sam:SAM",
        "baseline: the gradient at the worst weights nearby",
        {"sam_rho": 0.05},
    ),
    "multiview": Row(
        "conadv.methods.controls:MultiView",
        "control: a second draw of the clean view",
        _EXTRA_VIEW,
        ("share",),
    ),
    "noise": Row(
        "conadv.methods.controls:Noise",
        "control: random signs of size eps",
        _EXTRA_VIEW,
        ("eps", "share"),
    ),
    "disadv": Row(
        "conadv.methods.sequential:Sequential",
        "attack at the current weights, inside the step",
        _EXTRA_VIEW,
        _ATTACK,
    ),
    "conadv": Row(
        "conadv.methods.concurrent:Concurrent",
        "attack on a future batch at stale (or predicted) weights, beside the step",
        {"staleness": 1, "lookahead": False, **_PENDING, **_EXTRA_VIEW},
        _ATTACK,
    ),
    "recycle": Row(
        "conadv.methods.recycle:Recycle",
        "perturb the last batch by the input gradient that its step computed anyway",
        {**_PENDING, **_EXTRA_VIEW},
        _ONE_GRADIENT,
    ),
}
