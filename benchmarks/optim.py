"""Seconds per optimizer step on ResNet-50's parameters, beside torch's and timm's optimizers.

    python benchmarks/optim.py [--device cuda] [--rounds 15] [--threads 2] [--out FILE.json]

The yardstick is torch's fused SGD for LARS and SGD, torch's fused AdamW for LAMB and AdamW. Norm and bias parameters
have neither weight decay nor trust ratio in any of them (timm's optimizers see that from weight_decay=0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from harness import Case, about, measure, parser, show, write

from conadv.optim import LAMB, LARS, parameter_groups

try:
    import timm
    from timm.optim import Lamb as TimmLamb
    from timm.optim import Lars as TimmLars
except ImportError:
    timm = None

FIRST_ORDER, SECOND_ORDER = "torch SGD fused", "torch AdamW fused"
FORMS: dict[str, dict[str, Any]] = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def step_of(kind: Callable[..., Any], device: str, **options: Any) -> Callable[[], Any]:
    """The step of an optimizer over ResNet-50 with random gradients; each has weights and state of its own."""
    model = torchvision.models.resnet50().to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    groups = parameter_groups(model, weight_decay=5e-5)
    if kind not in (LARS, LAMB):
        groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups]
    step: Callable[[], Any] = kind(groups, lr=1e-3, **options).step
    return step


def cases(device: str) -> dict[str, Case]:
    made: dict[str, Case] = {}
    for form, options in FORMS.items():
        made[f"torch SGD {form}"] = Case(step_of(torch.optim.SGD, device, momentum=0.9, **options), FIRST_ORDER)
    for form, foreach in (("default", None), ("loop", False), ("foreach", True)):
        made[f"conadv LARS {form}"] = Case(step_of(LARS, device, foreach=foreach), FIRST_ORDER)
    if timm is not None:
        made["timm LARS"] = Case(step_of(TimmLars, device, momentum=0.9), FIRST_ORDER)
    for form, options in FORMS.items():
        made[f"torch AdamW {form}"] = Case(step_of(torch.optim.AdamW, device, **options), SECOND_ORDER)
    for form, foreach in (("default", None), ("loop", False), ("foreach", True)):
        made[f"conadv LAMB {form}"] = Case(step_of(LAMB, device, foreach=foreach), SECOND_ORDER)
    if timm is not None:
        made["timm LAMB"] = Case(step_of(TimmLamb, device), SECOND_ORDER)
    return made


def main() -> None:
    arguments = parser(__doc__, rounds=15).parse_args()
    torch.set_num_threads(arguments.threads)
    if timm is None:
        print("timm is not installed: its two lines are left out (pip install timm).")
    rows = measure(cases(arguments.device), arguments.rounds, arguments.device)
    show("optimizer step, ResNet-50", rows)
    more = {"timm": timm.__version__ if timm is not None else "not installed"}
    write(arguments.out, about(arguments, **more), {"optim": rows})


if __name__ == "__main__":
    main()
