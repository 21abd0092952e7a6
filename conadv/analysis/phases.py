"""The phases of a step: their order, and how every figure draws them."""

from __future__ import annotations

from typing import Any

# Middle tones, which stand out from a white page and from a dark one: grey is what a process does
# for its own gradient, orange the attack, blue and green what the network does beside it. Waiting
# is little more than an outline.
COLOURS = {
    "data": "#5B6673",
    "gradient": "#98A2AE",
    "send": "#B7A27A",
    "receive": "#98A2AE22",
    "wait": "#98A2AE22",
    "attack": "#F0801A",
    "update": "#5B6673",
    "network": "#2F7FE8",
    "transfer": "#1A9E6E",
}


def rank(name: str) -> int:
    """Sorts phases: the known ones first, in the order of a legend."""
    return [*COLOURS, name].index(name)


def style(name: str) -> dict[str, Any]:
    """matplotlib settings of a phase's bars and legend entry."""
    edge = COLOURS["gradient"] if name in ("receive", "wait") else "none"
    return {"facecolor": COLOURS.get(name, "#8A6FB0"), "edgecolor": edge, "linewidth": 0.8}
