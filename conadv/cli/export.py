"""``conadv export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from conadv.cli.options import say, trust
from conadv.errors import printable


@dataclass
class Args:
    """Write the clean route of a run for other programs: weights with a model card, or a program
    for any language.
    """

    run: tyro.conf.Positional[Path]
    """Run directory."""
    format: Literal["safetensors", "torch-export", "onnx"] = "safetensors"
    """model.safetensors, weights under the plain model's own names; model.pt2 (torch.export); or
    model.onnx.
    """
    best: bool = False
    """The checkpoint with the best validation accuracy instead (checkpoint.keep_best)."""
    model: str | None = None
    """Only for a run whose model is code of yours: repeat its module:function, to say that it may
    run.
    """


def command(args: Args) -> None:
    trust(args.model)
    from conadv.training.export import export
    from conadv.training.run_dir import RunDir

    say(printable(export(args.run, best=args.best, kind=args.format)))
    if args.format == "safetensors":
        say(f"model card: {printable(RunDir(args.run).card)}")
