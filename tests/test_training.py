"""Run directories: what is in them, bitwise resume, and errors that lose nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conadv import (
    FGSM,
    PGD,
    ConadvError,
    Concurrent,
    Noise,
    NonFiniteError,
    PixelSpace,
    RandomSigns,
    Sequential,
    WarmupDecay,
)
from conadv.config import recipes
from conadv.config.files import load_yaml
from conadv.config.resolve import resolve
from conadv.config.schema import Config, replace
from conadv.training.build import build
from conadv.training.checkpoint import load_newest
from conadv.training.data import load_model, load_source
from conadv.training.evaluate import Result
from conadv.training.export import export, load_plain_model
from conadv.training.loop import train
from conadv.training.observer import Observer
from conadv.training.record import read_lines
from conadv.training.results import measure
from conadv.training.resume import load_run
from conadv.training.run_dir import RunDir
from conadv.training.summary import summarize

from .helpers import same

FIELDS = """
method staleness lookahead optimizer lr global_batch_size micro_batch_size batchnorm_batch_size
seed steps epochs train_loss train_accuracy test_accuracy robust_accuracy seconds
clean_images_per_second gradient_images_per_second gradient_images_per_clean_image
attack_seconds_share version""".split()
HEADER = """
type time version versions machine git ranks execution recipe seed config steps
parameter_groups""".split()
STEP = """
type step epoch lr loss losses grad_norm weight_version staleness phases seconds spans late skipped
time""".split()
PHASES = {"data", "attack", "gradient", "update"}
CPU = torch.device("cpu")


def config(**changes: Any) -> Config:
    """Six steps on digits: two epochs of three steps, evaluated and saved every epoch."""
    base = replace(
        recipes.get("digits"),
        global_batch_size=256,
        micro_batch_size=64,
        epochs=2,
        model__width=4,
        optim__lr=2.0,
        schedule__warmup_epochs=1,
        eval__every_epochs=1,
        eval__robust_images=64,
        eval__robust_steps=2,
        checkpoint__every_epochs=1 / 3,
        checkpoint__keep=10,
    )
    return replace(base, **changes)


METHODS = {
    "vanilla": {},
    "sam-aug": {"method": "sam", "data__aug_view": "basic"},
    "multiview": {"method": "multiview", "data__augment": "basic"},
    "noise": {"method": "noise"},
    "disadv": {"method": "disadv"},
    "conadv-tau2": {"method": "conadv", "staleness": 2, "pending_dtype": "uint8"},
    "conadv-share": {
        "method": "conadv",
        "attack__share": 0.25,
        "attack__random_start": 0.5,
        "attack__targeted": True,
        "attack__statistics": "running",
        "adv_route": "statistics",
    },
    "conadv-lookahead": {
        "method": "conadv",
        "lookahead": True,
        "optim__name": "lamb",
        "optim__lr": 0.01,
    },
    "recycle": {"method": "recycle", "optim__name": "sgd", "optim__lr": 0.05},
    "recycle-replace": {
        "method": "recycle",
        "mix": "replace",
        "attack__share": 0.25,
        "pending_dtype": "uint8",
        "data__augment": "basic",
        "data__mixup": 0.2,
        "ema__decay": 0.9,
    },
    "conadv-replace": {
        "method": "conadv",
        "mix": "replace",
        "attack__share": 0.5,
        "adv_route": "clean",
    },
    "three-routes": {
        "method": "conadv",
        "data__aug_view": "basic",
        "optim__name": "adamw",
        "optim__lr": 0.01,
    },
}


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    drop = ("time", "phases", "seconds", "spans", "type")
    return [
        {k: v for k, v in line.items() if k not in drop}
        for line in lines
        if line["type"] in ("step", "eval")
    ]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_newest(out / "checkpoints", CPU)["model"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The finished run of a row of METHODS, trained once; tests that change a run copy it."""

    @cache
    def run(name: str) -> Path:
        out = tmp_path_factory.mktemp("trained") / name
        train(config(**METHODS[name]), out)
        return out

    return run


