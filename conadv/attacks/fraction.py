"""Numbers written as fractions, such as ``4/255``. Torch-free: the command line reads them too."""

from __future__ import annotations

import re
from fractions import Fraction


def read_fraction(text: str) -> float:
    """The value of a number or of a fraction of two, such as "0.5/255". Raises ValueError."""
    try:
        # Fraction would write 1e999999999 out digit by digit
        if len(text) > 60 or re.search(r"e[+-]?\d{4}", text, re.IGNORECASE):
            raise ValueError
        above, slash, below = text.replace(" ", "").partition("/")
        if slash and "e" in text.lower():
            raise ValueError
        return float(Fraction(above) / Fraction(below) if slash else Fraction(above))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{text[:60]!r} is not a number or a fraction such as 4/255") from error
