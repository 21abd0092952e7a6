"""Micro-batches found by trial, and what a dry run says: the numbers against runs, formulas and files."""

from __future__ import annotations

import dataclasses
import json
import mmap
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conadv import ConadvError
from conadv.cli.program import main
from conadv.config import recipes
from conadv.config.schema import Config, dump_yaml, load_yaml, replace, resolve
from conadv.distributed.comm import Comm
from conadv.plan import Layout, Planner
from conadv.plan.command import link_of
from conadv.plan.profile import load, save
from conadv.plan.search import divisors
from conadv.preflight import dryrun, estimate, memory, microbatch, picture
from conadv.preflight.microbatch import candidates, largest
from conadv.preflight.profiled import predicted_time
from conadv.preflight.show import show
from conadv.sweep.cells import expand
from conadv.sweep.spec import load_spec
from conadv.training.checkpoint import load_newest, steps
from conadv.training.data import load_data
from conadv.training.record import read_lines
from conadv.training.trainer import Parts, build, train

CPU = torch.device("cpu")


def config(**changes: Any) -> Config:
    """Four steps of ConAdv on digits, saved every second."""
    base = replace(
        recipes.get("digits"),
        method="conadv",
        global_batch_size=64,
        epochs=None,
        steps=4,
        model__width=4,
        schedule__warmup_epochs=0,
        data__train_images=128,
        eval__robust_images=0,
        eval__train_images=32,
        checkpoint__every_epochs=1,
    )
    return replace(base, **changes)


# ---- the search


def test_the_largest_that_fits_is_found_without_trying_much_more() -> None:
    # Red when: bisection returns high, the doubling stops at the first size, or a size beyond twice the last is tried.
    for number in (1, 7, 96, 898, 4096, 12288):
        sizes = divisors(number)
        for limit in [0, *sizes, number + 1]:
            tried: list[int] = []

            def fits(size: int, tried: list[int] = tried, limit: int = limit) -> bool:
                tried.append(size)
                return size <= limit

            best = max((size for size in sizes if size <= limit), default=None)
            assert largest(sizes, fits) == best
            allowed = {size for size in sizes if size <= 2 * (best or 0)} | {
                *sizes[: sizes.index(best) + 2 if best else 1]
            }
            assert set(tried) <= allowed
            assert len(tried) == len(set(tried))


def test_candidates_divide_the_share_of_a_learner() -> None:
    # Red when: the global batch is divided instead of the share; attack ranks are forgotten; shares of no image stay.
    settings = config(global_batch_size=96, micro_batch_size="auto")
    assert candidates(settings, 2) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    assert candidates(settings, 2, 4) == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert candidates(replace(settings, attack__share=0.1), 2)[0] == 6
    with pytest.raises(ConadvError, match="does not divide into 5"):
        candidates(settings, 5)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False),
        (None, True),
    ],
)
def test_a_trial_that_runs_out_of_memory_does_not_fit(
    error: Exception | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: the error is not caught, or the headroom is left out (below).
    used = SimpleNamespace(peak=700)
    trials = on_a_fake_gpu(used, error, monkeypatch)
    assert trials.fits_on_cuda(8, 1000) is expected
    used.peak = 951  # of 1000, where 5 % stay free
    assert trials.fits_on_cuda(8, 1000) is False
    broken = on_a_fake_gpu(used, RuntimeError("an illegal memory access"), monkeypatch)
    with pytest.raises(RuntimeError, match="illegal"):
        broken.fits_on_cuda(8, 1000)


def on_a_fake_gpu(
    used: Any, error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> microbatch._Trials:
    """Trials whose steps raise ``error``, on a device of 1000 bytes of which ``used.peak`` are taken."""

    def steps(size: int, ballast: int) -> None:
        if error is not None:
            raise error

    def peak_of(work: Callable[[], None], device: torch.device) -> int:
        work()
        return int(used.peak)

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000)
    )
    monkeypatch.setattr(memory, "release", lambda device: None)
    monkeypatch.setattr(memory, "peak_of", peak_of)
    monkeypatch.setattr(microbatch._Trials, "ballast", lambda self, size: 0)
    return microbatch._Trials(SimpleNamespace(device=torch.device("cuda"), steps=steps), 64, 1)  # type: ignore[arg-type]