@pytest.mark.parametrize("name", METHODS)
def test_run_directory_and_bitwise_resume(name: str, trained: Any, tmp_path: Path) -> None:
    # Red when: pending is not saved, the order starts at step 0 again, or truncate keeps steps
    # after the checkpoint; a setting of the recipe is not written into config.yaml.
    settings, whole = config(**METHODS[name]), trained(name)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary.keys() >= set(FIELDS)
    assert (summary["steps"], summary["epochs"], summary["batchnorm_batch_size"]) == (6, 2, 64)
    assert 0 <= summary["robust_accuracy"] <= summary["test_accuracy"] <= 1
    lines = read_lines(whole / "record.jsonl")
    story = ["header", *["step"] * 3, "eval", *["step"] * 3, *["eval"] * 3]
    assert [line["type"] for line in lines] == story
    assert [line["split"] for line in lines[-3:]] == ["train", "test", "robust"]
    assert lines[-2]["accuracy"] == summary["test_accuracy"]
    assert lines[0].keys() == set(HEADER)
    made = [line for line in lines if line["type"] == "step"]
    assert all(line.keys() == set(STEP) and line["phases"].keys() == PHASES for line in made)
    assert [(line["step"], line["epoch"]) for line in made] == [(t, t // 3) for t in range(6)]
    views = {"vanilla": set(), "sam-aug": {"aug"}, "three-routes": {"adv", "aug"}}
    assert made[4]["losses"].keys() == {"clean"} | views.get(name, {"adv"})
    assert (lines[4]["step"], lines[4]["epoch"], lines[4]["images"]) == (3, 1, 899)
    assert load_yaml(whole / "config.yaml") == resolve(settings)

    cut = Path(shutil.copytree(whole, tmp_path / "cut"))
    for late in (5, 6):  # as if the run had been killed after two more steps than its checkpoint
        (cut / "checkpoints" / f"step_{late:08d}.pt").unlink()
    resumed = train(load_yaml(cut / "config.yaml"), cut, resume=True)
    after = read_lines(cut / "record.jsonl")
    assert without_times(after) == without_times(lines)
    assert [line["step"] for line in after if line["type"] == "resume"] == [4]
    assert same(weights(whole), weights(cut))
    assert resumed == json.loads((cut / "summary.json").read_text())


def test_the_seed_reaches_initialisation_order_and_draws(trained: Any, tmp_path: Path) -> None:
    # Red when: any of the three ignores the seed, or one seed gives two results.
    a, b = (build(resolve(config(method="noise", seed=seed)), CPU) for seed in (0, 1))
    assert not torch.equal(a.model.conv1.weight, b.model.conv1.weight)
    assert not torch.equal(a.data.order.indices(0), b.data.order.indices(0))
    batch = next(a.data.train_batches(0, 1))
    x, y = (run.step.method.extra_view(run.step, batch).images[0] for run in (a, b))
    assert not torch.equal(x, y)
    train(config(), tmp_path)
    assert same(weights(tmp_path), weights(trained("vanilla")))


def test_every_setting_reaches_what_it_is_for() -> None:
    # Red when: build() leaves a setting out.
    attack = {"attack__eps": 0.3, "attack__norm": "l2", "attack__targeted": True}
    pgd = {**attack, "attack__num_steps": 2, "attack__step_size": 0.1, "attack__random_start": 0.5}
    schedule = {"schedule__decay": "cosine", "schedule__power": 3.0, "schedule__end_lr": 0.5}
    views = {"data__aug_view": "basic", "adv_weight": 2.0, "aug_weight": 3.0}
    layout = {"precision": "bf16", "channels_last": True, "pending_dtype": "uint8"}
    rest = {"label_smoothing": 0.1, "optim__weight_decay": 0.01}
    method = {"method": "conadv", "staleness": 3, "lookahead": True}
    run = build(resolve(config(**pgd, **schedule, **views, **layout, **rest, **method)), CPU)
    engine, space = run.step, PixelSpace((0.3053,), (0.3763,))
    made = PGD(0.3, 2, 0.1, "l2", True, 0.5, space)
    assert engine.method == Concurrent(made, 3, lookahead=True)
    assert engine._lr_at == WarmupDecay(2.0, 6, 3, "cosine", 3.0, 0.5)
    assert {group["weight_decay"] for group in engine.optimizer.param_groups} == {0.0, 0.01}
    assert (engine.space, engine.pending.dtype) == (space, torch.uint8)
    assert engine.view_weights == {"aug": 3.0, "adv": 2.0}
    assert (engine.network.low, engine.inputs.layout) == (torch.bfloat16, torch.channels_last)
    assert run.model.blocks[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    logits, y = torch.eye(10), torch.arange(10)
    want = torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.1)
    assert engine.loss(logits, y) == want
    others = {"disadv": Sequential(FGSM(0.3, "l2", True, space))}
    others["noise"] = Noise(RandomSigns(0.3, space))
    for name, wanted in others.items():
        changes = attack if name == "disadv" else {"attack__eps": 0.3}
        assert build(resolve(config(method=name, **changes)), CPU).step.method == wanted


@pytest.mark.parametrize("mixed", [False, True])
def test_losses_of_the_program(mixed: bool) -> None:
    # Red when: aims are not smoothed, or a class weighs by its number of images.
    run = build(resolve(config(class_weights="balanced")), CPU)
    counts = torch.bincount(run.data.source.train.labels, minlength=10)
    g = torch.Generator().manual_seed(0)
    logits, y = torch.randn(6, 10, generator=g), torch.arange(6)
    weight = counts.sum() / (10 * counts)
    found = run.step.loss(logits, y)
    assert torch.allclose(found, torch.nn.CrossEntropyLoss(weight)(logits, y))
    soft = torch.rand(6, 10, generator=g).softmax(1)
    hard = torch.eye(10)[:6]
    aims = 0.9 * (soft if mixed else hard) + 0.01
    p = logits.sigmoid()
    want = {
        "bce": -(aims * p.log() + (1 - aims) * (1 - p).log()).mean(),
        "mse": (logits - aims).square().mean(),
    }
    for name, value in want.items():
        step = build(resolve(config(loss=name, label_smoothing=0.1)), CPU).step
        assert isfinite(step(next(run.data.train_batches(0, 1))).loss)
        loss = step.loss
        found = loss(logits, soft if mixed else y)
        assert found.item() == pytest.approx(value.item(), rel=1e-5)
        assert loss.total(logits, y) / loss(logits, y) == pytest.approx(60)
        for wrong in ({"class_weights": "balanced"}, {"attack__targeted": True}):
            with pytest.raises(ConadvError, match="needs loss cross-entropy"):
                resolve(config(method="conadv", loss=name, **wrong))


def test_measure_uses_the_evaluation_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: robust_eps is taken from attack.eps, or robust_steps, robust_images or train_images
    # have no effect.
    calls = []

    def evaluate(model: Any, batches: Any, space: Any, *, attack: Any = None, **_: Any) -> None:
        how = attack and (attack.eps, attack.num_steps, attack.space)
        calls.append((sum(len(y) for _, y in batches), how))

    monkeypatch.setattr("conadv.training.results.evaluate", evaluate)
    settings = config(method="disadv", eval__robust_eps=0.05, eval__train_images=100)
    measure(build(resolve(settings), CPU))
    assert calls == [(100, None), (899, None), (64, (0.05, 2, PixelSpace((0.3053,), (0.3763,))))]


def test_summary_by_hand() -> None:
    # Red when: results change places, the first step counts in the median, routes count as
    # parameters, or the attack's gradients are left out of the count.
    accuracies = {"train": 0.9, "validation": 0.6, "test": 0.8, "robust": 0.4}
    results = {name: Result(1 - value, value, 10) for name, value in accuracies.items()}
    steps = ((9.5, False), (0.5, True), (1.5, False), (2.5, True))
    lines = [
        {
            "type": "step",
            "step": step,
            "losses": {"clean": 1, "adv": 1},
            "phases": {"gradient": seconds, "attack": 0.5},
            "late": late,
        }
        for step, (seconds, late) in enumerate(steps)
    ]
    made = summarize(build(resolve(config(method="disadv")), CPU), results, lines)
    plain = load_model(config().model, 1, 10)
    want = {f"{name}_accuracy": value for name, value in accuracies.items()}
    want |= {f"{name}_loss": 1 - accuracies[name] for name in ("train", "validation", "test")}
    want |= {"robust_eps": 0.1, "seconds": 16.0, "step_seconds_median": 2.0}
    want |= {"attack_seconds_share": 0.125, "batchnorm_batch_size": 64, "accumulation": 4}
    want |= {"executor": "inline", "attack_ranks": 0, "late_batches": 2}
    want |= {"clean_images_per_second": 4 * 256 / 16, "gradient_images_per_clean_image": 3}
    want |= {"gradient_images_per_second": 3 * 4 * 256 / 16}
    want["parameters"] = sum(p.numel() for p in plain.parameters())
    assert {name: made[name] for name in want} == want
    assert "robust_loss" not in made


def test_costs_are_counted_in_images(trained: Any) -> None:
    # Red when: the attack's gradients, or SAM's second ones, are left out of the count.
    want = {"vanilla": 1, "sam-aug": 4, "noise": 2, "disadv": 3, "recycle": 2 - 1 / 6}
    want |= {"conadv-replace": 1.5, "recycle-replace": 1 - 0.25 / 6}
    for name, ratio in want.items():
        summary = json.loads((trained(name) / "summary.json").read_text())
        assert summary["gradient_images_per_clean_image"] == pytest.approx(ratio), name


def test_images_held_out_and_drawn_by_the_seed_are_the_same_when_read_again(tmp_path: Path) -> None:
    # Red when: build gives the data no seed, or another one than the run's; another split is
    # evaluated as validation, or the batches still come from all training images.
    own = config(
        data__train_images=600,
        data__validation_images=80,
        data__subset_seed=None,
        global_batch_size=200,
        micro_batch_size=200,
        seed=3,
    )
    summary = train(own, tmp_path)
    assert summary["steps"] == 2 * 2  # of the 520 images that are left
    lines = read_lines(tmp_path / "record.jsonl")
    held = next(line for line in lines if line.get("split") == "validation")
    assert (held["images"], held["accuracy"]) == (80, summary["validation_accuracy"])
    run = load_run(tmp_path, CPU)
    assert measure(run)["train"].loss == summary["train_loss"]
    given = load_source(replace(own, data__subset_seed=3))
    for name in ("train", "validation"):
        found, want = getattr(run.data.source, name), getattr(given, name)
        assert torch.equal(found.readable(torch.arange(80))[0], want.readable(torch.arange(80))[0])


def test_export_and_evaluation_repeat_the_summary(trained: Any, tmp_path: Path) -> None:
    # Red when: export writes the adv route, or leaves the routes in.
    out = Path(shutil.copytree(trained("conadv-tau2"), tmp_path / "run"))
    plain, run = load_model(config().model, 1, 10), load_run(out, CPU)
    plain.load_state_dict(load_file(export(out)), strict=True)
    x = run.space.normalize(next(iter(run.data.eval_batches("test", None, 100)))[0])
    want = run.model.eval()(x)
    assert torch.equal(plain.eval()(x), want)
    assert torch.equal(load_plain_model(out)(x), want)
    results, summary = measure(run), json.loads((out / "summary.json").read_text())
    assert results["test"].accuracy == summary["test_accuracy"]
    assert results["robust"].accuracy == summary["robust_accuracy"]
    assert results["train"].loss == summary["train_loss"]


def test_non_finite_stops_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    # Red when: the loop saves before it checks.
    with pytest.raises(NonFiniteError, match="Step"):
        train(config(optim__name="sgd", optim__lr=1e18, schedule__warmup_epochs=0), tmp_path)
    kept = load_newest(tmp_path / "checkpoints", CPU)
    floats = [value for value in kept["model"].values() if value.is_floating_point()]
    assert all(value.isfinite().all() for value in floats)
    last = read_lines(tmp_path / "record.jsonl")[-1]
    assert last["type"] == "error"
    assert last["step"] >= kept["step"]
    assert not (tmp_path / "summary.json").exists()


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_a_run_is_safe(trained: Any, tmp_path: Path) -> None:
    # Red when: start deletes before check.
    out = Path(shutil.copytree(trained("vanilla"), tmp_path / "run"))
    before, large = files(out), config(global_batch_size=5000, micro_batch_size=None)
    cases: list[tuple[dict[str, Any], Config, str]] = [
        ({}, config(), "already holds a run"),
        ({"resume": True, "overwrite": True}, config(), "give one of them"),
        ({"resume": True}, config(seed=9), r"seed: 0 -> 9"),
        ({"overwrite": True}, large, "larger than the training set"),
    ]
    for options, settings, message in cases:
        with pytest.raises(ConadvError, match=message):
            train(settings, out, **options)
    assert files(out) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ConadvError, match="not empty"):
            train(config(), other, **options)
    with pytest.raises(ConadvError, match="not a run directory"):
        train(config(), other, resume=True)
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]
    (out / "notes.txt").write_text("precious")
    RunDir(out).start(resolve(config()))  # what --overwrite does once everything is checked
    assert sorted(p.name for p in out.iterdir()) == [".launcher", "config.yaml", "notes.txt"]
    with pytest.raises(ConadvError, match="is a file"):
        train(config(), out / "notes.txt" / "run")
    with pytest.raises(ConadvError, match=r"cannot be written to|Cannot write"):
        train(config(), Path("/proc/run"))


