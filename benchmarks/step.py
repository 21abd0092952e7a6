"""What the engine, split batch norm and each method cost per training step.

    python benchmarks/step.py [--rounds 20] [--threads 1] [--out FILE.json] [--only engine|norm|methods]
        [--system-allocator]

engine: TrainStep against a loop written by hand that does the same arithmetic (same forward, backward, attack and
optimizer; no clock, no check for non-finite numbers, no keyed randomness).
norm: one forward-backward of a clean and an adversarial half through split batch norm, against one plain forward of
the same concatenated images, two plain forwards, and timm's split batch norm.
methods: a whole step of each method against the noise control, which has the same views and no attack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Case, about, measure, parser, show, write
from torch import Tensor, nn

from conadv import (
    FGSM,
    Concurrent,
    MultiView,
    Noise,
    PixelSpace,
    RandomSigns,
    Recycle,
    Sequential,
    TrainStep,
    Vanilla,
    frozen_stats,
    route,
    split_batchnorm,
)
from conadv.allocator import keep_freed_memory
from conadv.models import SmallResNet
from conadv.types import Batch, MicroBatch

SPACE = PixelSpace((0.5,), (0.25,))
EPS = 4 / 255
ATTACK = FGSM(EPS, space=SPACE)

# name -> (depth, width, channels, image size, local batch)
WORKLOADS = {
    "ResNet-20, 32x32, batch 64": (20, 16, 3, 32, 64),
    "ResNet-8, 8x8, batch 898": (8, 16, 1, 8, 898),
    "ResNet-8, 8x8, batch 32": (8, 16, 1, 8, 32),
}
METHODS = {
    "vanilla": Vanilla(),
    "multiview": MultiView(),
    "noise": Noise(RandomSigns(EPS, SPACE)),
    "disadv": Sequential(ATTACK),
    "conadv": Concurrent(ATTACK, 1),
    "conadv + look-ahead": Concurrent(ATTACK, 1, lookahead=True),
    "recycle": Recycle(ATTACK),
}


def network(workload: str, device: str) -> nn.Module:
    depth, width, channels, _, _ = WORKLOADS[workload]
    torch.manual_seed(0)
    return split_batchnorm(SmallResNet(depth, width, channels, 10), "adv").to(device)


def batch(workload: str, device: str, step: int = 0) -> Batch:
    _, _, channels, size, count = WORKLOADS[workload]
    g = torch.Generator().manual_seed(step)
    x = SPACE.normalize(torch.rand(count, channels, size, size, generator=g)).to(device)
    y = torch.randint(0, 10, (count,), generator=g).to(device)
    return Batch(step, (MicroBatch(0, y, {"clean": x, "second": x.clone()}),))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def with_engine(workload: str, method: str, device: str) -> Callable[[], object]:
    """A step through TrainStep; the batches of steps t and t + 1 are the same images under their own numbers."""
    model = network(workload, device)
    engine = TrainStep(model, optimizer(model), METHODS[method], space=SPACE)
    micro = batch(workload, device).micro

    def step() -> None:
        t = engine.version
        engine(Batch(t, micro), Batch(t + engine.ahead, micro) if engine.ahead else None)

    return step


def by_hand(workload: str, method: str, device: str) -> Callable[[], object]:
    """The same arithmetic as a loop of one's own: vanilla, or the attack before (disadv) or after (conadv) backward."""
    model = network(workload, device)
    update = optimizer(model)
    micro = batch(workload, device).micro[0]
    x, y = micro.views["clean"], micro.y_N
    waiting: list[Tensor] = []

    def attack() -> Tensor:
        leaf = x.detach().requires_grad_()
        with route(model, "adv"), frozen_stats(model):
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        return ATTACK.from_gradient(leaf, gradient)

    def step() -> float:
        loss = F.cross_entropy(model(x), y) / (1 if method == "vanilla" else 2)
        if method != "vanilla":
            x_adv = waiting.pop() if waiting else attack()
            loss.backward()
            with route(model, "adv"):
                loss = F.cross_entropy(model(x_adv), y) / 2
        loss.backward()
        if method == "conadv":
            waiting.append(attack())
        update.step()
        update.zero_grad()
        return loss.item()

    return step


def engine_cases(device: str) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for workload in WORKLOADS:
        for method in ("vanilla", "disadv", "conadv"):
            hand = f"{workload}: {method} by hand"
            cases[hand] = Case(by_hand(workload, method, device), hand)
            cases[f"{workload}: {method} engine"] = Case(with_engine(workload, method, device), hand)
    return cases


def norm_cases(device: str) -> dict[str, Case]:
    workload = "ResNet-20, 32x32, batch 64"
    depth, width, channels, _, count = WORKLOADS[workload]
    torch.manual_seed(0)
    plain = SmallResNet(depth, width, channels, 10).to(device)
    twin = copy.deepcopy(plain)
    split = split_batchnorm(copy.deepcopy(plain), "adv")
    x = batch(workload, device).micro[0].views["clean"]
    both = torch.cat([x, x + 0.01])

    def run(model: nn.Module, *inputs: Tensor) -> Callable[[], None]:
        def step() -> None:
            sum(model(z).square().sum() for z in inputs).backward()  # type: ignore[union-attr]
            model.zero_grad()

        return step

    def routed() -> None:
        with route(split, {"clean": count, "adv": count}):
            run(split, both)()

    def apart() -> None:
        for name, half in zip(("clean", "adv"), both.split(count), strict=True):
            with route(split, name):
                run(split, half)()

    one, two = "plain, one forward of both halves", "plain, two forwards"
    cases = {
        one: Case(run(plain, both), one),
        two: Case(run(twin, *both.split(count)), two),
        "conadv split, one forward": Case(routed, one),
        "conadv split, one forward (against two)": Case(routed, two),
        "conadv split, two forwards (the CPU's default)": Case(apart, two),
    }
    try:
        from timm.layers import convert_splitbn_model
    except ImportError:
        print("timm is not installed: its line is left out (pip install timm).")
        return cases
    timm_split = convert_splitbn_model(copy.deepcopy(plain), 2)
    cases["timm split, one forward"] = Case(run(timm_split, both), one)
    return cases


def method_cases(device: str) -> dict[str, Case]:
    cases = {}
    for workload in list(WORKLOADS)[:2]:
        for method in METHODS:
            cases[f"{workload}: {method}"] = Case(with_engine(workload, method, device), f"{workload}: noise")
    return cases


SECTIONS = {"engine": engine_cases, "norm": norm_cases, "methods": method_cases}


def main() -> None:
    options = parser(__doc__, rounds=20)
    options.add_argument("--only", choices=SECTIONS)
    options.add_argument("--system-allocator", action="store_true", help="let glibc give freed memory back")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.system_allocator:
        keep_freed_memory()  # as the program does
    tables = {}
    for name, make in SECTIONS.items():
        if arguments.only in (None, name):
            tables[name] = measure(make(arguments.device), arguments.rounds, arguments.device)
            show(name, tables[name])
    write(arguments.out, about(arguments), tables)


if __name__ == "__main__":
    main()
