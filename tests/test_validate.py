"""A stranger's checkpoint on resume: state of other shapes, types and numbers is refused before
anything uses it.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conadv.config.resolve import resolve
from conadv.config.schema import Config, replace
from conadv.engine.guard import LossScale
from conadv.engine.validate import check_like
from conadv.errors import ConadvError
from conadv.optim.lamb import LAMB
from conadv.optim.lars import LARS
from conadv.optim.trust_ratio import flat_alike
from conadv.training import checkpoint
from conadv.training.loop import train
from conadv.training.resume import load_run
from conadv.training.run_dir import RunDir

State = dict[str, Any]
CPU = torch.device("cpu")
OPTIMIZERS = {"sgd": 0.1, "adamw": 0.001, "lars": 0.1, "lamb": 0.01}


def tiny(name: str, **changes: Any) -> Config:
    config = Config(method="conadv", staleness=1, steps=3, global_batch_size=4, micro_batch_size=2)
    settings = {
        "model__width": 2,
        "data__train_images": 40,
        "eval__robust_images": 0,
        "eval__train_images": 4,
        "checkpoint__every_epochs": 0.2,
        "optim__name": name,
        "optim__lr": OPTIMIZERS[name],
        **changes,
    }
    return resolve(replace(config, **settings))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of a config after two of three steps, trained once."""
    folder, made = tmp_path_factory.mktemp("runs"), dict[str, Path]()

    def run(name: str, **changes: Any) -> Path:
        key = f"{name}-more" if changes else name
        if key not in made:
            made[key] = folder / key
            train(tiny(name, **changes), made[key])
            (made[key] / "checkpoints" / "step_00000003.pt").unlink()
        return made[key]

    return run


def resumed(run: Path, tmp_path: Path, spoil: Callable[[State], object]) -> None:
    """Resume a copy of ``run`` whose checkpoint has been changed."""
    mine = Path(shutil.copytree(run, tmp_path / "run"))
    state = copy.deepcopy(checkpoint.load_newest(mine / "checkpoints", CPU))
    spoil(state)
    checkpoint._write(mine / "checkpoints" / f"step_{state['step']:08d}.pt", state)
    train(RunDir(mine).open(), mine, resume=True)


class First:
    """In a path: the first key, whatever it is."""


def change(*path: Any) -> Callable[[State], None]:
    """Puts the last of ``path`` where the others lead: a value, or a function of the value that is there."""
    *keys, last, value = path

    def changed(state: State) -> None:
        part: Any = state
        for key in keys:
            part = part[next(iter(part)) if key is First else key]
        part[last] = value(part[last]) if callable(value) else value

    return changed


TENSORS: dict[str, Callable[[torch.Tensor], object]] = {
    "too small": lambda x: torch.zeros(1),
    "too large": lambda x: torch.zeros(2 * x.numel() + 2),
    "another shape": lambda x: x.reshape(1, *x.shape),
    "expanded": lambda x: torch.zeros(1).expand(x.shape) if x.dim() else x.expand(5),
    "huge": lambda x: torch.zeros(1).expand(2**33),
    "complex": lambda x: x.to(torch.complex64),
    "whole numbers": lambda x: x.to(torch.int64),
    "text": lambda x: "x",
    "nothing": lambda x: None,
}