def test_record_tail_of_a_killed_run_is_dropped(trained: Any, tmp_path: Path) -> None:
    path, whole = tmp_path / "record.jsonl", (trained("vanilla") / "record.jsonl").read_text()
    path.write_text(whole + '{"type": "step", "st')
    assert read_lines(path)[-1]["split"] == "robust"
    path.write_text('{"broken\n' + whole)
    with pytest.raises(ConadvError, match="line 1"):
        read_lines(path)


def test_an_interrupted_and_a_finished_run_go_on(trained: Any, tmp_path: Path) -> None:
    # Red when: truncate keeps the final evaluations; an interrupt does not say how to go on.
    class Stop(Observer):
        def step(self, record: Any) -> None:
            if record.step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"after 4 steps; --resume goes on from step 3"):
        train(config(), tmp_path, observer=Stop())
    want = without_times(read_lines(trained("vanilla") / "record.jsonl"))
    for _ in range(2):  # to the end, and then the end once more
        train(config(), tmp_path, resume=True)
        assert without_times(read_lines(tmp_path / "record.jsonl")) == want


def test_observers_and_the_record_say_the_same(tmp_path: Path) -> None:
    # Red when: warm-up counts epochs as steps, or the record has another step's lr.
    class Count(Observer):
        def __init__(self) -> None:
            self.rates: list[float] = []
            self.evaluations: list[tuple[int, str]] = []

        def step(self, record: Any) -> None:
            self.rates.append(record.lr)

        def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None:
            self.evaluations.append((step, split))

    seen = Count()
    train(config(), tmp_path, observer=seen)
    lines = read_lines(tmp_path / "record.jsonl")
    evaluations = [(line["step"], line["split"]) for line in lines if line["type"] == "eval"]
    assert (
        seen.evaluations == evaluations == [(3, "test"), (6, "train"), (6, "test"), (6, "robust")]
    )
    assert seen.rates == [line["lr"] for line in lines if line["type"] == "step"]
    assert seen.rates[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert seen.rates[3:] == pytest.approx([2.0 * (1 - s / 3) ** 2 for s in range(3)])
