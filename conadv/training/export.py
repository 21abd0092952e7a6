"""Exporting a run: the clean route for other programs, as plain weights or as a traced program."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from conadv import __version__
from conadv.config.resolve import resolve
from conadv.config.schema import Config
from conadv.engine.validate import load_weights
from conadv.errors import ConadvError, install, unknown
from conadv.nn.ema import evaluated_state
from conadv.nn.split_batchnorm import strip
from conadv.safe_io import write_atomic
from conadv.training.build import make_model
from conadv.training.card import model_card
from conadv.training.checkpoint import restoring
from conadv.training.resume import load_state
from conadv.training.run_dir import RunDir

TOLERANCE = 1e-3  # of the largest logit: another order of sums, not another network


def load_plain_model(path: Path | str, *, best: bool = False) -> nn.Module:
    """The trained network of a run on the CPU in eval mode, without routes. Needs no data.

    The average of the weights where the run has one (ema.decay). ``best``: of its best checkpoint
    (checkpoint.keep_best), not of its newest.
    """
    return _load(path, best)[0]


def _load(path: Path | str, best: bool) -> tuple[nn.Module, Config, dict[str, Any]]:
    run = RunDir(path)
    config = resolve(run.open())
    state = load_state(run, torch.device("cpu"), best=best)
    # a network that cannot be made here (no timm, code of the user's own) is not the checkpoint's
    # fault
    with restoring(state, but=(ConadvError,)):
        model = make_model(config, state["channels"], len(state["class_names"]))
    with restoring(state):
        load_weights(model, evaluated_state(state))
        size, said = config.data.image_size, state.get("image_size", config.data.image_size)
        if size is not None and said != size:
            raise ValueError(f"its images have {said} pixels, those of the config {size}")
    return strip(model).eval(), config, state


def export(path: Path | str, *, best: bool = False, kind: str = "safetensors") -> Path:
    """Write the clean route into the run and return the file.

    ``kind``: "safetensors" (``model.safetensors``: loads with ``strict=True`` into the plain model;
    beside it goes ``model_card.md``, see :mod:`conadv.training.card`), "torch-export"
    (``model.pt2``: ``torch.export.load``) or "onnx" (``model.onnx``, one file). The latter two take
    normalised images (N, C, H, W) in float32 with any N, give logits (N, K), and are run once and
    compared with the network before they are written. Mean, std and the class names, in the order
    of the outputs, are in the metadata of each.
    Raises ConadvError where the network cannot be traced, where the traced one computes something
    else, and for "onnx" without the packages of the extra ``onnx``.
    """
    if kind not in _WRITERS:
        raise unknown("format", kind, _WRITERS)
    run = RunDir(path)
    model, config, state = _load(path, best)
    about = {"conadv": __version__, "model": config.model.name, "method": config.method}
    for name in ("mean", "std"):
        about[name] = json.dumps(getattr(config.data, name))
    about["class_names"] = json.dumps(state["class_names"])
    if kind == "safetensors":
        card = model_card(run, state)  # reads the record, before anything is written
        write_atomic(run.weights, _safetensors(model, about))
        write_atomic(run.card, card)
        return run.weights
    write, target = _WRITERS[kind], run.program if kind == "torch-export" else run.onnx
    write_atomic(target, write(model, about, image_shape(config, state)))
    return target


def image_shape(config: Config, state: dict[str, Any]) -> tuple[int, ...]:
    """(C, H, W) of the images that a checkpoint's network takes."""
    size = state.get("image_size", config.data.image_size)
    if size is None:
        raise ConadvError(
            "The checkpoint is of an older version and does not say how large its images are."
        )
    return (int(state["channels"]), int(size), int(size))


def _safetensors(model: nn.Module, about: dict[str, str], shape: tuple[int, ...] = ()) -> bytes:
    # each tensor in memory of its own: the format has no tied tensors, and the plain model ties
    # them
    dense = torch.contiguous_format
    tensors = {name: value.clone(memory_format=dense) for name, value in model.state_dict().items()}
    content: bytes = save(tensors, metadata={"format": "pt", **about})
    return content


def _torch_export(model: nn.Module, about: dict[str, str], shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    torch.export.save(_traced(model, shape), file, extra_files={"conadv.json": json.dumps(about)})
    file.seek(0)
    loaded = torch.export.load(file).module()
    _compare(model, lambda x: loaded(x), shape)
    return file.getvalue()


def _onnx(model: nn.Module, about: dict[str, str], shape: tuple[int, ...]) -> bytes:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise ConadvError(f"ONNX needs more packages ({error}): {install('onnx')}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own notes on its version of opsets
        program = torch.onnx.export(
            _traced(model, shape),
            input_names=["x_NCHW"],
            output_names=["logits_NK"],
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(about)
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    _compare(model, lambda x: torch.from_numpy(session.run(None, {"x_NCHW": x.numpy()})[0]), shape)
    return bytes(content)


def _traced(model: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    """The network as a program for any number of images."""
    try:
        return torch.export.export(
            model, (torch.zeros(2, *shape),), dynamic_shapes=({0: torch.export.Dim("N")},)
        )
    except Exception as error:  # tracing runs the network's own code, which raises anything
        raise ConadvError(
            f"The {type(model).__name__} cannot be traced for any number of images: "
            f"{str(error)[:500]}. "
            "Export its weights (safetensors) and trace them where they are used."
        ) from error


@torch.no_grad()
def _compare(model: nn.Module, traced: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    """ConadvError unless both give the same logits, for other images than the trace had."""
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    want, found = model(x), traced(x)
    off = float((found - want).abs().max() / want.abs().max().clamp_min(1e-12))
    if not off <= TOLERANCE:
        raise ConadvError(
            f"The exported network differs from the trained one: logits by {off:.2g} of the "
            "largest."
        )


_WRITERS: dict[str, Callable[[nn.Module, dict[str, str], tuple[int, ...]], bytes]] = {
    "safetensors": _safetensors,
    "torch-export": _torch_export,
    "onnx": _onnx,
}
