"""Plain training: the clean view only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from conadv.types import Method


@dataclass(frozen=True)
class Vanilla(Method):
    """L = E_clean."""

    route: ClassVar[str | None] = None
