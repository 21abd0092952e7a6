"""Micro-batches found by trial, and what a dry run says: the numbers against runs, formulas and files."""

from __future__ import annotations

import dataclasses
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
from conadv.cli.format import bars, plot
from conadv.cli.program import main
from conadv.config import recipes
from conadv.config.files import load_yaml
from conadv.config.resolve import derive, resolve
from conadv.config.schema import Config, replace
from conadv.distributed.comm import Comm
from conadv.planning import dry_run, memory, micro_batch
from conadv.planning.cost_model import Layout, Planner
from conadv.planning.dry_run import predicted_time, preview
from conadv.planning.micro_batch import beside_a_pass, candidates, fits_on_cpu, largest, settle
from conadv.planning.profile import link_of, load
from conadv.planning.search import divisors
from conadv.planning.timing import Sample
from conadv.planning.trial import Shape, Trial
from conadv.sweep.cells import expand
from conadv.sweep.spec import load_spec
from conadv.training.build import Run, build, make_schedule
from conadv.training.loop import train
from conadv.training.record import read_lines

CPU = torch.device("cpu")
DIGITS = Shape(1, 8, 10)


def config(**changes: Any) -> Config:
    """Four steps of ConAdv on digits."""
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


def trial(size: int = 16, **changes: Any) -> Trial:
    return Trial(resolve(config(micro_batch_size=size, **changes)), DIGITS, Comm(), size)


# ---- the micro-batch


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
            following = sizes[: sizes.index(best) + 2 if best else 1]
            assert set(tried) <= {size for size in sizes if size <= 2 * (best or 0)} | {*following}
            assert len(tried) == len(set(tried))


def test_candidates_divide_the_share_of_a_learner() -> None:
    # Red when: the global batch is divided instead of the share; attack ranks are forgotten; shares of no image stay.
    settings = config(global_batch_size=96)
    assert candidates(settings, 2) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    assert candidates(settings, 2, 4) == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert candidates(replace(settings, attack__share=0.1), 2)[0] == 6
    for learners in (5, 97):
        with pytest.raises(ConadvError, match=f"{learners} learner"):
            candidates(settings, learners)


@pytest.mark.parametrize(
    ("error", "fits"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), False),
        (None, True),
    ],
)
def test_work_that_runs_out_of_memory_has_no_peak(
    error: Exception | None, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: the error is not caught, another one is, or what was allocated before counts.
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)

    def work() -> None:
        if error is not None:
            raise error

    assert memory.cuda_peak(work, torch.device("cuda")) == (600 if fits else None)
    error = RuntimeError("an illegal memory access")
    with pytest.raises(RuntimeError, match="illegal"):
        memory.cuda_peak(work, torch.device("cuda"))


def test_a_size_fits_on_a_cpu_by_the_cost_model() -> None:
    # Red when: the activations of a size, their workspace, or the share of the memory are left out.
    sizes = trial(2).sizes
    needed = 2 * sizes.weights + sizes.optimizer_state + 2 * 64 * sizes.image
    for size in (2, 16, 64):
        bytes_of_size = needed + 2 * size * sizes.activations_per_image
        for more, fits in ((1, True), (-1, False)):
            free = round(bytes_of_size / micro_batch.CPU_SHARE) + 2 * more
            asked = fits_on_cpu(resolve(config(micro_batch_size=2)), DIGITS, CPU, 1, free)
            assert asked(size) is fits


def test_images_that_wait_and_buckets_are_counted() -> None:
    # Red when: the dtype of what waits, the share that is attacked, or the buckets of several ranks are left out.
    def beside(learners: int = 1, **changes: Any) -> int:
        return beside_a_pass(trial(**changes), learners)

    assert beside() == 48 * 64 * (4 + 4)
    assert beside(staleness=3, pending_dtype="uint8") == 48 * 64 * (4 + 3)
    assert beside(attack__share=0.5) == 24 * 64 * 8
    assert beside(method="vanilla") == 0
    assert beside(2, method="vanilla") == trial(method="vanilla").sizes.weights
    assert beside(1, method="vanilla", ema__decay=0.9) == trial(method="vanilla").sizes.weights


