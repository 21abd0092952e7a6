"""The one error type that users see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ConadvError(ValueError):
    """What happened, where, and what to do about it.

    Every mistake that a user can make ends in this type (a subclass of ``ValueError``); invariants
    of the library itself are ``assert``ed. The command line prints the message without a traceback.
    ``agreed``: every rank raises it, so that the first one alone reports it.
    """

    agreed = False

    def __init__(self, *args: object) -> None:
        """Bytes of a path that are not UTF-8 become escapes: any output takes the message."""
        super().__init__(*(_encodable(arg) if isinstance(arg, str) else arg for arg in args))


def _encodable(text: str) -> str:
    return (
        text
        if text.isascii()
        else "".join(_escaped(c) if "\ud800" <= c <= "\udfff" else c for c in text)
    )


def unknown(kind: str, name: str, known: Iterable[str]) -> ConadvError:
    """An error for a name that is not in ``known``, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
    shown = name if len(name) <= 80 else f"{name[:80]}..."
    return ConadvError(f"Unknown {kind} {shown!r}. {hint}")


def install(*extras: str) -> str:
    """The command that installs these extras: conadv is on no index of packages."""
    return f"pip install '.[{','.join(extras)}]' in conadv's checkout"


def printable(text: object) -> str:
    """``text`` on one line, control characters and undecodable bytes as escapes.

    For names that somebody else chose: a path may hold a line end, a terminal's escape codes, or
    bytes that no output can encode.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in str(text))


def first_few(names: Sequence[str], limit: int = 5) -> str:
    """The first of ``names``, printable, and how many more there are; "none" without any."""
    shown = ", ".join(map(printable, names[:limit])) or "none"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def printable_lines(text: str) -> str:
    """``text`` of several lines, each of them :func:`printable`."""
    return "\n".join(map(printable, text.split("\n")))


def _escaped(c: str) -> str:
    if "\udc80" <= c <= "\udcff":  # how Python keeps a byte of a file name that is not UTF-8
        return f"\\x{ord(c) - 0xDC00:02x}"
    return c.encode("unicode_escape").decode("ascii")
