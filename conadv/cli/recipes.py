"""``conadv recipes``."""

from __future__ import annotations

from dataclasses import dataclass

from conadv.cli.options import say
from conadv.config import recipes


@dataclass
class Args:
    """List the recipes."""


def command(args: Args) -> None:
    say(recipe_list())


def recipe_list() -> str:
    width = max(map(len, recipes.RECIPES))
    return "\n".join(f"  {name:<{width}}  {recipes.summary(name)}" for name in recipes.RECIPES)
