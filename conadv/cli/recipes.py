"""``conadv recipes``."""

from __future__ import annotations

from dataclasses import dataclass

from conadv.cli.options import say
from conadv.config import recipes


@dataclass
class Args:
    """List the recipes."""


def command(args: Args) -> None:
    width = max(map(len, recipes.RECIPES))
    for name in recipes.RECIPES:
        say(f"  {name:<{width}}  {recipes.summary(name)}")