def test_ranks_agree_on_the_smallest_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: every rank keeps its own answer, or the largest is taken.
    monkeypatch.setattr(micro_batch, "largest", lambda sizes, fits: 16)
    comm: Any = SimpleNamespace(
        device=CPU,
        ranks=2,
        is_main=True,
        agreed=nullcontext,
        barrier=lambda: None,
        gather_objects=lambda value: [value, 8, 32],
        broadcast_object=lambda value: value,
    )
    said: list[str] = []
    settled = settle(resolve(config(micro_batch_size="auto")), comm, tell=said.append)
    assert settled.micro_batch_size == 8
    assert "16 does not fit" in said[0]


def test_auto_is_settled_before_a_run_and_a_resume_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: resume tries anew, a number is changed, or training starts without one.
    auto, out = config(micro_batch_size="auto"), tmp_path / "run"
    with pytest.raises(ConadvError, match=r"micro_batch\.settle"):
        train(auto, out)
    assert not out.exists()
    monkeypatch.setattr(micro_batch, "largest", lambda sizes, fits: 16)
    train(settle(auto, Comm(), out, goes_on=True), out)
    assert load_yaml(out / "config.yaml").micro_batch_size == 16
    monkeypatch.setattr(micro_batch, "largest", lambda sizes, fits: 32)
    assert settle(auto, Comm(), out).micro_batch_size == 32
    again = settle(auto, Comm(), out, goes_on=True)
    assert again.micro_batch_size == 16
    train(again, out, resume=True)
    assert settle(config(micro_batch_size=4), Comm(), out, goes_on=True).micro_batch_size == 4


def test_auto_where_it_cannot_be_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "name: x\nrecipe: digits\nbase: {micro_batch_size: auto}\narms: {a: {}}\nconfirm: {seeds: [0]}\n"
    )
    with pytest.raises(ConadvError, match="could not be compared"):
        expand(load_spec(spec))
    for free, message in ((1000, "Not even a micro-batch of 2 fits"), (None, "a number")):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        with pytest.raises(ConadvError, match=message):
            settle(config(micro_batch_size="auto"), Comm())


