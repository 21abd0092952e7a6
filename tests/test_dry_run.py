"""Micro-batches found by trial, and what a dry run says: the numbers against runs, formulas and
files.
"""

from __future__ import annotations

import random as stdlib_random
import shutil
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conadv import ConadvError
from conadv.cli.program import main
from conadv.config.files import load_yaml
from conadv.config.resolve import resolve
from conadv.config.schema import Config, replace
from conadv.distributed.comm import Comm
from conadv.planning import dry_run, memory, micro_batch
from conadv.planning.dry_run import preview
from conadv.planning.micro_batch import beside_a_pass, candidates, fits_on_cpu, settle
from conadv.planning.timing import Sample
from conadv.planning.trial import Shape, Trial
from conadv.sweep.cells import expand
from conadv.sweep.spec import load_spec
from conadv.training.build import build, make_schedule
from conadv.training.loop import train
from conadv.training.record import read_lines

from .helpers import same, state
from .test_training import config as settings

CPU = torch.device("cpu")
DIGITS = Shape(1, 8, 10)


def config(**changes: Any) -> Config:
    """Four steps of ConAdv on 128 digits."""
    short = {"method": "conadv", "global_batch_size": 64, "micro_batch_size": None, "epochs": None}
    short |= {"steps": 4, "schedule__warmup_epochs": 0, "data__train_images": 128}
    short |= {"checkpoint__every_epochs": 1, "checkpoint__keep": 2, "eval__robust_images": 0}
    return settings(**short | changes)


def trial(size: int = 16, **changes: Any) -> Trial:
    return Trial(resolve(config(micro_batch_size=size, **changes)), DIGITS, Comm(), size)


# ---- the micro-batch


def fitting(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Micro-batches of up to ``most`` images fit; returns those that will have been tried."""
    tried: list[int] = []
    monkeypatch.setattr(
        micro_batch, "fits_on_cpu", lambda *_: lambda size: tried.append(size) or size <= most
    )
    return tried


@pytest.mark.parametrize(("most", "found"), [(2, 2), (3, 2), (16, 16), (63, 32), (1000, 64)])
def test_the_largest_that_fits_is_found(
    most: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: bisection returns the size above, or one is tried twice.
    tried = fitting(monkeypatch, most)
    assert settle(config(micro_batch_size="auto"), Comm()).micro_batch_size == found
    assert len(tried) == len(set(tried)) <= 3


def test_candidates_divide_the_share_of_a_learner() -> None:
    # Red when: the global batch is divided instead of the share; attack ranks are forgotten; shares
    # of no image stay.
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
    monkeypatch.setattr(memory, "_release", lambda: None)
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
    # Red when: the dtype of what waits, the share that is attacked, or the buckets of several ranks
    # are left out.
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
    fitting(monkeypatch, 16)
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
    fitting(monkeypatch, 16)
    train(settle(auto, Comm(), out, goes_on=True), out)
    assert load_yaml(out / "config.yaml").micro_batch_size == 16
    fitting(monkeypatch, 32)
    assert settle(auto, Comm(), out).micro_batch_size == 32
    again = settle(auto, Comm(), out, goes_on=True)
    assert again.micro_batch_size == 16
    train(again, out, resume=True)
    assert settle(config(micro_batch_size=4), Comm(), out, goes_on=True).micro_batch_size == 4


def test_auto_where_it_cannot_be_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "name: x\nrecipe: digits\nbase: {micro_batch_size: auto}\narms: {a: {}}\n"
        "confirm: {seeds: [0]}\n"
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


def test_a_trial_leaves_a_run_alone() -> None:
    # Red when: the trial's network, its dropout or its images draw from a global generator, or it
    # shares a tensor with the run.
    run = build(resolve(config(micro_batch_size=16)), CPU)
    torch.manual_seed(3)
    before, random, python = state(run.model), torch.get_rng_state(), stdlib_random.getstate()
    rehearsed = trial(16)
    rehearsed.step()
    assert rehearsed.run_bytes(1, 0, 16) > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert stdlib_random.getstate() == python
    assert same(state(run.model), before)
    assert run.step.version == 0


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
    # a quarter of the images is replaced: 12 clean ones make the larger pass, a quarter waits
    fewer = trial(mix="replace", attack__share=0.25).run_bytes(1, 0, 16)
    assert base - fewer == 4 * sizes.activations_per_image + 3 * images // 4


def test_a_trial_reads_as_many_images_as_the_run() -> None:
    # Red when: a micro-batch of recycle with replace is all fresh: it would train on a third more.
    rehearsed = trial(method="recycle", mix="replace", attack__share=0.25)
    assert len(rehearsed.micro[0].y_N) == 12
    rehearsed.step()
    assert rehearsed.step().step == 1


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


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: auto is not settled first, or something is left in the run directory.
    out = tmp_path / "run"
    options = "--model.width 4 --steps 2 --schedule.warmup-epochs 0 --micro-batch-size auto"
    args = ["train", "digits", *options.split(), "--out", str(out)]
    assert main([*args, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("micro-batch auto:", "2 steps (", "trust ratio", "ready:"):
        assert words in said
    assert not out.exists()


# ---- the time


def test_the_time_counts_every_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: the time is that of one micro-batch.
    monkeypatch.setattr(dry_run, "burst", lambda step, count: Sample(0.25))
    assert look(config(micro_batch_size=16), tmp_path / "run").step_seconds == 4 * 0.25
