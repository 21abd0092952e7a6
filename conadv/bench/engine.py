"""What the engine costs: TrainStep against the same arithmetic written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conadv.bench import output
from conadv.bench.harness import Case, measure, timed
from conadv.bench.options import EngineArgs
from conadv.bench.workload import ATTACK, METHODS, SPACE, random_images
from conadv.distributed.environment import pick_device
from conadv.engine import TrainStep
from conadv.models.small import SmallResNet
from conadv.nn.split_batchnorm import frozen_stats, route, split_batchnorm
from conadv.types import Batch, MicroBatch


@dataclass(frozen=True)
class Workload:
    """A SmallResNet of ``depth`` on ``count`` images of ``channels`` x ``size`` x ``size``."""

    depth: int
    channels: int
    size: int
    count: int

    def network(self, device: torch.device) -> nn.Module:
        torch.manual_seed(0)
        return split_batchnorm(SmallResNet(self.depth, 16, self.channels, 10), "adv").to(device)

    def micro(self, device: torch.device) -> MicroBatch:
        x, y = random_images((self.count, self.channels, self.size, self.size), 10, 0, device)
        return MicroBatch(0, y, {"clean": x})


WORKLOADS = {
    "ResNet-20, 32x32, batch 64": Workload(20, 3, 32, 64),
    "ResNet-8, 8x8, batch 898": Workload(8, 1, 8, 898),
    "ResNet-8, 8x8, batch 32": Workload(8, 1, 8, 32),
}
COMPARED = ("vanilla", "disadv", "conadv")


def command(options: EngineArgs) -> None:
    """Measure, print a table, write JSON."""
    output.prepare(options)
    device = pick_device(options.device)
    rows = measure(cases(device), options.rounds, seconds=options.seconds, seed=options.seed)
    output.finish("engine", options, device, rows)


def cases(device: torch.device) -> dict[str, Case]:
    made: dict[str, Case] = {}
    for name, workload in WORKLOADS.items():
        for method in COMPARED:
            hand = f"{name}: {method} by hand"
            made[hand] = Case(timed(by_hand(workload, method, device), device), hand)
            made[f"{name}: {method} engine"] = Case(
                timed(with_engine(workload, method, device), device), hand
            )
    return made


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)


def with_engine(workload: Workload, method: str, device: torch.device) -> Callable[[], object]:
    """A step through TrainStep; the batches of steps t and t + 1 are the same images under their own numbers."""
    model = workload.network(device)
    engine = TrainStep(model, optimizer(model), METHODS[method](1), space=SPACE)
    micro = (workload.micro(device),)

    def step() -> None:
        t = engine.version
        engine(Batch(t, micro), Batch(t + engine.ahead, micro) if engine.ahead else None)

    return step


def by_hand(workload: Workload, method: str, device: torch.device) -> Callable[[], object]:
    """The same arithmetic as a loop of one's own: vanilla, or the attack before (disadv) or after (conadv) backward."""
    model = workload.network(device)
    update = optimizer(model)
    micro = workload.micro(device)
    x, y = micro.views["clean"], micro.y_N
    waiting: list[Tensor] = []

    def attack() -> Tensor:
        leaf = x.detach().requires_grad_()
        with route(model, "adv"), frozen_stats(model):
            (gradient,) = torch.autograd.grad(
                F.cross_entropy(model(leaf), y, reduction="sum"), leaf
            )
        return ATTACK.from_gradient(leaf, gradient)

    def step() -> float:
        loss = F.cross_entropy(model(x), y) / (1 if method == "vanilla" else 2)
        if method != "vanilla":
            x_adv = waiting.pop() if waiting else attack()
            loss.backward()  # type: ignore[no-untyped-call]
            with route(model, "adv"):
                loss = F.cross_entropy(model(x_adv), y) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        if method == "conadv":
            waiting.append(attack())
        update.step()
        update.zero_grad()
        return loss.item()

    return step