def test_the_prediction_on_a_cpu_is_the_line_through_two_trials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Red when: the slope is taken from zero, what is resident before counts, or the share of the memory is left out.
    monkeypatch.setattr(memory, "resident", lambda: 1000)
    monkeypatch.setattr(memory, "peak_of", lambda work, device: work() or 0)
    monkeypatch.setattr(microbatch, "SMALL_TRIAL", 40)
    monkeypatch.setattr(microbatch._Trials, "_kept_per_image", lambda self: 5.0)
    monkeypatch.setattr(microbatch._Trials, "ballast", lambda self, size: 0)
    rehearsal = SimpleNamespace(device=CPU, steps=lambda size: 1500 + 10 * size)
    trials = microbatch._Trials(rehearsal, 64, 1)  # type: ignore[arg-type]
    sizes = [2, 4, 8, 16, 32, 64]
    for size in sizes:
        needed = 500 + 10 * size  # beside the 1000 that are there
        assert trials.predictor(sizes, round(needed / 0.8) + 1)(size)
        assert not trials.predictor(sizes, round(needed / 0.8) - 1)(size)


def test_images_that_wait_and_buckets_are_counted() -> None:
    # Red when: the dtype of what waits, the share that is attacked, or the buckets of several ranks are left out.
    def ballast(learners: int = 1, **changes: Any) -> int:
        settings = resolve(config(micro_batch_size="auto", **changes))
        rehearsal = microbatch.Rehearsal(settings, microbatch.Shape(1, 8, 10), CPU)
        return microbatch._Trials(rehearsal, 64, learners).ballast(16)

    assert ballast() == 48 * 64 * (4 + 4)
    assert ballast(staleness=3, pending_dtype="uint8") == 48 * 64 * (4 + 3)
    assert ballast(attack__share=0.5) == 24 * 64 * 8
    assert ballast(method="vanilla") == 0
    weights = sum(
        p.nbytes
        for p in microbatch.Rehearsal(resolve(config()), microbatch.Shape(1, 8, 10), CPU)
        .model()
        .parameters()
    )
    assert ballast(2, method="vanilla") >= weights // 2 > 0


def test_ranks_agree_on_the_smallest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: every rank keeps its own answer, or the largest is taken.
    monkeypatch.setattr(microbatch, "_largest_that_fits", lambda sizes, trials, free: 16)
    world: Any = SimpleNamespace(
        device=CPU,
        agreed=nullcontext,
        sum=lambda t: t,
        gather=lambda value: [value, 8, 32],
        share=lambda value: value,
    )
    teams: Any = SimpleNamespace(world=world, learners=(0, 1), attackers=())
    source: Any = SimpleNamespace(channels=1, image_size=8, class_names=tuple("0123456789"))
    said: list[str] = []
    settled = microbatch.settle(
        resolve(config(micro_batch_size="auto")), teams, source, said.append
    )
    assert settled.micro_batch_size == 8
    assert "8; 16 does not fit" in said[0]


