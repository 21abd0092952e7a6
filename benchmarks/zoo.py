"""Split batch norm on torchvision's and timm's networks: writes zoo.json and docs/models.md.

    python benchmarks/zoo.py        # about ten minutes on one core, 8 GB of memory

``check`` is what one row means; tests/test_zoo.py runs it on some of the same cases.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conadv.models.make import build_model
from conadv.models.trial import check_model
from conadv.nn.split_batchnorm import (
    CLEAN,
    SplitBatchNorm,
    check_routes,
    route,
    split_batchnorm,
    strip,
)
from conadv.optim.groups import MODEL_RULES, parameter_groups

CLASSES, IMAGES = 5, 3
PAGE = Path(__file__).parent.parent / "docs" / "models.md"
RESULTS = Path(__file__).parent.parent / "results" / "models" / "zoo.json"


@dataclass(frozen=True)
class Case:
    """One network: its name for --model, the size of its images, model.args.

    All of torchvision's classifiers, and a small one of each timm family (a module of timm.models).
    """

    name: str
    family: str
    image_size: int
    args: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row(Case):
    """What a case came to, in seconds of the processor."""

    parameters: int = 0
    batch_norms: int = 0
    kinds: tuple[str, ...] = ()
    seconds: float = 0.0
    problem: str = ""


def cases() -> list[Case]:
    """The networks of zoo.json; another one is a row with the fields of a Case."""
    return [
        Case(row["name"], row["family"], row["image_size"], tuple(row["args"]))
        for row in json.loads(RESULTS.read_text())["rows"]
    ]


def build(case: Case) -> nn.Module:
    """The plain network for 3-channel images and CLASSES classes; the same weights each time."""
    torch.manual_seed(0)
    return build_model(case.name, 3, CLASSES, args=case.args)


def check(case: Case) -> Row:
    """Split, run by route, strip, load back strictly; AssertionError or ConadvError if it fails."""
    begin = time.process_time()
    model = build(case)
    with _uninitialised():
        fresh = build(case)
    names = list(model.state_dict())
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    check_model(model, 3, case.image_size, CLASSES)
    _check_forward(model, case.image_size)
    check_routes(model, ["adv"])
    _check_own_tensors(model)
    parameter_groups(model, weight_decay=0.1, rules=MODEL_RULES)
    extra = set(model.state_dict()) - set(names)
    assert all(".routes.adv." in name for name in extra)
    assert bool(extra) == bool(layers)
    strip(model)
    assert list(model.state_dict()) == names, "strip must leave the plain model's names"
    fresh.load_state_dict(model.state_dict(), strict=True)
    x, _ = _images(case.image_size)
    assert torch.equal(_logits(fresh.eval(), x), _logits(model.eval(), x))
    parameters = sum(p.numel() for p in model.parameters())
    kinds = tuple(sorted({type(layer).__name__ for layer in layers}))
    seconds = time.process_time() - begin
    return Row(
        **vars(case),
        parameters=parameters,
        batch_norms=len(layers),
        kinds=kinds,
        seconds=seconds,
    )


@contextmanager
def _uninitialised() -> Iterator[None]:
    """Networks built inside have memory but no values: filling it is most of the time."""
    names = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    with mock.patch.multiple(nn.init, **{name: lambda tensor, *_, **__: tensor for name in names}):
        yield


def _check_forward(model: nn.Module, size: int) -> None:
    """Split the plain ``model`` and run it by both routes in train and in eval mode."""
    x, z = _images(size)
    plain = _logits(model.eval(), x)
    split_batchnorm(model, "adv")
    assert torch.equal(_logits(model, x), plain), "the clean route is the plain model"
    assert torch.equal(_logits(model, x, "adv"), plain), (
        "a new route is a copy of the clean one, activation and all"
    )
    has_routes = any(".routes." in name for name, _ in model.named_parameters())
    before = {name: value.clone() for name, value in model.named_buffers()}
    _backward(model.train(), x, z)
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            assert not torch.equal(value, before[name]), f"each route tracks its own images: {name}"
    if not has_routes:
        return
    clean, adv = _logits(model.eval(), x), _logits(model, x, "adv")
    with torch.no_grad():
        for layer in _split_layers(model):
            for p in layer.routes["adv"].parameters(recurse=False):
                p.mul_(0.5).add_(0.1)
    assert torch.equal(_logits(model, x), clean), (
        "the adversarial route must not reach the clean one"
    )
    assert not torch.equal(_logits(model, x, "adv"), adv), "the adversarial route must be in use"
    with torch.no_grad(), route(model, {CLEAN: IMAGES, "adv": IMAGES}):
        assert model(torch.cat([x, z])).shape == (2 * IMAGES, CLASSES)


def _split_layers(model: nn.Module) -> list[SplitBatchNorm]:
    return [module for module in model.modules() if isinstance(module, SplitBatchNorm)]


def _check_own_tensors(model: nn.Module) -> None:
    """A route's parameters and statistics are its own; a child such as a PReLU is shared."""
    for layer in _split_layers(model):
        own, clean = (
            {t.data_ptr() for t in (*one.parameters(recurse=False), *one.buffers(recurse=False))}
            for one in (layer.routes["adv"], layer)
        )
        assert own.isdisjoint(clean), "routes share a tensor"


