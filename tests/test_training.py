"""Run directories: what is in them, bitwise resume, and errors that lose nothing."""

from __future__ import annotations

import json
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
from conadv.training.checkpoint import load, load_newest, save, steps
from conadv.training.data import load_model, load_source
from conadv.training.evaluate import Result
from conadv.training.export import export, load_plain_model
from conadv.training.loop import train
from conadv.training.observer import Silent
from conadv.training.record import read_lines
from conadv.training.results import measure
from conadv.training.resume import load_run
from conadv.training.run_dir import RunDir
from conadv.training.summary import summarize

FIELDS = set(
    "method staleness lookahead optimizer lr global_batch_size micro_batch_size batchnorm_batch_size seed steps epochs "
    "train_loss train_accuracy test_accuracy robust_accuracy seconds clean_images_per_second "
    "gradient_images_per_second gradient_images_per_clean_image attack_seconds_share version".split()
)
HEADER = set(
    "type time version versions machine git ranks execution recipe seed config steps parameter_groups".split()
)
STEP = set(
    "type step epoch lr loss losses grad_norm weight_version staleness phases seconds spans late skipped time".split()
)
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
    return load_newest(out / "checkpoints", torch.device("cpu"))["model"]


@pytest.mark.parametrize("name", METHODS)
def test_run_directory_and_bitwise_resume(name: str, tmp_path: Path) -> None:
    # Red when: pending is not saved, the order starts at step 0 again, or truncate keeps steps after the checkpoint.
    settings = config(**METHODS[name])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    summary = train(settings, whole)
    assert summary.keys() >= FIELDS
    assert summary == json.loads((whole / "summary.json").read_text())
    assert (summary["steps"], summary["epochs"], summary["batchnorm_batch_size"]) == (6, 2, 64)
    assert 0 <= summary["robust_accuracy"] <= summary["test_accuracy"] <= 1
    lines = read_lines(whole / "record.jsonl")
    assert [line["type"] for line in lines] == [
        "header",
        *["step"] * 3,
        "eval",
        *["step"] * 3,
        *["eval"] * 3,
    ]
    assert [line["split"] for line in lines[-3:]] == ["train", "test", "robust"]
    assert lines[-2]["accuracy"] == summary["test_accuracy"]
    assert lines[0].keys() == HEADER
    made = [line for line in lines if line["type"] == "step"]
    assert all(line.keys() == STEP and line["phases"].keys() == PHASES for line in made)
    assert [(line["step"], line["epoch"]) for line in made] == [(t, t // 3) for t in range(6)]
    extra = {"vanilla": set(), "sam-aug": {"aug"}, "three-routes": {"adv", "aug"}}.get(
        name, {"adv"}
    )
    assert made[4]["losses"].keys() == {"clean"} | extra
    assert (lines[4]["step"], lines[4]["epoch"], lines[4]["images"]) == (3, 1, 899)
    assert load_yaml(whole / "config.yaml") == resolve(settings)

    train(settings, cut)
    for late in (
        5,
        6,
    ):  # as if the run had been killed after writing two more steps than its last checkpoint
        (cut / "checkpoints" / f"step_{late:08d}.pt").unlink()
    assert steps(cut / "checkpoints") == [1, 2, 3, 4]
    train(settings, cut, resume=True)
    after = read_lines(cut / "record.jsonl")
    assert without_times(after) == without_times(lines)
    assert [line["step"] for line in after if line["type"] == "resume"] == [4]
    a, b = weights(whole), weights(cut)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_saved_config_repeats_the_run(tmp_path: Path) -> None:
    # Red when: a setting of the recipe is not written into config.yaml.
    train(config(method="conadv"), tmp_path / "a")
    train(load_yaml(tmp_path / "a" / "config.yaml"), tmp_path / "b")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_seeds_differ_and_one_seed_is_one_result(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config(seed=seed), tmp_path / name)
    a, b, c = (weights(tmp_path / name)["conv1.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_seed_reaches_initialisation_order_and_draws() -> None:
    # Red when: any of the three ignores the seed.
    a, b = (build(resolve(config(method="noise", seed=seed)), CPU) for seed in (0, 1))
    assert not torch.equal(a.model.conv1.weight, b.model.conv1.weight)
    assert not torch.equal(a.data.order.indices(0), b.data.order.indices(0))
    batch = next(a.data.train_batches(0, 1))
    x, y = (run.step.method.extra_view(run.step, batch).images[0] for run in (a, b))
    assert not torch.equal(x, y)


def test_every_setting_reaches_what_it_is_for() -> None:
    # Red when: build() or from_config leaves a setting out.
    attack = {"attack__eps": 0.3, "attack__norm": "l2", "attack__targeted": True}
    pgd = {**attack, "attack__num_steps": 2, "attack__step_size": 0.1, "attack__random_start": 0.5}
    schedule = {"schedule__decay": "cosine", "schedule__power": 3.0, "schedule__end_lr": 0.5}
    views = {
        "data__aug_view": "basic",
        "adv_weight": 2.0,
        "aug_weight": 3.0,
        "label_smoothing": 0.1,
    }
    layout = {
        "precision": "bf16",
        "channels_last": True,
        "pending_dtype": "uint8",
        "optim__weight_decay": 0.01,
    }
    method = {"method": "conadv", "staleness": 3, "lookahead": True}
    run = build(resolve(config(**pgd, **schedule, **views, **layout, **method)), CPU)
    space = PixelSpace((0.3053,), (0.3763,))
    assert run.step.method == Concurrent(
        PGD(0.3, 2, 0.1, "l2", True, 0.5, space), 3, lookahead=True
    )
    assert run.step._lr_at == WarmupDecay(2.0, 6, 3, "cosine", 3.0, 0.5)
    assert {group["weight_decay"] for group in run.step.optimizer.param_groups} == {0.0, 0.01}
    engine = run.step
    assert (engine.space, engine.pending.dtype) == (space, torch.uint8)
    assert engine.view_weights == {"aug": 3.0, "adv": 2.0}
    assert (engine.network.low, engine.inputs.layout) == (torch.bfloat16, torch.channels_last)
    assert run.model.blocks[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    logits, y = torch.eye(10), torch.arange(10)
    assert engine.loss(logits, y) == torch.nn.functional.cross_entropy(
        logits, y, label_smoothing=0.1
    )
    assert build(resolve(config(method="disadv", **attack)), CPU).step.method == Sequential(
        FGSM(0.3, "l2", True, space)
    )
    assert build(resolve(config(method="noise", attack__eps=0.3)), CPU).step.method == Noise(
        RandomSigns(0.3, space)
    )


def test_measure_uses_the_evaluation_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: robust_eps is taken from attack.eps, or robust_steps, robust_images or train_images have no effect.
    calls = []

    def evaluate(model: Any, batches: Any, space: Any, *, attack: Any = None, **_: Any) -> None:
        calls.append(
            (
                sum(len(y) for _, y in batches),
                attack and (attack.eps, attack.num_steps, attack.space),
            )
        )

    monkeypatch.setattr("conadv.training.results.evaluate", evaluate)
    settings = config(method="disadv", eval__robust_eps=0.05, eval__train_images=100)
    measure(build(resolve(settings), CPU))
    assert calls == [(100, None), (899, None), (64, (0.05, 2, PixelSpace((0.3053,), (0.3763,))))]


def test_summary_by_hand() -> None:
    # Red when: results change places, the first step counts in the median, or routes count as parameters.
    results = {
        "train": Result(0.1, 0.9, 10),
        "test": Result(0.2, 0.8, 10),
        "robust": Result(0.3, 0.4, 10),
    }
    results["validation"] = Result(0.5, 0.6, 10)
    lines = [
        {
            "type": "step",
            "step": step,
            "losses": {"clean": 1, "adv": 1},
            "phases": {"gradient": seconds, "attack": 0.5},
            "late": late,
        }
        for step, (seconds, late) in enumerate(
            ((9.5, False), (0.5, True), (1.5, False), (2.5, True))
        )
    ]
    made = summarize(build(resolve(config(method="disadv")), CPU), results, lines)
    names = (
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "robust_accuracy",
        "robust_eps",
    )
    assert [made[name] for name in names] == [0.1, 0.9, 0.2, 0.8, 0.4, 0.1]
    assert (made["validation_loss"], made["validation_accuracy"]) == (0.5, 0.6)
    assert (made["seconds"], made["step_seconds_median"], made["attack_seconds_share"]) == (
        16.0,
        2.0,
        0.125,
    )
    assert (made["batchnorm_batch_size"], made["accumulation"]) == (64, 4)
    assert (made["executor"], made["attack_ranks"], made["late_batches"]) == ("inline", 0, 2)
    assert made["parameters"] == sum(
        p.numel() for p in load_model(config().model, 1, 10).parameters()
    )


def test_validation_is_measured_on_the_images_held_out(tmp_path: Path) -> None:
    # Red when: another split is evaluated under its name, or the batches still come from all training images.
    summary = train(
        config(
            data__validation_images=98,
            global_batch_size=800,
            micro_batch_size=800,
            schedule__warmup_epochs=0,
        ),
        tmp_path,
    )
    held = next(
        line for line in read_lines(tmp_path / "record.jsonl") if line.get("split") == "validation"
    )
    assert (held["images"], held["accuracy"]) == (98, summary["validation_accuracy"])
    assert summary["steps"] == 2


def test_images_drawn_by_the_seed_are_the_same_when_a_run_is_read_again(tmp_path: Path) -> None:
    # Red when: trainer.build gives the data no seed, or another one than the run's.
    own = config(
        data__train_images=600,
        data__validation_images=80,
        data__subset_seed=None,
        global_batch_size=64,
        seed=3,
    )
    summary = train(own, tmp_path)
    run = load_run(tmp_path, torch.device("cpu"))
    assert measure(run)["train"].loss == summary["train_loss"]
    given = load_source(replace(own, data__subset_seed=3))
    for name in ("train", "validation"):
        found, want = getattr(run.data.source, name), getattr(given, name)
        assert torch.equal(found.readable(torch.arange(80))[0], want.readable(torch.arange(80))[0])


def test_export_loads_into_the_plain_model_and_gives_its_accuracy(tmp_path: Path) -> None:
    # Red when: export writes the adv route, or leaves the routes in.
    train(config(method="disadv"), tmp_path)
    path = export(tmp_path)
    plain = load_model(config().model, 1, 10)
    plain.load_state_dict(load_file(path), strict=True)
    run = load_run(tmp_path, torch.device("cpu"))
    x, _ = next(iter(run.data.eval_batches("test", None, 100)))
    run.model.eval()
    want = run.model(run.space.normalize(x))
    assert torch.equal(plain.eval()(run.space.normalize(x)), want)
    assert torch.equal(load_plain_model(tmp_path)(run.space.normalize(x)), want)


def test_evaluation_repeats_the_summary(tmp_path: Path) -> None:
    summary = train(config(method="conadv"), tmp_path)
    results = measure(load_run(tmp_path, torch.device("cpu")))
    assert results["test"].accuracy == summary["test_accuracy"]
    assert results["robust"].accuracy == summary["robust_accuracy"]
    assert results["train"].loss == summary["train_loss"]


def test_costs_are_counted_in_images(tmp_path: Path) -> None:
    # Red when: the attack's gradients, or SAM's second ones, are left out of the count.
    free = {"mix": "replace", "attack__share": 0.5}
    cases = {name: {"method": name} for name in ("vanilla", "sam", "noise", "disadv", "recycle")}
    cases["noise-replace"] = {"method": "noise", **free}
    cases["disadv-replace"] = {"method": "disadv", **free}
    cases["recycle-replace"] = {"method": "recycle", **free}
    ratios = {}
    for method, changes in cases.items():
        s = train(config(**changes), tmp_path / method)
        ratios[method] = s["gradient_images_per_clean_image"]
        assert s["gradient_images_per_second"] == pytest.approx(
            s["clean_images_per_second"] * ratios[method]
        )
        assert s["clean_images_per_second"] == pytest.approx(6 * 256 / s["seconds"])
    want = {"vanilla": 1, "sam": 2, "noise": 2, "disadv": 3, "recycle": 2 - 1 / 6}
    want |= {"noise-replace": 1, "disadv-replace": 1.5, "recycle-replace": 1 - 0.5 / 6}
    assert ratios == pytest.approx(want)


def test_checkpoints_keep_the_last_and_survive_a_failed_write(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, {"engine": {"version": step}, "best": None}, keep=2)
    assert steps(tmp_path) == [2, 3]
    (tmp_path / "step_00000004.tmp").mkdir()  # nothing can be written under that name
    with pytest.raises(ConadvError, match="Older checkpoints are intact"):
        save(tmp_path, 4, {"x": torch.ones(2)}, keep=2)
    assert steps(tmp_path) == [2, 3]
    assert load_newest(tmp_path, CPU)["step"] == 3


def test_a_full_disk_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: the temporary file stays.
    def write(_: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("torch.save", write)
    with pytest.raises(ConadvError, match="No space left"):
        save(tmp_path, 1, {}, keep=2)
    assert list(tmp_path.iterdir()) == []


class _Evil:
    def __reduce__(self) -> Any:
        return (print, ("run by a checkpoint",))


def test_checkpoints_run_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: torch.load is called with weights_only=False.
    save(tmp_path, 1, {"x": _Evil()}, keep=1)
    with pytest.raises(ConadvError, match="Cannot read"):
        load(tmp_path / "step_00000001.pt", torch.device("cpu"))
    assert "run by" not in capsys.readouterr().out


def test_non_finite_stops_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    # Red when: the loop saves before it checks.
    with pytest.raises(NonFiniteError, match="Step"):
        train(config(optim__name="sgd", optim__lr=1e18, schedule__warmup_epochs=0), tmp_path)
    kept = load_newest(tmp_path / "checkpoints", torch.device("cpu"))
    assert all(
        value.isfinite().all() for value in kept["model"].values() if value.is_floating_point()
    )
    last = read_lines(tmp_path / "record.jsonl")[-1]
    assert last["type"] == "error"
    assert last["step"] >= kept["step"]
    assert not (tmp_path / "summary.json").exists()


def test_a_folder_with_a_run_is_safe(tmp_path: Path) -> None:
    # Red when: start deletes before check.
    out = tmp_path / "run"
    train(config(), out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    cases: list[tuple[dict[str, Any], Config, str]] = [
        ({}, config(), "already holds a run"),
        ({"resume": True, "overwrite": True}, config(), "give one of them"),
        ({"resume": True}, config(seed=9), r"seed: 0 -> 9"),
        (
            {"overwrite": True},
            config(global_batch_size=5000, micro_batch_size=None),
            "larger than the training set",
        ),
    ]
    for options, settings, message in cases:
        with pytest.raises(ConadvError, match=message):
            train(settings, out, **options)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
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
    train(config(), out, overwrite=True)


def test_record_tail_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    train(config(), tmp_path)
    path = RunDir(tmp_path).record
    path.write_text(path.read_text() + '{"type": "step", "st')
    assert read_lines(path)[-1]["split"] == "robust"
    path.write_text('{"broken\n' + path.read_text())
    with pytest.raises(ConadvError, match="line 1"):
        read_lines(path)


def test_resuming_a_finished_run_repeats_its_end_and_nothing_else(tmp_path: Path) -> None:
    # Red when: truncate keeps the final evaluations.
    summary = train(config(), tmp_path)
    before = without_times(read_lines(tmp_path / "record.jsonl"))
    assert train(config(), tmp_path, resume=True)["test_loss"] == summary["test_loss"]
    assert without_times(read_lines(tmp_path / "record.jsonl")) == before


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConadvError, match="is a file"):
        train(config(), tmp_path / "file" / "run")
    with pytest.raises(ConadvError, match=r"cannot be written to|Cannot write"):
        train(config(), Path("/proc/run"))


def test_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    class Stop(Silent):
        def step(self, record: Any) -> None:
            if record.step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"after 4 steps; --resume goes on from step 3"):
        train(config(), tmp_path, observer=Stop())
    assert train(config(), tmp_path, resume=True)["steps"] == 6


def test_observers_hear_of_every_step(tmp_path: Path) -> None:
    class Count(Silent):
        steps = 0

        def __init__(self) -> None:
            self.evaluations: list[tuple[int, str]] = []

        def step(self, record: Any) -> None:
            self.steps += 1

        def evaluation(self, step: int, split: str, loss: float, accuracy: float) -> None:
            self.evaluations.append((step, split))

    seen = Count()
    train(config(), tmp_path, observer=seen)
    assert seen.steps == 6
    lines = [line for line in read_lines(tmp_path / "record.jsonl") if line["type"] == "eval"]
    assert seen.evaluations == [(line["step"], line["split"]) for line in lines]
    assert {split for _, split in seen.evaluations} == {"train", "test", "robust"}


def test_learning_rate_reaches_the_optimizer_as_the_schedule_says(tmp_path: Path) -> None:
    # Red when: warm-up counts epochs as steps, or the record has another step's lr.
    run = build(resolve(config()), torch.device("cpu"))
    train(config(), tmp_path)
    lrs = [line["lr"] for line in read_lines(tmp_path / "record.jsonl") if line["type"] == "step"]
    assert lrs == [run.step._lr_at(t) for t in range(6)]
    assert lrs[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert lrs[3:] == pytest.approx([2.0 * (1 - s / 3) ** 2 for s in range(3)])
