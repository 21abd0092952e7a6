"""Time of an optimizer step on ResNet-50's parameters, beside torch's and timm's optimizers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torchvision

from conadv.bench import output
from conadv.bench.harness import Case, measure, timed
from conadv.bench.options import OptimArgs
from conadv.distributed.environment import pick_device
from conadv.optim.groups import parameter_groups
from conadv.optim.lamb import LAMB
from conadv.optim.lars import LARS

try:
    import timm.optim
except ImportError:
    timm = None

FIRST_ORDER, SECOND_ORDER = "torch SGD fused", "torch AdamW fused"
TORCH_FORMS: dict[str, dict[str, Any]] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
OUR_FORMS: dict[str, bool | None] = {"default": None, "loop": False, "foreach": True}


def command(options: OptimArgs) -> None:
    """Measure, print a table, write JSON."""
    output.prepare(options)
    device = pick_device(options.device)
    if timm is None:
        sys.stderr.write("timm is not installed: its two lines are left out (pip install timm).\n")
    rows = measure(cases(device), options.rounds, seconds=options.seconds, seed=options.seed)
    output.finish(
        "optim",
        options,
        device,
        rows,
        timm=timm.__version__ if timm is not None else "not installed",
    )


def cases(device: torch.device) -> dict[str, Case]:
    steps: dict[str, tuple[Callable[[], Any], str]] = {}
    for form, settings in TORCH_FORMS.items():
        steps[f"torch SGD {form}"] = (
            step_of(torch.optim.SGD, device, momentum=0.9, **settings),
            FIRST_ORDER,
        )
        steps[f"torch AdamW {form}"] = (
            step_of(torch.optim.AdamW, device, **settings),
            SECOND_ORDER,
        )
    for form, foreach in OUR_FORMS.items():
        steps[f"conadv LARS {form}"] = (step_of(LARS, device, foreach=foreach), FIRST_ORDER)
        steps[f"conadv LAMB {form}"] = (step_of(LAMB, device, foreach=foreach), SECOND_ORDER)
    if timm is not None:
        steps["timm LARS"] = (step_of(timm.optim.Lars, device, momentum=0.9), FIRST_ORDER)
        steps["timm LAMB"] = (step_of(timm.optim.Lamb, device), SECOND_ORDER)
    in_order = sorted(steps, key=lambda name: steps[name][1] == SECOND_ORDER)
    return {name: Case(timed(steps[name][0], device), steps[name][1]) for name in in_order}


def step_of(kind: Callable[..., Any], device: torch.device, **settings: Any) -> Callable[[], Any]:
    """The step of an optimizer over ResNet-50 with random gradients; each has weights and state of its own."""
    model = torchvision.models.resnet50().to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    groups = parameter_groups(model, weight_decay=5e-5)
    if kind not in (LARS, LAMB):
        groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups]
    step: Callable[[], Any] = kind(groups, lr=1e-3, **settings).step
    return step
