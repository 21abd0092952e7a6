"""The one error type that users see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConadvError(ValueError):
    """What happened, where, and what to do about it.

    Every mistake that a user can make ends in this type (a subclass of ``ValueError``); invariants of the
    library itself are ``assert``ed. The command line prints the message without a traceback.
    ``agreed``: every rank raises it, so that the first one alone reports it.
    """

    agreed = False


def unknown(kind: str, name: str, known: Iterable[str]) -> ConadvError:
    """An error for a name that is not in ``known``, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
    return ConadvError(f"Unknown {kind} {name!r}. {hint}")