def test_auto_is_written_down_and_a_resume_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: resume tries anew; trials draw from the run's random numbers; config.yaml says auto.
    plain, auto = tmp_path / "plain", tmp_path / "auto"
    train(config(micro_batch_size=16), plain)
    monkeypatch.setattr(microbatch, "largest", lambda sizes, fits: fits(sizes[0]) and 16)
    train(config(micro_batch_size="auto"), auto)
    assert load_yaml(auto / "config.yaml").micro_batch_size == 16
    (auto / "checkpoints" / f"step_{steps(auto / 'checkpoints')[-1]:08d}.pt").unlink()
    monkeypatch.setattr(microbatch, "largest", lambda sizes, fits: 32)
    train(config(micro_batch_size="auto"), auto, resume=True)
    ours, theirs = (load_newest(out / "checkpoints", CPU)["model"] for out in (auto, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ConadvError, match="seed"):
        train(config(micro_batch_size="auto", seed=5), auto, resume=True)


def test_auto_where_it_cannot_be_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(micro_batch_size="auto")
    assert load_yaml_text(tmp_path, dump_yaml(settings)).micro_batch_size == "auto"
    with pytest.raises(ConadvError, match="Give a number"):
        load_data(resolve(settings))
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "name: x\nrecipe: digits\nbase: {micro_batch_size: auto}\narms: {a: {}}\nconfirm: {seeds: [0]}\n"
    )
    with pytest.raises(ConadvError, match="could not be compared"):
        expand(load_spec(spec))
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(ConadvError, match="Not even a micro-batch of 2 fits"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def load_yaml_text(folder: Path, text: str) -> Config:
    (folder / "c.yaml").write_text(text)
    return load_yaml(folder / "c.yaml")


def test_peaks_are_what_was_taken() -> None:
    # Red when: the peak is that of before, or is read after the memory has gone.
    before = memory.resident()
    if before is None:
        pytest.skip("this system does not say what a process has taken")
    free = memory.available(CPU)
    assert free is not None
    assert free > 0
    more = 200 * 2**20

    def take() -> (
        None
    ):  # from the system itself: the allocator may give memory that the process has already
        with mmap.mmap(-1, more) as block:
            for page in range(0, more, mmap.PAGESIZE):
                block[page] = 1

    assert memory.peak_of(take, CPU) - before > 0.9 * more


# ---- the dry run


def look(settings: Config, out: Path, **options: Any) -> dryrun.Preview:
    return dryrun.preview(settings, out, comm=Comm(device=CPU), **options)


def test_a_dry_run_tells_what_the_run_then_is(tmp_path: Path) -> None:
    # Red when: a checkpoint's images, optimizer or average are left out; views or input gradients are not counted.
    settings, out = (
        config(staleness=2, micro_batch_size=16, attack__share=0.5, ema__decay=0.9),
        tmp_path / "run",
    )
    seen = look(settings, out)
    assert not out.exists()
    summary = train(settings, out)
    assert seen.cost.per_clean_image == summary["gradient_images_per_clean_image"]
    assert (seen.cost.steps, seen.cost.epochs) == (summary["steps"], summary["epochs"])
    tensors = checkpoint_tensors(out, 2)
    assert seen.disk.checkpoint == pytest.approx(tensors, rel=0.01)
    assert seen.disk.files == 2
    # two batches of 64 images, half of them attacked, 8 x 8 pixels in float32 and a label each
    assert seen.disk.waiting == 2 * 32 * (64 * 4 + 8)
    lines = [line for line in read_lines(out / "record.jsonl") if line["type"] == "step"]
    assert [dict(seen.curves)["learning rate"](step) for step in range(4)] == [
        line["lr"] for line in lines
    ]
    header = read_lines(out / "record.jsonl")[0]["parameter_groups"]
    assert [(g.name, g.tensors, g.parameters, g.weight_decay) for g in seen.groups] == [
        (g["name"], g["tensors"], g["parameters"], g["weight_decay"]) for g in header
    ]
    again = look(settings, out, resume=True)
    assert again.first_step == 4


def checkpoint_tensors(out: Path, step: int) -> int:
    """Bytes of all tensors in a checkpoint."""
    state = torch.load(out / "checkpoints" / f"step_{step:08d}.pt", weights_only=True)

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes
        children = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        )
        return sum(map(size, children))

    return size(state)


def test_groups_name_patterns_and_routes() -> None:
    # Red when: routes are not told apart, numbers stay, or SGD is said to have a trust ratio.
    lars, sgd = (
        {
            g.name: g
            for g in estimate.groups(build(resolve(config(optim__name=name, optim__lr=1.0)), CPU))
        }
        for name in ("lars", "sgd")
    )
    assert lars["norm"].routes == ("clean", "adv")
    assert lars["weights"].routes == ("clean",)
    assert "blocks.*.bn*.weight" in lars["norm"].patterns
    assert (lars["weights"].adapted, lars["norm"].adapted, sgd["weights"].adapted) == (
        True,
        False,
        False,
    )


def test_what_does_not_fit_ends_the_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: memory or disk are only shown.
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
        with pytest.raises(ConadvError, match=r"smaller --checkpoint\.keep"):
            look(config(), tmp_path / "run")
    monkeypatch.setattr(memory, "available", lambda device: 10_000)
    with pytest.raises(ConadvError, match="--micro-batch-size"):
        look(config(), tmp_path / "run")


def photographs(folder: Path, bad: bool) -> Path:
    """Two classes of four images in each split; with ``bad`` one is no image."""
    draws = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = draws.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    if bad:
        (folder / "train" / "a" / "1.png").write_bytes(b"no image")
    return folder


PHOTOS = "--model resnet8 --model.width 4 --data.image-size 16 --global-batch-size 4 --steps 2 --lr 1".split()
PHOTOS += "--schedule.warmup-epochs 0 --method disadv --data.num-workers 0".split()


