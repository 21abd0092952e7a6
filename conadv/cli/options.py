"""What commands share: parsing of options, output, threads, trust in a model's code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from conadv.cli.limits import check_numbers

T = TypeVar("T")


def parse(kind: Callable[..., T], args: Sequence[str], prog: str) -> T:
    """A command's options, their numbers within bounds."""
    options = tyro.cli(kind, args=args, prog=prog)
    check_numbers(options)
    return options


def say(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()  # into a pipe, too, a line comes when it is written


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def trust(model: str | None) -> None:
    """A model module:function that was typed in this command may run its code; one in a config
    alone may not.
    """
    if model is not None:
        from conadv.models.own import trust

        trust(model)
