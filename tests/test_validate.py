"""A checkpoint from a stranger: state of other shapes, types and numbers is refused."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conadv import EMA, Concurrent
from conadv.engine.guard import LossScale
from conadv.engine.pending import Expected
from conadv.engine.validate import check_like, load_average, load_optimizer, load_weights
from conadv.errors import ConadvError
from conadv.optim import OPTIMIZERS
from conadv.optim.groups import parameter_groups
from conadv.optim.lamb import LAMB
from conadv.optim.lars import LARS
from conadv.optim.make import build_optimizer
from conadv.optim.trust_ratio import flat_alike
from conadv.training import checkpoint
from conadv.training.loop import train
from conadv.training.run_dir import RunDir

from .helpers import images, same, tiny_resnet
from .test_methods import ATTACK, as_batch, make
from .test_training import CPU, config

State = dict[str, Any]
Change = Callable[[Any], object]

TENSORS: dict[str, Change] = {
    "too small": lambda x: torch.zeros(1),
    "too large": lambda x: torch.zeros(2 * x.numel() + 2),
    "another shape": lambda x: x.reshape(1, *x.shape),
    "expanded": lambda x: torch.zeros(1).expand(x.shape) if x.dim() else x.expand(5),
    "huge": lambda x: torch.zeros(1).expand(2**33),
    "overlapping": lambda x: x.as_strided(x.shape, [1] * x.dim()) if x.dim() > 1 else None,
    "complex": lambda x: x.to(torch.complex64),
    "whole numbers": lambda x: x.to(torch.int64),
    "sparse": lambda x: x.to_sparse(),
    "text": lambda x: "x",
    "nothing": lambda x: None,
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_must_be_like_the_runs_own(kind: str) -> None:
    # Red when: check_like leaves out the test of shape, dtype, layout or _is_dense.
    for like in (torch.ones(3, 4), torch.tensor(2.0)):
        with pytest.raises(ConadvError, match=r"^its state: w is "):
            check_like({"w": TENSORS[kind](like)}, {"w": like}, "its state")


def test_dense_means_one_place_for_each_element() -> None:
    # Red when: _is_dense asks for contiguous memory only.
    for like in (torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.zeros(0, 3)):
        assert check_like(like, like, "x") is like


def test_weights_and_averages(tmp_path: Path) -> None:
    # Red when: load_weights compares nothing (torch casts), or the count is not looked at (-10: a
    # division by zero).
    model, average = tiny_resnet(seed=1), EMA(tiny_resnet(), 0.9)
    load_weights(model, tiny_resnet().state_dict())
    assert same(model.state_dict(), tiny_resnet().state_dict())
    for name, value in (
        ("conv1.weight", model.conv1.weight.to(torch.complex64)),
        ("conv1.weight", torch.zeros(1).expand(4, 3, 3, 3)),
        ("bn1.num_batches_tracked", 3),
    ):
        with pytest.raises(ConadvError, match="its model"):
            load_weights(model, {**model.state_dict(), name: value})
    saved = copy.deepcopy(average.state_dict())
    load_average(average, saved)
    for changed in ({**saved, "n_averaged": torch.tensor(-10)}, "x"):
        with pytest.raises(ConadvError, match="its average"):
            load_average(average, changed)


# ---- optimizers


def optimizer(name: str, updates: int = 0) -> torch.optim.Optimizer:
    model = tiny_resnet("adv")  # the route "adv" gets no gradient
    groups = parameter_groups(model, weight_decay=1e-4)
    made = build_optimizer(name, groups, 0.1)
    for _ in range(updates):
        model(images()[0]).sum().backward()
        made.step()
    return made


def put(state: Any, *path: Any) -> None:
    *keys, last, value = path
    for key in keys:
        state = state[key]
    state[last] = value


def refused(name: str, change: Change) -> None:
    saved = copy.deepcopy(optimizer(name, 2).state_dict())
    change(saved)
    with pytest.raises(ConadvError, match="its optimizer"):
        load_optimizer(optimizer(name), saved)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_loads_what_it_makes_and_nothing_else(name: str) -> None:
    # Red when: load_optimizer leaves out _check_states (too small: the process may die), or
    # check_keys lets a missing or unknown key pass.
    saved, fresh = optimizer(name, 2).state_dict(), optimizer(name)
    load_optimizer(fresh, copy.deepcopy(saved))
    first = next(n for n, state in saved["state"].items() if any(x.dim() for x in state.values()))
    for key, value in saved["state"][first].items():
        assert same(fresh.state_dict()["state"][first], saved["state"][first])
        for kind in TENSORS.values():
            refused(name, _put("state", first, key, kind(value)))
        refused(name, lambda s, k=key: put(s, "state", first, k + "_", s["state"][first][k]))
        if len(saved["state"][first]) > 1:  # without all of it, it is one without a gradient
            refused(name, lambda s, k=key: s["state"][first].pop(k))


def _put(*path: Any) -> Change:
    return lambda state: put(state, *path)


@pytest.mark.parametrize(
    "change",
    [
        _put("state", 10_000, {}),
        _put("state", "x"),
        _put("state", 0, "x"),
        _put("param_groups", []),
        _put("param_groups", 0, "x"),
        _put("param_groups", 0, "lr", "x"),
        _put("param_groups", 0, "lr", float("nan")),
        _put("param_groups", 0, "lr", torch.ones(10)),
        _put("more", 1),
    ],
)
def test_an_optimizer_with_other_numbers_and_groups_is_refused(change: Change) -> None:
    # Red when: the keys of states, the number of groups or a learning rate are not looked at.
    refused("lamb", change)


def test_how_a_step_is_carried_out_is_the_device_s() -> None:
    # Red when: `fused`, which a checkpoint of another device has otherwise, is loaded.
    saved, fresh = optimizer("sgd", 1).state_dict(), optimizer("sgd")
    for group in saved["param_groups"]:
        group["fused"] = None
    load_optimizer(fresh, saved)
    assert all(group["fused"] for group in fresh.param_groups)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_the_fused_kernels_never_see_another_shape(kind: type[LARS] | type[LAMB]) -> None:
    # Red when: flat_alike compares no shapes; the kernel then writes outside of the one element.
    w = torch.nn.Parameter(torch.ones(4096))
    assert not flat_alike(w, torch.zeros(1))
    made = kind([w], 0.1)
    w.grad = torch.ones_like(w)
    made.step()
    for key, value in made.state[w].items():
        if value.dim():
            made.state[w][key] = torch.zeros(1)
    with pytest.raises(RuntimeError):
        made.step()


# ---- the step's own state


def _waiting(part: str, value: Any) -> Change:
    def change(state: State) -> None:
        (entry,) = state["pending"].values()
        if part in ("images", "labels"):
            entry[part][1] = value(entry[part][1]) if callable(value) else value
        else:
            entry[part] = value

    return change


def _again(step: str) -> Change:
    return lambda s: put(s, "pending", step, next(iter(s["pending"].values())))


STEP: dict[str, Change] = {
    "images smaller": _waiting("images", lambda x: x[..., :4]),
    "images float64": _waiting("images", lambda x: x.double()),
    "images expanded": _waiting("images", lambda x: x[:1, :, :1, :1].expand(x.shape)),
    "labels large": _waiting("labels", torch.full((4,), 10**6)),
    "labels negative": _waiting("labels", torch.full((4,), -1)),
    "labels float": _waiting("labels", torch.zeros(4)),
    "dtype": _waiting("dtype", "int8"),
    "dtype of torch": _waiting("dtype", "nn"),
    "version": _waiting("weight_version", 10**30),
    "more": _waiting("more", 1),
    "one micro-batch": lambda s: next(iter(s["pending"].values()))["images"].pop(),
    "far ahead": _again("9"),
    "odd step": _again("x"),
    "in_a_row low": _put("guard", "in_a_row", -1),
    "in_a_row nan": _put("guard", "in_a_row", float("nan")),
    "in_a_row true": _put("guard", "in_a_row", True),
    "scale": _put("guard", "scale", {"scale": 1.0, "good_steps": 0}),
    "look-ahead": _put("lookahead", "x"),
    "look-ahead of one": _put("lookahead", "conv1.weight", torch.zeros(1)),
    "engine more": _put("more", 1),
}


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("name", STEP)
def test_a_steps_state_that_is_not_of_this_run_is_refused(name: str, lookahead: bool) -> None:
    # Red when: Expected.check, check_count, check_keys or check_like is left out at that place.
    def engine() -> Any:  # without momentum look-ahead remembers weights
        return make(
            Concurrent(ATTACK, 1, lookahead),
            optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1),
        )

    trained = engine()
    trained(as_batch(0, count=2), as_batch(1, count=2))
    expected = Expected(2, (4, 3, 8, 8), classes=5, ahead=1)
    saved = copy.deepcopy(trained.state_dict())
    engine().load_state_dict(copy.deepcopy(saved), expected)
    STEP[name](saved)
    with pytest.raises(ConadvError, match=r"^its |^the (labels|weights) of its"):
        engine().load_state_dict(saved, expected)


@pytest.mark.parametrize(
    "state",
    [
        *({"scale": x, "good_steps": 0} for x in (3.0, 0.0, float("inf"), "x")),
        {"scale": 2.0, "good_steps": -1},
        {"scale": 2.0},
    ],
)
def test_a_loss_scale_is_a_power_of_two(state: State) -> None:
    # Red when: load_state_dict takes what it gets.
    scale = LossScale()
    with pytest.raises(ConadvError, match=r"its (loss scale|good_steps)"):
        scale.load_state_dict(state)
    assert scale == LossScale()


# ---- a run


CHANGES: dict[str, Change] = {
    "optimizer": _put("optimizer", "state", 0, "momentum_buffer", torch.zeros(1)),
    "model": _put("model", "conv1.weight", torch.zeros(1)),
    "engine": _put("engine", "guard", "in_a_row", -1),
    "average": _put("ema", "module.conv1.weight", torch.zeros(1)),
    "probe": _put("probe", "waiting", {3: {1: {"stale": {}}}}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    probe = {"probe__every_epochs": 0.5, "probe__staleness": (1,), "probe__images": 16}
    train(config(method="conadv", ema__decay=0.9, steps=3, epochs=None, **probe), out)
    return out


@pytest.mark.parametrize("part", CHANGES)
def test_every_part_of_a_checkpoint_is_validated_on_resume(
    part: str, trained: Path, tmp_path: Path
) -> None:
    # Red when: resume loads a part without its check, or its error does not say what to do.
    mine = Path(shutil.copytree(trained, tmp_path / "run"))
    state = checkpoint.load_newest(mine / "checkpoints", CPU)
    CHANGES[part](state)
    checkpoint._write(mine / "checkpoints" / f"step_{state['step']:08d}.pt", state)
    with pytest.raises(ConadvError, match="does not fit the run's config"):
        train(RunDir(mine).open(), mine, resume=True)
