"""Numbers that are not finite: stop or skip, what a step that is left out leaves behind, fp16,
clipping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conadv import (
    FGSM,
    LAMB,
    ConadvError,
    Concurrent,
    NonFiniteError,
    PixelSpace,
    Recycle,
    TrainStep,
    Vanilla,
    windows,
)
from conadv.cli.program import main
from conadv.config.schema import Config
from conadv.engine.guard import LossScale
from conadv.report import write_report
from conadv.training.checkpoint import load_newest
from conadv.training.loop import train
from conadv.training.record import read_lines

from .helpers import batches, images, parameters, same, state, tiny_resnet, train_step
from .test_training import config, weights, without_times

SPACE = PixelSpace((0.0,), (1.0,))
NAN = float("nan")
Raw = tuple[Tensor, Tensor]


def make(method: Any = None, model: nn.Module | None = None, **options: Any) -> TrainStep:
    torch.manual_seed(0)
    model = model or tiny_resnet("adv")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    options.setdefault("on_nonfinite", "skip")
    return train_step(model, optimizer, method or Vanilla(), space=SPACE, **options)


def spoilt(batch: Raw) -> Raw:
    x, y = batch
    x = x.clone()
    x[3, 0, 0, 0] = NAN
    return x, y


def run(engine: TrainStep, stream: Sequence[Raw]) -> list[Any]:
    return [engine(batch, future) for batch, future in windows(stream, engine.ahead)]


def momenta(engine: TrainStep) -> dict[str, Tensor]:
    names = {p: name for name, p in engine.model.named_parameters()}
    return {names[p]: s["momentum_buffer"].clone() for p, s in engine.optimizer.state.items()}


def test_a_step_that_is_left_out_leaves_everything_as_it_was() -> None:
    # Red when: restore is not called (running statistics hold NaN); the optimizer steps; the
    # version stays.
    stream = batches(3)
    engine = make(lr_at=lambda step: 0.1 / (step + 1))
    engine(stream[0])
    before, moments = state(engine.model), momenta(engine)
    done = engine(spoilt(stream[1]))
    assert done.skipped == "the loss of the clean view is nan"
    assert math.isnan(done.loss)
    assert (done.step, done.lr, engine.version) == (1, 0.05, 2)
    assert same(state(engine.model), before)
    assert same(momenta(engine), moments)
    assert all(p.grad is None for p in engine.model.parameters())
    after = engine(stream[2])
    assert (after.step, after.lr, after.skipped) == (2, 0.1 / 3, None)
    assert not same(state(engine.model), before)


def test_stop_is_the_default_and_says_what_is_wrong() -> None:
    # Red when: the images are not looked at, or are blamed for a learning rate.
    with pytest.raises(
        NonFiniteError, match=r"Step 0: the loss of the clean view is nan.*images of the clean view"
    ):
        make(on_nonfinite="stop")(spoilt(images()))
    model = tiny_resnet("adv")
    with torch.no_grad():
        model.fc.weight.fill_(1e38)
    with pytest.raises(NonFiniteError, match=r"The images are finite: lower the learning rate"):
        make(model=model, on_nonfinite="stop")(images())


def test_the_limit_counts_steps_in_a_row() -> None:
    # Red when: a good step does not set the count back, or the limit is off by one.
    stream = batches(9)
    engine = make(nonfinite_limit=2)
    for t, bad in enumerate("xx.xx."):
        assert (engine(spoilt(stream[t]) if bad == "x" else stream[t]).skipped is not None) == (
            bad == "x"
        )
    engine(spoilt(stream[6]))
    engine(spoilt(stream[7]))
    # Red when: state_dict leaves the guard out.
    resumed = make(nonfinite_limit=2)
    resumed.load_state_dict(engine.state_dict())
    with pytest.raises(NonFiniteError, match="Step 8"):
        resumed(spoilt(stream[8]))
    with pytest.raises(NonFiniteError, match=r"Step 8.*So were the 2 steps before it"):
        engine(spoilt(stream[8]))
    assert all(value.isfinite().all() for value in engine.model.state_dict().values())


class _Bad(torch.autograd.Function):
    """Passes its input on; its gradient is infinite when ``now`` says so."""

    now = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf if _Bad.now else gradient


class _BadNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_resnet("adv")

    def forward(self, x: Tensor) -> Tensor:
        return _Bad.apply(self.net(x))


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_gradient_alone_may_be_the_one(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: only losses are judged; with "stop", the check stands after optimizer.step().
    engine = make(model=_BadNet(), on_nonfinite=policy)
    engine(images())
    before = state(engine.model)
    monkeypatch.setattr(_Bad, "now", True)
    if policy == "stop":
        with pytest.raises(NonFiniteError, match="Step 1: the gradient"):
            engine(images())
        assert engine.version == 1
        assert same(parameters(engine.model), {n: before[n] for n in parameters(engine.model)})
    else:
        done = engine(images())
        assert (done.skipped or "").startswith("the gradient is ")
        assert math.isfinite(done.loss)
        assert same(state(engine.model), before)
    assert all(p.grad is None for p in engine.model.parameters())


@pytest.mark.parametrize("method", ["concurrent", "lookahead", "recycle"])
def test_methods_go_on_after_a_step_that_was_left_out(method: str) -> None:
    # Red when: recycle's images of the bad step still wait (step 3 would then be left out, too).
    attack = FGSM(0.1, "l2", space=SPACE)  # the sign of NaN would be 0
    made = {
        "concurrent": Concurrent(attack),
        "lookahead": Concurrent(attack, 1, True),
        "recycle": Recycle(attack),
    }
    model = _BadNet()
    engine = make(made[method], model)
    stream, found = batches(6), []
    for t, (batch, future) in enumerate(windows(stream, engine.ahead)):
        _Bad.now = t == 2
        engine.gradient(batch)
        _Bad.now = False
        engine.prepare(future)
        found.append(engine.update().skipped is not None)
    assert found == [t == 2 for t in range(6)]


def test_a_run_that_skips_records_every_step_and_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: a step that was left out has no line, or a resumed run counts otherwise.
    original = TrainStep.gradient

    def gradient(engine: TrainStep, batch: Any) -> Any:
        found = original(engine, batch)
        if batch.step in (1, 4):
            next(p for p in engine.model.parameters() if p.grad is not None).grad.fill_(NAN)
        return found

    monkeypatch.setattr(TrainStep, "gradient", gradient)
    settings = config(method="conadv", on_nonfinite="skip")
    train(settings, tmp_path / "whole")
    found = read_lines(tmp_path / "whole" / "record.jsonl")
    lines = [line for line in found if line["type"] == "step"]
    for t, line in enumerate(lines):
        assert (line["step"], line["skipped"]) == (
            t,
            "the gradient is nan" if t in (1, 4) else None,
        )
        assert (line["grad_norm"] is None) == (t in (1, 4))
    assert len(lines) == 6
    assert all(math.isfinite(line["loss"]) for line in lines)
    train(settings, tmp_path / "cut")
    for step in (5, 6):
        (tmp_path / "cut" / "checkpoints" / f"step_{step:08d}.pt").unlink()
    train(settings, tmp_path / "cut", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    again = read_lines(tmp_path / "cut" / "record.jsonl")
    assert without_times(again) == without_times(found)


def diverging(**changes: Any) -> Config:
    """The first update leaves weights that no loss survives."""
    return config(
        optim__name="sgd", optim__lr=1e30, schedule__warmup_epochs=0, epochs=None, **changes
    )


def test_a_run_that_diverges_before_an_evaluation_ends_as_one_that_diverges_before_a_step(
    tmp_path: Path,
) -> None:
    # Red when: _log_evaluations does not call stop_if_diverged (the run then goes on, with null).
    with pytest.raises(
        NonFiniteError,
        match=r"After 1 steps the loss on the \w+ images is nan.*Lower the learning rate",
    ):
        train(diverging(steps=1), tmp_path)
    last = read_lines(tmp_path / "record.jsonl")[-1]
    assert (last["type"], last["step"]) == ("error", 1)


def test_with_skip_an_evaluation_that_is_not_finite_is_null(tmp_path: Path) -> None:
    # Red when: the loss is written as it is; summarize keeps NaN; a probe writes NaN; such a model
    # is the best.
    out = tmp_path / "run"
    settings = diverging(
        steps=3,
        on_nonfinite="skip",
        eval__every_epochs=0.01,
        method="conadv",
        probe={"every_epochs": 0.01, "staleness": (1,), "images": 16},
        data__validation_images=98,
        checkpoint__keep_best=True,
    )
    summary = train(settings, out)
    lines = read_lines(out / "record.jsonl")
    assert {line["loss"] for line in lines if line["type"] == "eval"} == {None}
    assert [summary[f"{split}_loss"] for split in ("train", "validation", "test")] == [None] * 3
    assert not [line for line in lines if line["type"] == "probe"]
    assert load_newest(out / "checkpoints", torch.device("cpu"))["best"] is None
    write_report([out], tmp_path / "report.html")
    for command in (["watch", str(out), "--once"], ["export", str(out)]):  # both read the lines
        assert main(command) == 0


# ---- fp16


def scaler_of(engine: TrainStep) -> LossScale:
    assert engine._guard.scale is not None
    return engine._guard.scale


def test_the_loss_scale_moves_as_torchs_does() -> None:
    # Red when: shrink does not halve, or the count of good steps is not set back.
    mine = LossScale(growth_interval=3)
    torchs = torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], 0.0)
    for overflows in map(int, "0001000010110000000"):
        torchs.scale(weight.sum()).backward()
        if overflows:
            assert weight.grad is not None
            weight.grad.fill_(math.inf)
            mine.shrink()
        else:
            mine.good()
        torchs.step(optimizer)
        torchs.update()
        optimizer.zero_grad()
        assert mine.scale == torchs.get_scale()


def reference(
    model: nn.Module, stream: Sequence[Raw], clip: float | None, make_optimizer: Any
) -> tuple[Any, list[float]]:
    """torch's own recipe: scale, backward, unscale, clip, step, update."""
    optimizer, scaler, norms = make_optimizer(model), torch.amp.GradScaler("cpu"), []
    for x, y in stream:
        with torch.autocast("cpu", torch.float16):
            logits = model(x)
        loss = nn.functional.cross_entropy(logits.float(), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return parameters(model), norms


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "lamb": lambda model: LAMB(model.parameters(), 0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_fp16_is_torchs_recipe(optimizer: str, clip: float | None) -> None:
    # Red when: the gradient is clipped before it is unscaled; LAMB sees the scaled one; the norm in
    # the record is the scaled or the clipped one.
    stream = batches(5)
    want, norms = reference(tiny_resnet(), stream, clip, OPTIMIZERS[optimizer])
    model = tiny_resnet()
    engine = train_step(
        model, OPTIMIZERS[optimizer](model), space=SPACE, precision="fp16", clip_norm=clip
    )
    found = [engine(batch) for batch in stream]
    assert [record.skipped for record in found] == [None] * 5
    assert [record.grad_norm for record in found] == pytest.approx(norms, rel=1e-4)
    assert clip is None or norms[0] > clip  # it does clip
    for name, value in parameters(model).items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-6)


def test_an_overflow_lowers_the_scale_and_leaves_the_step_out() -> None:
    # Red when: it is taken for an error, the running statistics of the step stay, or the scale is
    # not saved.
    engine = make(on_nonfinite="stop", precision="fp16")
    scaler_of(engine).scale = 2.0**40
    before = state(engine.model)
    done = engine(images())
    assert done.skipped == "the gradient overflowed at loss scale 1.09951e+12"
    assert scaler_of(engine).scale == 2.0**39
    assert same(state(engine.model), before)
    other = make(precision="fp16")
    other.load_state_dict(engine.state_dict())
    assert scaler_of(other).scale == 2.0**39
    for _ in range(40):
        done = engine(images())
    assert done.skipped is None
    assert 1 < scaler_of(engine).scale < 2.0**39


def test_at_scale_one_an_overflow_is_the_gradients_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: the scale shrinks for ever.
    monkeypatch.setattr(_Bad, "now", True)
    engine = make(model=_BadNet(), on_nonfinite="stop", precision="fp16")
    scaler_of(engine).scale = 4.0
    assert engine(images()).skipped == "the gradient overflowed at loss scale 4"
    assert engine(images()).skipped == "the gradient overflowed at loss scale 2"
    with pytest.raises(NonFiniteError, match="the gradient is"):
        engine(images())


def test_fp16_attacks_move_images_that_are_classified_with_confidence() -> None:
    # Red when: amplify does nothing (gradients of about 1e-8 vanish in fp16 and the image stays as
    # it is).
    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(48, 2)
            nn.init.constant_(self.fc.bias, 0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)) + torch.tensor([19.0, 0.0])

    model = Sure()
    engine = train_step(
        model, torch.optim.SGD(model.parameters(), 0.1), space=SPACE, precision="fp16"
    )
    x = torch.full((4, 3, 4, 4), 0.5)
    batch = engine._as_batch((x, torch.zeros(4, dtype=torch.long)))
    (made,) = engine.attack_batch(FGSM(0.1, space=SPACE), batch).images
    assert ((made - x).abs() > 0.09).float().mean() > 0.9


def test_misuse() -> None:
    engine = make(precision="fp16")
    engine.gradient(images())
    with pytest.raises(ConadvError, match="call update"):
        engine.advance()
    with pytest.raises(ConadvError, match="on_nonfinite"):
        make(on_nonfinite="ignore")
    with pytest.raises(ConadvError, match="nonfinite_limit"):
        make(nonfinite_limit=0)
