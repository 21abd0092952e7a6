"""Exporting a run: the clean route as plain weights that the model's own constructor loads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ._version import __version__
from .config import resolve
from .errors import ConadvError
from .norm import strip
from .run import RunDir
from .trainer import load_state, make_model


def load_plain_model(path: Path, *, best: bool = False) -> nn.Module:
    """The trained network of a run on the CPU in eval mode, without routes. Needs no data.

    ``best``: of its best checkpoint (checkpoint.keep_best), not of its newest.
    """
    run = RunDir(path)
    config = resolve(run.open())
    state = load_state(run, torch.device("cpu"), best=best)
    try:
        model = make_model(config, state["channels"], len(state["class_names"]))
        model.load_state_dict(state["model"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConadvError(
            f"The checkpoint in {path} does not fit its config.yaml: {str(error)[:500]}. It was changed, or belongs to "
            "another run."
        ) from error
    return strip(model).eval()


def export(path: Path, *, best: bool = False) -> Path:
    """Write ``model.safetensors`` into the run: it loads with ``strict=True`` into the plain model."""
    run = RunDir(path)
    config = run.open()
    tensors = {name: value.contiguous() for name, value in load_plain_model(path, best=best).state_dict().items()}
    about = {"format": "pt", "conadv": __version__, "model": config.model.name, "method": config.method}
    temporary = run.weights.with_suffix(".tmp")  # open() has made sure that it is no link
    save_file(tensors, temporary, metadata=about)
    temporary.replace(run.weights)
    return run.weights
