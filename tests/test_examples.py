"""The examples run, learn, and do what they say: every step is checked against Algorithm 1 as it
happens.
"""

from __future__ import annotations

import copy
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from conadv import Batch, TrainStep
from conadv.reference.conadv import attacked
from conadv.types import Attack, ExtraBatch

from .helpers import parameters

EXAMPLES = Path(__file__).parent.parent / "examples"
QUIET = {"enable_progress_bar": False, "enable_model_summary": False}
PROGRAMS = {
    "own_loop": {"epochs": 1},
    "lightning_module": {"epochs": 2, "limit": 200, **QUIET},
    "accelerate_loop": {"epochs": 2, "limit": 200},
    "timm_parts": {"epochs": 2, "limit": 100},
}
NEEDS = {"lightning_module": "lightning", "accelerate_loop": "accelerate", "timm_parts": "timm"}


def load(name: str) -> Any:
    """The example as a module, or a skip where what it is an example for is not installed."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    loader = SourceFileLoader(name, str(EXAMPLES / f"{name}.py"))
    module = ModuleType(name)
    loader.exec_module(module)
    return module


class Watched(TrainStep):
    """A TrainStep that holds what the example makes of it against the plain arithmetic, step by
    step.
    """

    engines: ClassVar[list[Watched]] = []

    def __init__(self, *args: Any, **kind: Any) -> None:
        super().__init__(*args, **kind)
        self.made = dict[int, Tensor]()  # by step: its images
        self.trained: list[tuple[int, int | None]] = []
        self.start = parameters(self.model)
        Watched.engines.append(self)

    def attack_batch(self, attack: Attack, batch: Batch, *more: Any) -> ExtraBatch:
        before = parameters(self.model)
        extra = super().attack_batch(attack, batch, *more)
        x, y = self.images(batch.micro[0], "clean"), self.labels(batch.micro[0])
        want = attacked(self.model, before, attack, x, y, torch.Generator())
        assert torch.equal(extra.images[0], want)
        assert not torch.equal(want, x)
        self.made[batch.step] = want
        return extra

    def gradient(self, batch: Any) -> Any:
        twin, step = copy.deepcopy(self.model), self.version
        losses = super().gradient(batch)
        micro = self.inputs.as_batch(batch, step, self.comm.rank).micro[0]
        for name, images in (("clean", self.images(micro, "clean")), ("adv", self.made[step])):
            (self.loss(through(twin, name, images), self.labels(micro)) / 2).backward()
        for p, q in zip(self.model.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        self.trained.append((step, self._extra_version))
        return losses


def through(model: nn.Module, name: str, x: Tensor) -> Tensor:
    from conadv import route

    with route(model, name):
        out: Tensor = model(x)
    return out


@pytest.mark.parametrize("name", PROGRAMS)
def test_examples_train_on_images_made_at_the_weights_before(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Red when: a loop windows every epoch on its own (a step of the second epoch then has staleness
    # 0), calls prepare after the update, or attacks the batch of the present step.
    example = load(name)
    monkeypatch.chdir(tmp_path)  # Lightning writes a checkpoint there
    monkeypatch.setattr(example, "TrainStep", Watched)
    Watched.engines.clear()
    torch.set_num_threads(1)
    example.main(**PROGRAMS[name])
    (engine,) = Watched.engines
    assert len(engine.trained) >= 4
    assert engine.trained == [(t, max(0, t - 1)) for t in range(len(engine.trained))]
    buffers = dict(engine.model.named_buffers())
    means = [key for key in buffers if key.endswith("routes.adv.running_mean")]
    assert means
    for key in means:
        assert not torch.equal(buffers[key], buffers[key.replace("routes.adv.", "")])
    moved = [not torch.equal(p, engine.start[key]) for key, p in engine.model.named_parameters()]
    assert all(moved)


def test_own_loop_learns() -> None:
    # Red when: gradient() does not fill .grad (update() then refuses).
    torch.set_num_threads(1)
    assert load("own_loop").main(epochs=3) > 0.85


def test_accelerate_saves_the_images_that_wait(tmp_path: Path) -> None:
    # Red when: a process's own state goes through Accelerate, which saves that of the first one for
    # all.
    load("accelerate_loop").main(epochs=1, limit=200, folder=str(tmp_path))
    assert {"version", "pending"} <= torch.load(tmp_path / "conadv_0.pt", weights_only=True).keys()
    files = list(tmp_path.glob("custom_checkpoint_*.pkl"))
    saved = [torch.load(path, weights_only=True) for path in files]
    assert len(saved) == 2
    assert "pending" not in set().union(*saved)


def test_lightning_goes_on_with_the_images_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: on_load_checkpoint is left out: the first step after it then attacks its own batch,
    # staleness 0.
    example, found = load("lightning_module"), []
    monkeypatch.chdir(tmp_path)

    class Noted(TrainStep):
        def __call__(self, *pair: Any) -> Any:
            found.append(super().__call__(*pair))
            return found[-1]

    monkeypatch.setattr(example, "TrainStep", Noted)
    options = {"epochs": 3, "limit": 300, **QUIET}
    example.main(max_steps=6, **options)
    (saved,) = tmp_path.rglob("*.ckpt")
    example.main(resume=str(saved), **options)
    assert [record.step for record in found] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert [record.staleness for record in found] == [0] + [1] * 8


@pytest.mark.parametrize("name", PROGRAMS)
def test_examples_are_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 65
