"""Making a method by its name."""

from __future__ import annotations

import dataclasses
from pkgutil import resolve_name
from typing import Any

from conadv.attacks.noise import RandomSigns
from conadv.attacks.space import PixelSpace
from conadv.errors import unknown
from conadv.methods import METHODS
from conadv.types import Attack, Method


def make_method(
    name: str,
    *,
    attack: Attack,
    noise_eps: float,
    space: PixelSpace,
    share: float = 1.0,
    attack_route: str = "adv",
    attack_statistics: str = "batch",
    **settings: Any,
) -> Method:
    """The method ``name`` of the table, with those of the arguments that are fields of its class.

    ``noise_eps``: the size of the noise control, in pixels. ``settings``: those of the method's
    row; the ones that are the engine's (adv_weight, adv_route, pending_dtype) may be among them.
    Raises ConadvError for a name that is not in the table.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    kind = resolve_name(METHODS[name].target)
    # Fields say what a class needs, so that a new method is its file and a row of the table.
    offered = {
        "attack": attack,
        "noise": RandomSigns(noise_eps, space),
        "share": share,
        "attack_route": attack_route,
        "attack_statistics": attack_statistics,
        **{key.removeprefix("sam_"): value for key, value in settings.items()},
    }
    fields = {field.name for field in dataclasses.fields(kind)}
    method: Method = kind(**{key: value for key, value in offered.items() if key in fields})
    return method
