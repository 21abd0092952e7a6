"""Small timings: TrainStep, split batch norm and the optimizers, each beside what others have.

    python benchmarks/micro.py engine|norm|optim [--rounds 20] [--threads 1] [--out FILE.json]
    torchrun --nproc-per-node 2 benchmarks/micro.py engine   # beside DistributedDataParallel

engine: a step through TrainStep beside the same arithmetic by hand: no clock, no check for
non-finite numbers, no keyed randomness. norm: forward and backward of two halves through split
batch norm, beside plain ones and timm's. optim: an optimizer step on ResNet-50's parameters;
yardsticks are torch's fused SGD (for LARS) and AdamW (for LAMB); norm and bias parameters have
neither weight decay nor trust ratio in any of them. timm's lines are left out without timm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchvision
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import conadv
from conadv.cli.bench import BenchArgs, prepare, show, write
from conadv.models.small import SmallResNet
from conadv.planning.timing import Case, burst, measure

SPACE = conadv.PixelSpace((0.5,), (0.25,))
ATTACK = conadv.FGSM(4 / 255, space=SPACE)
WORKLOADS = {  # depth, channels, size, images
    "ResNet-20, 32x32, batch 64": (20, 3, 32, 64),
    "ResNet-8, 8x8, batch 898": (8, 1, 8, 898),
    "ResNet-8, 8x8, batch 32": (8, 1, 8, 32),
}
HALF = 64
Runs = dict[str, tuple[Callable[[], object], str]]
"""Case -> what to time, and its yardstick."""


@dataclass
class Args(BenchArgs):
    what: tyro.conf.Positional[Literal["engine", "norm", "optim"]] = "engine"
    rounds: int = 20


def engine(comm: conadv.Comm) -> Runs:
    """conadv by conadv.TrainStep and by hand; under torchrun vanilla, beside DDP."""
    runs: Runs = {}
    method = conadv.Concurrent(ATTACK, 1) if comm.ranks == 1 else None
    for name, (depth, channels, size, count) in WORKLOADS.items():
        x = torch.randn(count, channels, size, size, device=comm.device).clamp_(-2, 2)
        y = torch.randint(0, 10, (count,), device=comm.device)
        torch.manual_seed(0)
        model = conadv.split_batchnorm(SmallResNet(depth, 16, channels, 10), "adv").to(comm.device)
        hand = f"{name}: by hand"
        runs[hand] = by_hand(copy.deepcopy(model), method, x, y, comm), hand
        step = conadv.TrainStep(
            model, torch.optim.SGD(model.parameters(), 0.01, 0.9), method, comm=comm
        )
        runs[f"{name}: engine"] = partial(with_engine, step, x, y), hand
    return runs


def with_engine(step: conadv.TrainStep, x: Tensor, y: Tensor) -> None:
    micro = (conadv.MicroBatch(step.comm.rank, y, {"clean": x}),)
    ahead = conadv.Batch(step.version + step.ahead, micro) if step.ahead else None
    step(conadv.Batch(step.version, micro), ahead)


def by_hand(
    model: nn.Module, method: conadv.Concurrent | None, x: Tensor, y: Tensor, comm: conadv.Comm
) -> Callable[[], float]:
    """A loop of one's own: conadv on one rank, plain training by DistributedDataParallel on
    several.
    """
    update = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    network: Any = model
    if comm.ranks > 1:
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        network = DistributedDataParallel(model, find_unused_parameters=True, **options)
    waiting: list[Tensor] = []

    def attack() -> Tensor:
        leaf = x.detach().requires_grad_()
        with conadv.route(model, "adv"), conadv.frozen_stats(model):
            loss = F.cross_entropy(model(leaf), y, reduction="sum")
            return ATTACK.from_gradient(leaf, torch.autograd.grad(loss, leaf)[0])

    def step() -> float:
        loss = F.cross_entropy(network(x), y)
        if method is not None:
            (loss / 2).backward()
            with conadv.route(model, "adv"):
                loss = F.cross_entropy(model(waiting.pop() if waiting else attack()), y) / 2
        loss.backward()
        if method is not None:
            waiting.append(attack())
        update.step()
        update.zero_grad()
        return loss.item()

    return step


def norm(comm: conadv.Comm) -> Runs:
    one, two = "plain, one forward of both halves", "plain, two forwards"
    plain = SmallResNet(20, 16, 3, 10).to(comm.device)
    both = torch.randn(2 * HALF, 3, 32, 32, device=comm.device)
    halves = dict(zip(("clean", "adv"), both.split(HALF), strict=True))
    split = conadv.split_batchnorm(copy.deepcopy(plain), "adv")

    def together() -> None:
        with conadv.route(split, {"clean": HALF, "adv": HALF}):
            passes(split, both)

    def apart() -> None:
        for name, half in halves.items():
            with conadv.route(split, name):
                passes(split, half)

    runs: Runs = {
        one: (partial(passes, plain, both), one),
        two: (partial(passes, copy.deepcopy(plain), *halves.values()), two),
        "conadv split, one forward": (together, one),
        "conadv split, two forwards (the CPU's default)": (apart, two),
    }
    if find_spec("timm"):
        from timm.layers import convert_splitbn_model

        theirs = convert_splitbn_model(copy.deepcopy(plain), 2)
        runs["timm split, one forward"] = partial(passes, theirs, both), one
    return runs


def passes(model: nn.Module, *inputs: Tensor) -> None:
    torch.stack([model(x).square().sum() for x in inputs]).sum().backward()
    model.zero_grad()


def optim(comm: conadv.Comm) -> Runs:
    sgd, adamw = "torch SGD fused", "torch AdamW fused"
    forms: dict[str, tuple[Any, dict[str, Any], str]] = {
        sgd: (torch.optim.SGD, {"momentum": 0.9, "fused": True}, sgd),
        adamw: (torch.optim.AdamW, {"fused": True}, adamw),
    }
    for form, foreach in {"default": None, "loop": False, "foreach": True}.items():
        forms[f"conadv LARS {form}"] = conadv.LARS, {"foreach": foreach}, sgd
        forms[f"conadv LAMB {form}"] = conadv.LAMB, {"foreach": foreach}, adamw
    if find_spec("timm"):
        import timm.optim

        forms["timm LARS"] = timm.optim.Lars, {"momentum": 0.9}, sgd
        forms["timm LAMB"] = timm.optim.Lamb, {}, adamw
    return {
        name: (optimizer_step(kind, comm.device, **settings), yardstick)
        for name, (kind, settings, yardstick) in forms.items()
    }


def optimizer_step(kind: Any, device: torch.device, **settings: Any) -> Callable[[], object]:
    """The step of an optimizer over ResNet-50 with random gradients."""
    model = torchvision.models.resnet50().to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    groups = conadv.parameter_groups(model, weight_decay=5e-5)
    if kind not in (conadv.LARS, conadv.LAMB):
        groups = [{name: group[name] for name in ("params", "weight_decay")} for group in groups]
    step: Callable[[], object] = kind(groups, lr=1e-3, **settings).step
    return step


def main() -> None:
    args = tyro.cli(Args)
    prepare(args)
    comm = conadv.Comm.from_environment(args.device)
    runs = {"engine": engine, "norm": norm, "optim": optim}[args.what](comm)
    cases = {
        name: Case(partial(burst, run, 1), yardstick) for name, (run, yardstick) in runs.items()
    }
    rows = [asdict(row) for row in measure(cases, args.rounds, comm)]
    if comm.is_main:
        show(rows)
        write(args.what, args, comm, rows)
    comm.close()


if __name__ == "__main__":
    main()