@pytest.mark.parametrize("kind", [*TENSORS, "missing", "one more"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_state_that_its_optimizer_would_not_make_is_refused(
    name: str, kind: str, runs: Callable[..., Path], tmp_path: Path
) -> None:
    # Red when: load_optimizer leaves out _check_states (too small: the process may die), check_like
    # its test of shape, dtype, layout or _is_dense, or check_keys lets a missing or unknown key
    # pass.
    keys = {"sgd": 1, "lars": 1, "adamw": 3, "lamb": 3}[name]

    for number in range(keys):

        def spoil(state: State, number: int = number) -> None:
            states = state["optimizer"]["state"]
            first = max(states.values(), key=lambda one: next(iter(one.values())).dim())
            assert len(first) == keys
            key = list(first)[number]
            if kind == "missing" and keys == 1:
                for one in states.values():  # one alone could be of a layer without a gradient
                    one.clear()
            elif kind == "missing":
                del first[key]
            elif kind == "one more":
                first[f"{key}_"] = first[key]
            else:
                first[key] = TENSORS[kind](first[key])

        with pytest.raises(
            ConadvError, match=r"fit the run's config: its optimizer('s state \d| has no state)"
        ):
            resumed(runs(name), tmp_path / str(number), spoil)


STEP = ("state", 0, "step")
GROUP = ("param_groups", 0)
LAMB_STATES: list[tuple[Any, ...]] = [
    *((*STEP, torch.tensor(value)) for value in (float("nan"), 0.0, -1.0, 1.5, 3.0)),
    ("state", {}),
    ("state", 10_000, {}),
    ("state", "x"),
    ("state", 0, "x"),
    ("param_groups", []),
    (*GROUP, "params", 0, 1),
    (*GROUP, "lr", "x"),
    (*GROUP, "lr", torch.ones(10)),
    (*GROUP, "eps", torch.tensor(1e-6)),
    (*GROUP, "foreach", "x"),
    (*GROUP, "maximize", True),
    ("more", 1),
]


@pytest.mark.parametrize("path", LAMB_STATES)
def test_an_optimizer_with_other_numbers_and_groups_is_refused(
    path: tuple[Any, ...], runs: Callable[..., Path], tmp_path: Path
) -> None:
    # Red when: the range of step, the keys of states or groups, `some`, or the values of a group
    # are not looked at.
    with pytest.raises(ConadvError, match=r"does not fit the run's config: its optimizer"):
        resumed(runs("lamb"), tmp_path, change("optimizer", *path))


def test_how_a_step_is_carried_out_is_the_device_s(
    runs: Callable[..., Path], tmp_path: Path
) -> None:
    # Red when: `fused`, which a checkpoint of another device has otherwise, is compared, or taken
    # from the checkpoint.
    mine = Path(shutil.copytree(runs("sgd"), tmp_path / "run"))
    state = checkpoint.load_newest(mine / "checkpoints", CPU)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    checkpoint._write(mine / "checkpoints" / f"step_{state['step']:08d}.pt", state)
    assert all(group["fused"] for group in load_run(mine, CPU).step.optimizer.param_groups)


WAITING = ("engine", "pending", First)
IMAGES, LABELS = (*WAITING, "images", 1), (*WAITING, "labels", 1)
CONV = "conv1.weight"
ENGINE: dict[str, tuple[Any, ...]] = {
    "images (1,)": (*IMAGES, torch.zeros(1)),
    "images (4,)": (*IMAGES, torch.zeros(4)),
    "images smaller": (*IMAGES, lambda x: x[..., :4]),
    "images float64": (*IMAGES, lambda x: x.double()),
    "images expanded": (*IMAGES, lambda x: x[:1, :, :1, :1].expand(x.shape)),
    "images text": (*IMAGES, "x"),
    "labels large": (*LABELS, torch.full((2,), 10**6)),
    "labels negative": (*LABELS, torch.full((2,), -1)),
    "labels float": (*LABELS, torch.zeros(2)),
    "labels short": (*LABELS, torch.zeros(1, dtype=torch.int64)),
    "dtype": (*WAITING, "dtype", "int8"),
    "dtype of torch": (*WAITING, "dtype", "nn"),
    "version": (*WAITING, "weight_version", 10**30),
    "more": (
        "engine",
        "pending",
        lambda pending: {k: {**v, "more": 1} for k, v in pending.items()},
    ),
    "one micro-batch": (*WAITING, "images", lambda images: images[:1]),
    "far ahead": ("engine", "pending", lambda pending: {"9": next(iter(pending.values()))}),
    "odd step": ("engine", "pending", lambda pending: {"x": next(iter(pending.values()))}),
    "in_a_row low": ("engine", "guard", "in_a_row", -(10**30)),
    "in_a_row nan": ("engine", "guard", "in_a_row", float("nan")),
    "in_a_row true": ("engine", "guard", "in_a_row", True),
    "scale": ("engine", "guard", "scale", {"scale": 1.0, "good_steps": 0}),
    "lookahead": ("engine", "lookahead", "x"),
    "lookahead more": ("engine", "lookahead", {CONV: torch.zeros(1)}),
    "engine more": ("engine", lambda engine: {**engine, "more": 1}),
    "complex weights": ("model", CONV, lambda x: x.to(torch.complex64)),
    "expanded weights": ("model", CONV, lambda x: torch.zeros(1).expand(x.shape)),
    "whole weights": ("model", CONV, lambda x: x.long()),
    "text weights": ("model", CONV, "x"),
}


@pytest.mark.parametrize("name", ENGINE)
def test_an_engine_s_state_that_is_not_of_this_run_is_refused(
    name: str, runs: Callable[..., Path], tmp_path: Path
) -> None:
    # Red when: Expected.check, check_count or check_keys is left out at that place, or load_weights
    # compares nothing.
    with pytest.raises(ConadvError, match=r"does not fit the run's config"):
        resumed(runs("sgd"), tmp_path, change(*ENGINE[name]))


EXTRAS: dict[str, tuple[Any, ...]] = {
    "lookahead x": ("engine", "lookahead", "x"),
    "lookahead gone": ("engine", "lookahead", {}),
    "lookahead small": ("engine", "lookahead", CONV, torch.zeros(1)),
    "lookahead complex": ("engine", "lookahead", CONV, lambda x: x.to(torch.complex64)),
    "average small": ("ema", f"module.{CONV}", torch.zeros(1)),
    "average complex": ("ema", f"module.{CONV}", lambda x: x.to(torch.complex64)),
    "average of -10": ("ema", "n_averaged", torch.tensor(-10)),
    "average x": ("ema", "x"),
    "probe x": ("probe", "x"),
    "probe step": ("probe", "waiting", "x", {}),
    "probe weights": ("probe", "waiting", {3: {1: {"stale": {}}}}),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_a_look_ahead_an_average_and_a_probe_are_those_of_this_run(
    name: str, runs: Callable[..., Path], tmp_path: Path
) -> None:
    # Red when: LookAhead, EMA or Probe load what they are given without a comparison (-10: a
    # division by zero).
    probe = {"probe__every_epochs": 0.1, "probe__staleness": (1,), "probe__images": 4}
    run = runs("sgd", lookahead=True, optim__momentum=0.0, ema__decay=0.9, **probe)
    with pytest.raises(ConadvError, match=r"does not fit the run's config"):
        resumed(run, tmp_path, change(*EXTRAS[name]))


@pytest.mark.parametrize(
    "state",
    [
        {"scale": 3.0, "good_steps": 0},
        {"scale": 0.0, "good_steps": 0},
        {"scale": float("inf"), "good_steps": 0},
        {"scale": "x", "good_steps": 0},
        {"scale": 2.0, "good_steps": -1},
        {"scale": 2.0, "good_steps": 2000},
        {"scale": 2.0},
    ],
)
def test_a_loss_scale_is_a_power_of_two(state: State) -> None:
    # Red when: load_state_dict takes what it gets.
    scale = LossScale()
    with pytest.raises(ConadvError, match=r"its (loss scale|good_steps)"):
        scale.load_state_dict(state)
    assert scale == LossScale()


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_the_fused_kernels_never_see_another_shape(kind: type[LARS] | type[LAMB]) -> None:
    # Red when: flat_alike compares no shapes; the kernel then writes outside of the one element.
    w = torch.nn.Parameter(torch.ones(4096))
    assert not flat_alike(w, torch.zeros(1))
    optimizer = kind([w], 0.1)
    w.grad = torch.ones_like(w)
    optimizer.step()
    for key, value in optimizer.state[w].items():
        if value.dim():
            optimizer.state[w][key] = torch.zeros(1)
    with pytest.raises(RuntimeError):
        optimizer.step()


def test_dense_means_one_place_for_each_element() -> None:
    # Red when: _is_dense asks for contiguous memory only, or lets overlapping elements pass.
    like = torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    check_like(like, like, "x")
    check_like(torch.zeros(0, 3), torch.zeros(0, 3), "x")
    with pytest.raises(ConadvError, match="not a dense tensor"):
        check_like(torch.zeros(3).to_sparse(), torch.zeros(3), "x")
    with pytest.raises(ConadvError, match="x is an expanded view"):
        check_like(torch.zeros(9).as_strided((3, 3), (1, 1)), torch.zeros(3, 3), "x")
