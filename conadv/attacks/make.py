"""Making an attack by its name."""

from __future__ import annotations

import dataclasses
from pkgutil import resolve_name
from typing import Any

from conadv.attacks import ATTACKS
from conadv.errors import ConadvError, unknown
from conadv.types import Attack


def make_attack(name: str, **settings: Any) -> Attack:
    """The attack ``name`` of the table. ``settings``: its fields; None leaves one at its default.

    Raises ConadvError for a name that is not in the table, and for a setting that the attack does
    not have.
    """
    if name not in ATTACKS:
        raise unknown("attack", name, ATTACKS)
    kind = resolve_name(ATTACKS[name])
    given = {key: value for key, value in settings.items() if value is not None}
    fields = {field.name for field in dataclasses.fields(kind)}
    # A setting that an attack ignores would look as if it had been tried.
    if without_effect := sorted(given.keys() - fields):
        raise ConadvError(f"attack.{without_effect[0]} has no effect with attack {name}.")
    attack: Attack = kind(**given)
    return attack
