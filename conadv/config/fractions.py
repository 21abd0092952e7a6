"""Numbers written as fractions: ``4/255`` on the command line, in YAML and in configs."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator
from tyro.constructors import PrimitiveConstructorSpec

from conadv.attacks.fraction import read_fraction


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
