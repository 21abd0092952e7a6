"""The methods: what is computed in a step, apart from when it runs (that is conadv.engine).

This table is all that the command line needs, so it imports no torch; a method's own module is imported on use.
A new method is its file, a row here, a row in tests/test_methods.py and a row in docs/methods/README.md.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conadv.config.schema import Config
    from conadv.methods.base import Method


@dataclass(frozen=True)
class Row:
    """Where a method lives, what it is, and the settings that have an effect on it."""

    target: str
    summary: str
    settings: frozenset[str]


def _row(target: str, summary: str, *settings: str) -> Row:
    return Row(target, summary, frozenset(settings))


METHODS: dict[str, Row] = {
    "vanilla": _row("vanilla:Vanilla", "clean images only"),
    "sam": _row("sam:SAM", "baseline: the gradient at the worst weights nearby", "sam_rho"),
    "multiview": _row(
        "controls:MultiView", "control: a second draw of the clean view", "adv_weight", "adv_route"
    ),
    "noise": _row(
        "controls:Noise",
        "control: random signs of size eps",
        *("adv_weight", "adv_route", "attack.eps", "attack.share"),
    ),
    "disadv": _row(
        "sequential:Sequential",
        "attack at the current weights, inside the step",
        *("adv_weight", "adv_route", "attack"),
    ),
    "conadv": _row(
        "concurrent:Concurrent",
        "attack on a future batch at stale (or predicted) weights, beside the step",
        *(
            "adv_weight",
            "adv_route",
            "attack",
            "staleness",
            "lookahead",
            "pending_dtype",
        ),
    ),
    "recycle": _row(
        "recycle:Recycle",
        "perturb the last batch by the input gradient that its step computed anyway",
        *("adv_weight", "adv_route", "attack", "pending_dtype"),
    ),
}


def method_class(name: str) -> type[Method]:
    """The class behind a name in METHODS."""
    module, _, attribute = METHODS[name].target.partition(":")
    cls: type[Method] = getattr(importlib.import_module(f".{module}", __name__), attribute)
    return cls


def build_method(config: Config) -> Method:
    """The method of a resolved config."""
    return method_class(config.method).from_config(config)
