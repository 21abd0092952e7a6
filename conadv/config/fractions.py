"""Numbers written as fractions: ``4/255`` on the command line, in YAML and in configs."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator
from tyro.constructors import PrimitiveConstructorSpec


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


def parse_fraction(value: object) -> object:
    """``"4/255"`` -> 0.0157; anything but text is left to the field's own check."""
    return read_fraction(value) if isinstance(value, str) else value


_ON_THE_COMMAND_LINE = PrimitiveConstructorSpec(
    nargs=1,
    metavar="FLOAT|A/B",
    instance_from_str=lambda args: parse_fraction(args[0]),
    is_instance=lambda value: isinstance(value, (int, float)),
    str_from_instance=lambda value: [f"{value:.6g}"],
)
FractionFloat = Annotated[float, BeforeValidator(parse_fraction), _ON_THE_COMMAND_LINE]