def test_the_command_on_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: files are not tried, the PNG is not written, or something is left in the run directory.
    data, out, png = photographs(tmp_path / "data", bad=True), tmp_path / "run", tmp_path / "lr.png"
    args = ["train", "imagefolder", "--data", str(data), *PHOTOS, "--out", str(out), "--dry-run"]
    assert main(args) == 2
    assert "1 of 16 image files" in capsys.readouterr().err
    assert main([*args, "--on-bad-image", "skip", "--figure", str(png)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "16 files read, 1 bad",
        "learning rate over 2 steps",
        "routes",
        "gradient images",
        "ready:",
    ):
        assert words in said
    assert Image.open(png).format == "PNG"
    assert not out.exists()
    assert main([*args[:-1], "--figure", str(png)]) == 2
    assert "no effect without --dry-run" in capsys.readouterr().err


def test_time_from_a_profile(tmp_path: Path) -> None:
    # Red when: accumulation is left out of the layout, or differences between run and profile are not named.
    profile = Path(__file__).parent.parent / "results" / "plan" / "profile-1.json"
    seen = look(config(micro_batch_size=16), tmp_path / "run", profile=profile)
    twice = look(
        config(micro_batch_size=16, global_batch_size=128), tmp_path / "run", profile=profile
    )
    assert 1.5 < twice.time.step / seen.time.step <= 2
    assert any("model" in note for note in seen.time.notes)


PLANNED = load(
    Path(__file__).parent / "golden" / "plan_profile.json"
)  # micro-batches 8 to 32, a link of two ranks
THIS = PLANNED.workload.model_copy(
    update={"model": "resnet8", "width": 4, "image_size": 8, "channels": 1}
)
MEASURED: list[tuple[str, dict[str, Any], str]] = [
    ("workload", {}, ""),
    ("workload", {"model": "resnet14"}, "model resnet14, the run has resnet8"),
    ("workload", {"width": None}, "model width as it is by default, the run has 4"),
    ("workload", {"args": ("drop_rate=0.1",)}, "model.args drop_rate=0.1, the run has none"),
    ("workload", {"num_classes": 1000}, "classes 1000, the run has 10"),
    ("workload", {"image_size": 32}, "image size 32, the run has 8"),
    ("workload", {"channels": 3}, "channels 3, the run has 1"),
    ("workload", {"precision": "bf16"}, "precision bf16, the run has fp32"),
    ("workload", {"optimizer": "lamb"}, "optimizer lamb, the run has lars"),
    ("workload", {"channels_last": True}, "channels_last True, the run has False"),
    ("profile", {"device": "cuda"}, "device cuda, the run has cpu"),
    ("profile", {"processes": 2}, "processes per host 2, the run has 1"),
    (
        "config",
        {"compile": True},
        "the run compiles, and a profile is measured without torch.compile",
    ),
    ("config", {"model__args": ("b=2", "a=1")}, "model.args none, the run has a=1 b=2"),
    ("config", {"micro_batch_size": 4}, "extrapolated: the micro-batch 4 (measured: 8 to 32)"),
    ("config", {"micro_batch_size": 64}, "extrapolated: the micro-batch 64 (measured: 8 to 32)"),
    ("config", {"attack__share": 0.5}, "a profile knows FGSM on every image and no third view"),
]


@pytest.fixture(scope="module")
def parts() -> Parts:
    return build(resolve(config(micro_batch_size=16)), CPU)


@pytest.mark.parametrize(
    ("where", "changes", "message"), MEASURED, ids=[message for *_, message in MEASURED]
)
def test_a_dry_run_names_what_the_profile_is_not_of(
    where: str, changes: dict[str, Any], message: str, parts: Parts
) -> None:
    # Red when: a line of the comparison goes, in_range is not asked, or a run is told something of what was measured.
    work = THIS.model_copy(update=changes if where == "workload" else {})
    machine = {"processes": 1, **(changes if where == "profile" else {})}
    if where == "config":
        parts = dataclasses.replace(parts, config=replace(parts.config, **changes))
    notes = set(
        predicted_time(parts, PLANNED.model_copy(update={"workload": work, **machine})).notes
    )
    assert "without loading images" in notes
    (named,) = notes - {"without loading images"} or {""}
    assert message in named
    assert bool(message) == bool(named)


def test_a_dry_run_of_several_ranks_takes_the_link_that_is_given(parts: Parts) -> None:
    # Red when: the link is not handed on, ranks or a given link are taken for measured, or one rank stands for all.
    several = dataclasses.replace(
        parts, teams=dataclasses.replace(parts.teams, learners=(0, 1, 2, 3))
    )
    profile = PLANNED.model_copy(update={"workload": THIS, "processes": 1})
    measured, given = (
        predicted_time(several, profile),
        predicted_time(several, profile, 0.1, 1000.0),
    )
    assert measured.notes[0] == "extrapolated: 4 ranks (the link is of 2)"
    assert given.notes[0] == "extrapolated: 4 ranks (the link is of 2), the link, as given"
    layout = Layout(4, 0, 16, 1)
    assert measured.step == Planner(profile, profile.link).predict("conadv", layout).step
    assert (
        given.step == Planner(profile, link_of(profile, 0.1, 1000.0)).predict("conadv", layout).step
    )
    with pytest.raises(ConadvError, match="or give --link-gbit and --latency-us"):
        predicted_time(several, profile.model_copy(update={"link": None}))


def test_a_link_is_given_to_a_profile_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: an option does not get as far as the link, or has no effect in silence.
    profile = PLANNED.model_copy(update={"workload": THIS, "link": None})
    save(profile, tmp_path / "node.json")
    train_digits = [
        "train",
        "digits",
        "--schedule.warmup-epochs",
        "0",
        "--out",
        str(tmp_path / "run"),
        "--dry-run",
    ]
    for option in ("--link-gbit", "--latency-us"):
        assert main([*train_digits, option, "1"]) == 2
        assert f"{option} has no effect without --profile" in capsys.readouterr().err
        assert main([*train_digits, "--profile", str(tmp_path / "node.json"), option, "1"]) == 2
        assert "The profile has no link: give" in capsys.readouterr().err


def test_a_plan_measured_here_says_how_long_a_run_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: the command that measures and the one that reads do not fit together, the time is that of one step or of
    # one micro-batch, or what it leaves out is not said.
    data, node, shown = (
        photographs(tmp_path / "data", bad=False),
        tmp_path / "node.json",
        "--workload.",
    )
    measure = f"{shown}model resnet8 {shown}width 4 {shown}image-size 16 {shown}batches 1,2 {shown}rounds 1"
    measure += f" {shown}num-classes 2"
    assert main(["plan", str(node), "--measure", "phases", *measure.split()]) == 0
    args = [
        "train",
        "imagefolder",
        "--data",
        str(data),
        *PHOTOS,
        "--steps",
        "3000",
        "--micro-batch-size",
        "2",
    ]
    capsys.readouterr()
    assert main([*args, "--out", str(tmp_path / "run"), "--dry-run", "--profile", str(node)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    found = re.search(
        r"time about ([\d.]+) (s|min): 3,000 steps of ([\d.]+) s, predicted from the profile", said
    )
    assert found is not None, said
    total, step = float(found[1]) * {"s": 1, "min": 60}[found[2]], float(found[3])
    assert 3000 * step == pytest.approx(total, rel=0.02, abs=60 if found[2] == "min" else 1)
    point = next(
        p for p in load(node).measured("conadv").points if p.micro_batch == 2
    )  # the same arithmetic
    assert step == pytest.approx(2 * (point.gradient + point.attack) + point.rest, rel=0.01)
    assert "evaluation and checkpoints come on top; without loading images" in said
    assert "the profile is of" not in said


# ---- the picture


def test_bars_by_hand() -> None:
    # Red when: rounding goes to the next lower block, rows come upside down, or a small value disappears.
    assert picture.bars([0, 1, 8, 16], 2) == ["   █", " ▁██"]
    assert picture.bars([0, 0.01, 16], 2)[1] == " ▁█"
    assert picture.bars([0, 1, 16], 2, ascii_only=True) == ["  #", " ##"]
    assert picture.bars([0, 0], 1) == ["  "]


@pytest.mark.parametrize("count", [1, 2, 7, 100, 5003])
def test_plots_keep_their_width_and_their_peak(count: int) -> None:
    # Red when: columns show the first of their steps, or the axis is longer than the screen.
    lines = picture.plot(lambda step: 1.0 + (step == count // 2), count, 79, 5, "lr")
    assert max(map(len, lines)) <= 79
    assert lines[1].strip().startswith("2 ")
    assert "█" in lines[1]
    assert lines[-1].strip().endswith(str(count))


def test_a_preview_fits_a_small_screen(tmp_path: Path) -> None:
    from rich.console import Console

    with (tmp_path / "screen").open("w", encoding="utf-8") as file:
        show(look(config(), tmp_path / "run"), Console(file=file, width=80))
    lines = (tmp_path / "screen").read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 80
    assert any("learning rate" in line for line in lines)
    assert "of it images that wait" in " ".join(" ".join(lines).split())
    assert json.dumps(lines)