def _backward(model: nn.Module, x: Tensor, z: Tensor) -> None:
    """One training pass per route; its parameters and the images must get a finite gradient."""
    x, z = x.clone().requires_grad_(), z.clone().requires_grad_()
    loss = model(x).square().sum()
    with route(model, "adv"):
        loss = loss + model(z).square().sum()
    loss.backward()
    for image in (x, z):
        assert image.grad is not None, "an attack needs the images' gradient"
        assert image.grad.isfinite().all()
    for name, p in model.named_parameters():
        assert ".routes." not in name or p.grad is not None, f"{name} takes no part in its route"


def _images(size: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, 3, size, size, generator=g), torch.randn(
        IMAGES, 3, size, size, generator=g
    ) + 1


def _logits(model: nn.Module, x: Tensor, name: str = CLEAN) -> Tensor:
    with torch.no_grad(), route(model, name):
        out: Tensor = model(x)
    return out


# ---- the script


def run_all(only: str) -> list[Row]:
    rows = []
    for case in [case for case in cases() if only in case.name]:
        try:
            row = check(case)
        except Exception as error:  # one network's trouble is a row, not the end
            traceback.print_exc(limit=-2)
            row = Row(**vars(case), problem=f"{type(error).__name__}: {error}")
        result = row.problem or "ok"
        print(
            f"{row.name:<45}{row.batch_norms:>5} batch norms {row.seconds:6.1f} s  {result}",
            flush=True,
        )
        rows.append(row)
        gc.collect()  # the next network may need the memory of this one
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per torchvision network and timm family."""
    lines = [
        "| network | million parameters | batch-norm layers | of class | result |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        kinds = ", ".join(row["kinds"]) or "none: routes share normalisation"
        layers, result = row["batch_norms"] or "-", row["problem"] or "ok"
        millions = row["parameters"] / 1e6
        lines.append(f"| `{row['name']}` | {millions:.1f} | {layers} | {kinds} | {result} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default="", help="networks whose name contains this; others keep their rows"
    )
    args = parser.parse_args()
    import timm

    before = {row["name"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    rows = before | {row.name: asdict(row) for row in run_all(args.only)}
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, timm)}
    RESULTS.write_text(json.dumps(versions | {"rows": list(rows.values())}, indent=1) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    head, begin, rest = text.partition("<!-- begin zoo -->\n")
    _, end, tail = rest.partition("<!-- end zoo -->")
    assert end, PAGE
    with_norm = sum(bool(row["batch_norms"]) for row in rows.values())
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    said = f"{len(rows)} networks, {with_norm} of them with batch norm; {named}.\n"
    PAGE.write_text(
        f"{head}{begin}{table(list(rows.values()))}\n\n{said}{end}{tail}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