def test_free_memory_is_the_least_of_host_and_container(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: a container's limit is ignored, or the word "max" is taken for one.
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n"}
    monkeypatch.setattr(memory, "_read", lambda file: files.get(file, ""))
    assert memory.available(CPU) == 8 * 1024
    files |= {"/sys/fs/cgroup/memory.max": "5000\n", "/sys/fs/cgroup/memory.current": "2000\n"}
    assert memory.available(CPU) == 3000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available(CPU) == 2 * 1024
    files.clear()
    assert memory.available(CPU) is None


# ---- the dry run


def look(settings: Config, out: Path, **options: Any) -> dry_run.Preview:
    return preview(settings, out, comm=Comm(device=CPU), **options)


def test_a_dry_run_tells_what_the_run_then_is(tmp_path: Path) -> None:
    # Red when: a checkpoint's images, optimizer or average are left out, or something is written.
    out = tmp_path / "run"
    settings = config(staleness=2, micro_batch_size=16, attack__share=0.5, ema__decay=0.9)
    seen = look(settings, out)
    assert not out.exists()
    summary = train(settings, out)
    assert seen.run.derived.steps == summary["steps"]
    assert seen.checkpoint == pytest.approx(checkpoint_tensors(out, 2), rel=0.01)
    assert seen.checkpoints == 2
    assert seen.gradient_images == summary["gradient_images_per_clean_image"]
    # two batches of 64 images, half of them attacked, 8 x 8 pixels in float32 and a label each
    assert seen.waiting == 2 * 32 * (64 * 4 + 8)
    rates = [line["lr"] for line in read_lines(out / "record.jsonl") if line["type"] == "step"]
    assert list(map(make_schedule(seen.run.config, seen.run.derived), range(4))) == rates
    assert look(settings, out, resume=True).first_step == 4


def checkpoint_tensors(out: Path, step: int) -> int:
    """Bytes of all tensors in a checkpoint."""
    state = torch.load(out / "checkpoints" / f"step_{step:08d}.pt", weights_only=True)

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes
        children = value.values() if isinstance(value, dict) else value
        return (
            sum(map(size, children)) if isinstance(children, list) or children is not value else 0
        )

    return size(state)


def test_memory_is_that_of_the_cost_model() -> None:
    # Red when: a copy of the weights, or images that wait, are left out.
    plain, sizes = trial(), trial().sizes
    assert sizes.optimizer_state == sizes.weights
    assert trial(optim__name="adamw", optim__lr=0.1).sizes.optimizer_state == 2 * sizes.weights
    base = plain.run_bytes(1, 0, 16)
    images = 2 * 64 * 64 * 4
    assert base == 3 * sizes.weights + images + 16 * sizes.activations_per_image
    assert plain.run_bytes(2, 1, 16) == base + 2 * sizes.weights - images // 2
    for changes in ({"ema__decay": 0.9}, {"lookahead": True}):
        assert trial(**changes).run_bytes(1, 0, 16) == base + sizes.weights


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


def photographs(folder: Path) -> Path:
    """Two classes of four images in each split, of which one is no image."""
    draws = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = draws.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    (folder / "train" / "a" / "1.png").write_bytes(b"no image")
    return folder


PHOTOS = (
    "--model resnet8 --model.width 4 --data.image-size 16 --global-batch-size 4 --steps 2 --lr 1 "
    "--schedule.warmup-epochs 0 --method disadv --data.num-workers 0"
)


def test_the_command_on_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: files are not tried, the PNG is not written, or something is left in the run directory.
    data, out, png = photographs(tmp_path / "data"), tmp_path / "run", tmp_path / "lr.png"
    args = ["train", "imagefolder", "--data", str(data), *PHOTOS.split(), "--out", str(out)]
    assert main([*args, "--dry-run"]) == 2
    assert "1 of 16 image files" in capsys.readouterr().err
    auto = ["--micro-batch-size", "auto", "--on-bad-image", "skip", "--figure", str(png)]
    assert main([*args, *auto, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("16 files read, 1 bad", "learning rate over 2 steps", "trust ratio", "ready:"):
        assert words in said
    assert Image.open(png).format == "PNG"
    assert not out.exists()
    for given, message in (
        (["--figure", str(png)], "no effect without --dry-run"),
        (["--dry-run", "--link-gbit", "1"], "--link-gbit has no effect without --profile"),
        (["--dry-run", "--latency-us", "1"], "--latency-us has no effect without --profile"),
    ):
        assert main([*args, *given]) == 2
        assert message in capsys.readouterr().err


# ---- the time

PLANNED = load(Path(__file__).parent / "golden" / "plan_profile.json")  # micro-batches 8 to 32
THIS = {"model": "resnet8", "width": 4, "image_size": 8, "channels": 1}
PROFILE = PLANNED.model_copy(
    update={"workload": PLANNED.workload.model_copy(update=THIS), "processes": 1}
)
DIFFERENCES: list[tuple[str, dict[str, Any], str]] = [
    ("workload", {}, ""),
    ("workload", {"model": "resnet14"}, "model resnet14, the run has resnet8"),
    ("workload", {"width": None}, "model width 16, the run has 4"),
    ("workload", {"args": ("drop_rate=0.1",)}, "model.args ['drop_rate=0.1'], the run has []"),
    ("workload", {"image_size": 32}, "image size 32, the run has 8"),
    ("workload", {"optimizer": "lamb"}, "optimizer lamb, the run has lars"),
    ("profile", {"device": "cuda"}, "device cuda, the run has cpu"),
    ("profile", {"processes": 2}, "processes per host 2, the run has 1"),
    ("config", {"compile": True}, "compile False, the run has True"),
    ("config", {"micro_batch_size": 4}, "extrapolated: batch"),
    ("config", {"micro_batch_size": 64}, "extrapolated: batch"),
    ("config", {"attack__share": 0.5}, "attack.share 1, the run has 0.5"),
]


@pytest.fixture(scope="module")
def digits() -> Run:
    return build(resolve(config(micro_batch_size=16)), CPU)


def changed(run: Run, learners: int = 1, **changes: Any) -> Run:
    """``run`` with other settings, on so many learners."""
    new = replace(run.config, **changes)
    derived = derive(new, run.data.train_size, learners)
    teams = dataclasses.replace(run.teams, learners=tuple(range(learners)))
    return dataclasses.replace(run, config=new, derived=derived, teams=teams)


@pytest.mark.parametrize(
    ("where", "changes", "message"), DIFFERENCES, ids=[message for *_, message in DIFFERENCES]
)
def test_a_dry_run_names_what_the_profile_is_not_of(
    where: str, changes: dict[str, Any], message: str, digits: Run
) -> None:
    # Red when: a line of the comparison goes, or a run is told something of what was measured.
    profile, run = PROFILE, digits
    if where == "config":
        run = changed(digits, **changes)
    elif where == "workload":
        work = profile.workload.model_copy(update=changes)
        profile = profile.model_copy(update={"workload": work})
    else:
        profile = profile.model_copy(update=changes)
    notes = set(predicted_time(run, Planner(profile)).notes) - {"without loading images"}
    (named,) = notes or {""}
    assert message in named
    assert bool(message) == bool(named)


def test_the_time_of_several_ranks_is_that_of_the_cost_model(digits: Run) -> None:
    # Red when: accumulation or a rank is left out, or ranks or a given link are taken for measured.
    several = changed(digits, 2, micro_batch_size=8)
    given = Planner(PROFILE, link_of(PROFILE, 0.1, 1000.0))
    layout = Layout(2, 0, 8, 4)
    found = predicted_time(several, given, link_given=True)
    assert found.step == given.predict("conadv", layout).step
    assert any("extrapolated: link" in note for note in found.notes)
    sequential = predicted_time(changed(several, 2, staleness=0), given)
    assert sequential.step == given.predict("disadv", layout).step
    with pytest.raises(ConadvError, match="or give --link-gbit and --latency-us"):
        predicted_time(several, Planner(PROFILE))
    with pytest.raises(ConadvError, match="cannot predict sam"):
        predicted_time(changed(digits, method="sam"), given)


def test_the_time_of_trial_steps_counts_every_micro_batch(
    digits: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: the time is that of one micro-batch, or the notes leave out what is not measured.
    monkeypatch.setattr(dry_run, "burst", lambda step, count: Sample(0.25))
    found = dry_run.trial_time(digits, DIGITS)
    assert found.step == 4 * 0.25
    assert "counted once per micro-batch" in found.notes[-1]


def test_the_command_predicts_from_a_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: the profile or the given link does not get as far as the prediction.
    planners: list[tuple[Planner, bool]] = []

    def remember(run: Run, planner: Planner, link_given: bool) -> dry_run.Time:
        planners.append((planner, link_given))
        return dry_run.Time(2.0, "predicted from the profile", ())

    monkeypatch.setattr(dry_run, "predicted_time", remember)
    profile = Path(__file__).parent / "golden" / "plan_profile.json"
    command = (
        f"train digits --steps 600 --schedule.warmup-epochs 0 --out {tmp_path / 'run'} --dry-run"
    )
    given = f"--profile {profile} --link-gbit 0.1 --latency-us 1000"
    assert main([*command.split(), *given.split()]) == 0
    assert planners == [(Planner(PLANNED, link_of(PLANNED, 0.1, 1000.0)), True)]
    assert "20 min" in capsys.readouterr().out  # 600 steps of 2 s


# ---- the picture


def test_bars_by_hand() -> None:
    # Red when: rounding goes to the next lower block, rows come upside down, or a small value disappears.
    assert bars([0, 1, 8, 16], 2) == ["   █", " ▁██"]
    assert bars([0, 0.01, 16], 2)[1] == " ▁█"
    assert bars([0, 1, 16], 2, ascii_only=True) == ["  #", " ##"]
    assert bars([0, 0], 1) == ["  "]


@pytest.mark.parametrize("count", [1, 2, 7, 100, 5003])
def test_plots_keep_their_width_and_their_peak(count: int) -> None:
    # Red when: columns show the first of their steps, or the axis is longer than the screen.
    curve: Callable[[int], float] = lambda step: 1.0 + (step == count // 2)  # noqa: E731
    lines = plot(curve, count, 79, 5)
    assert max(map(len, lines)) <= 79
    assert lines[0].strip().startswith("2 ")
    assert "█" in lines[0]
