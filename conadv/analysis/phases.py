"""The names of a step's phases, where they run, and how every figure draws them."""

from __future__ import annotations

from typing import Any

from conadv.training.record import BESIDE

INK = "#010203"
"""The figures' black. Where a page has a text colour of its own, it takes this one's place."""

PHASES = ("data", "gradient", "send", "receive", "wait", "attack", "update")
"""What a process does itself, in the order of a legend."""

BLOCKED = frozenset({"receive", "wait"})
"""Phases in which it does nothing but wait for another process."""

FOR_ATTACK = ("attack", "receive", "send")
"""Phases of a learner that a step without an attack would not have."""

LATE = "slower rank"
"""How figures call the part of "network" in which another rank had not launched its gradients yet."""

_SHADES = {
    "data": 0.12,
    "gradient": 0.32,
    "send": 0.20,
    "receive": 0.05,
    "wait": 0.05,
    "attack": 0.0,
    "update": 0.62,
}
_COLOURS = {"network": "#0072B2", LATE: "#A9CCE3", "transfer": "#009E73"}
_HATCHES = {"attack": "/////", "receive": "..."}
_EDGES = {"receive": 0.35}  # lighter than what is done in the meantime


def rank(name: str) -> int:
    """Sorts phases: those that are known first, in their order."""
    known = (*PHASES, BESIDE[0], LATE, *BESIDE[1:])
    return known.index(name) if name in known else len(known)


def style(name: str) -> dict[str, Any]:
    """matplotlib settings of a patch: shades of ink for what a process does, the attack hatched; colours for the rest.

    The phases need no colour of their own, so colours stay free for what runs beside them, and for a report's arms.
    """
    ink = tuple(int(INK[i : i + 2], 16) / 255 for i in (1, 3, 5))
    if name in _COLOURS:
        return {"facecolor": _COLOURS[name], "edgecolor": _COLOURS[name], "linewidth": 0.7}
    face, edge = (*ink, _SHADES.get(name, 0.9)), (*ink, _EDGES.get(name, 1.0))
    found: dict[str, Any] = {"facecolor": face, "edgecolor": edge, "linewidth": 0.7}
    return {**found, "hatch": _HATCHES[name]} if name in _HATCHES else found
