"""How the tests run the commands of the documentation, and which ones they do not run, and why.

A page's blocks run in their order in one empty folder. What a page calls DIR, RUN or PHOTOGRAPHS
lies there under that very name: small random images, a short run. A run or profile that a page
names and has not made is a copy of one. Options in ``LAST`` are put behind the page's own, where
the later one wins; those in ``UNLESS_GIVEN`` only if the page has none like it. torchrun's options
go through torchrun's parser, and its program runs as one process here.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

from conadv.cli import program as cli

ROOT = Path(__file__).parent.parent
SHORT = "--schedule.warmup-epochs 0 --eval.robust-images 16 --eval.train-images 32 --model.width 4 --quiet"
PHOTOS = "--global-batch-size 8 --micro-batch-size 4 --schedule.warmup-epochs 0 --eval.robust-images 4 --quiet"

LAST: dict[str, str] = {
    "conadv train digits": SHORT,
    "conadv train cifar10": PHOTOS,
    "conadv train imagefolder": PHOTOS,
    "conadv train imagenet": f"{PHOTOS} --data.num-workers 0 --model resnet8 --model.width 4",
    "conadv train imagefolder --data DIR --model resnet50": "--model resnet8 --model.width 4",
    "conadv analyze": "--images 16 --iterations 2 --eigenvalues 1",
    "conadv analyze runs/sharpness": "--at-loss 2.4",  # that of a run of a few steps
    "conadv plan": "--workload.model resnet8 --workload.width 4 --workload.image-size 8 --workload.rounds 1",
    "conadv sweep": "--dry-run",  # whole: tests/test_sweep.py
    "conadv bench attack-cost": "--model resnet8 --width 4 --image-size 8 --batches 4 --rounds 1 --burst 2",
    "conadv bench data": "--images 16 --batch 8 --accumulation 1 --pause 0 --rounds 1 --photo-size 32 --image-size 32 "
    "--num-workers 0",
    "python benchmarks/repeat_folder.py": "--images 16",
}
UNLESS_GIVEN: dict[str, tuple[str, ...]] = {
    "conadv train digits": ("--steps 3",),
    "conadv train digits --method conadv --probe": ("--steps 9",),
    "conadv train cifar10": ("--steps 2",),
    "conadv train imagefolder": ("--steps 2", "--data.image-size 32"),
    "conadv train imagenet": ("--steps 2", "--data.image-size 32"),
}
BENCHES = "run small by tests/test_bench.py::test_each_benchmark_writes_json_and_a_table"
NOT_RUN: dict[str, str] = {
    "make": "the gate's own steps, and the demo: tests/test_demo.py::test_demo_ends_in_a_report",
    "pip install": "needs an index of packages; tests/test_package.py::test_it_runs_from_where_it_is_installed",
    "conadv demo": "takes minutes; tests/test_demo.py::test_demo_ends_in_a_report",
    "python benchmarks/micro.py": BENCHES,
    "torchrun --nproc-per-node 2 benchmarks/micro.py": "needs two ranks; its parts: tests/test_bench.py",
    "torchrun --nproc-per-node 2 -m conadv bench attack-cost --methods vanilla noise disadv conadv": (
        "needs two ranks; tests/test_bench.py::test_attack_cost_on_two_learners"
    ),
    "torchrun --nproc-per-node 2 -m conadv bench attack-cost --attack-ranks 1": (
        "needs two ranks; tests/test_bench.py::test_attack_cost_with_an_attack_rank"
    ),
    "torchrun --nproc-per-node 4 -m conadv train digits --method conadv --lookahead --attack-ranks 1": (
        "needs two ranks; tests/ranks/test_attack_ranks.py, and the page's Python with attack ranks runs on two"
    ),
    "benchmarks/two_hosts.sh": "needs root; tests/test_two_hosts.py::test_namespaces_and_processes_go_with_the_script",
    "benchmarks/attack_ranks.sh": "takes many minutes; bash -n below",
    "benchmarks/gpu.sh": "needs a GPU; bash -n below",
    "python benchmarks/plan_check.py": "takes many minutes, and root for its links; its parts: tests/test_plan.py",
    "python -m benchmarks.torture kill": "takes many minutes; short in tests/test_torture.py",
    "sbatch": "needs Slurm; tests/test_recipes.py::test_slurm_tasks_are_ranks_and_a_stopped_job_is_requeued",
    "torchrun --nnodes 2 --node-rank": "needs two launchers; tests/ranks/test_attack_loss.py",
    "python -m tests.test_golden": "would write what tests/test_golden.py compares with",
}
if find_spec("wandb") is None:
    NOT_RUN["conadv train digits --method conadv --tensorboard --wandb"] = "the extra is missing"
if not all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))):
    NOT_RUN["conadv export RUN --format onnx"] = "the extra is missing; tests/test_export.py"


def why_not(words: list[str]) -> str | None:
    """Why a command is not run, None if it is."""
    return next((reason for start, reason in NOT_RUN.items() if _begins(words, start)), None)


def _begins(words: list[str], start: str) -> bool:
    """By whole words but for the last: "train imagenet" stands for all such recipes."""
    *first, last = start.split()
    return words[: len(first)] == first and "".join(words[len(first) :][:1]).startswith(last)


def tiny(words: list[str]) -> list[str]:
    """The command with small settings."""
    given, more = {word.partition("=")[0] for word in words}, list[str]()
    for start, options in UNLESS_GIVEN.items():
        for option in options if _begins(words, start) else ():
            name = option.split()[0]
            if name not in given and not (name == "--steps" and "--epochs" in given):
                more += option.split()
    for start, text in LAST.items():
        more += text.split() if _begins(words, start) else []
    if _begins(words, "conadv train") and not {"--resume", "--auto-resume"} & given:
        more.append("--overwrite")  # a page may show two runs of one name
    if _begins(words, "conadv timeline") and "--steps" in given:
        more += ["--steps", "0:2"]
    if _begins(words, "conadv plan"):  # a link needs two ranks: tests/test_plan.py
        measured = [*more, "--workload.batches", "8,16", "--measure", "phases"]
        more = measured if "--measure" in given else []
    return [*words, *more]


def run(words: list[str], kept: Path) -> None:
    """Run a command in the present folder; the test fails unless it ends well. ``kept``: what
    ``short_run`` made.
    """
    if words[0] == "torchrun":
        parsed: argparse.Namespace = get_args_parser().parse_args(words[1:])
        assert parsed.module, "torchrun is shown with -m conadv"
        words = [parsed.training_script, *parsed.training_script_args]
    elif words[:3] == ["python", "-m", "conadv"]:
        words = words[2:]
    words = tiny(words)
    if words[0] == "conadv":
        _provide(words, kept)
        assert cli.main(words[1:]) == 0, " ".join(words)
    else:
        assert words[0] == "python", f"no way to run {words}: give one here, or the reason why not"
        _run_python(words[1:])


def _run_python(words: list[str]) -> None:
    module = words[0] == "-m"
    target, *args = words[1:] if module else words
    start: Callable[..., object] = runpy.run_module if module else runpy.run_path
    # as in a process of its own: not imported by another test, and with a script's neighbours
    imported = sys.modules.pop(target, None)
    beside = [] if module else [str((ROOT / target).parent)]
    with (
        mock.patch.object(sys, "argv", [target, *args]),
        mock.patch.object(sys, "path", [*beside, *sys.path]),
    ):
        try:
            start(target if module else str(ROOT / target), run_name="__main__")
        except SystemExit as end:
            if end.code:
                pytest.fail(f"{words}: {end.code}")
        finally:
            if imported is not None:
                sys.modules[target] = imported


def _provide(words: list[str], kept: Path) -> None:
    """Put a run or a profile where a command reads one that the page has not made."""
    reads = words[1] not in ("train", "plan", "bench", "sweep")
    for word in words[2:] if reads else ():
        if word.startswith("runs/") and not Path(word).exists():
            shutil.copytree(kept, word)
    if words[1] == "plan" and "--measure" not in words and not Path(words[2]).exists():
        shutil.copy(ROOT / "results" / "plan" / "profile-2.json", words[2])


def furnish(folder: Path, kept: Path) -> None:
    """What every page may take for granted: DIR, PHOTOGRAPHS, RUN and the repository's studies."""
    for split, count in (("train", 8), ("val", 4)):
        photographs(folder / "DIR" / split, count)
    photographs(folder / "PHOTOGRAPHS", 4)
    shutil.copytree(kept, folder / "RUN")
    shutil.copytree(ROOT / "studies", folder / "studies")
    (folder / "results" / "benchmarks").mkdir(parents=True)


def photographs(folder: Path, count: int) -> None:
    """Two classes of random images, 32x32."""
    draws = torch.Generator().manual_seed(0)
    for name in ("ash", "oak"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=draws)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{number}.png")


def short_run(folder: Path) -> None:
    """A run whose record has something for every command that reads one."""
    options = f"--method conadv --probe.every-epochs 4 --out {folder} --steps 9 {SHORT}"
    words = ["train", "digits", *options.split()]
    assert cli.main(words) == 0, "see stderr"


def on_two_ranks(program: str, folder: Path) -> None:
    """Run a Python program under torchrun as two processes."""
    # torch's threads now and then abort Python's way out ("terminate called without an active
    # exception")
    (folder / "page.py").write_text(f"{program}\nimport os\nos._exit(0)\n")
    around = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    around["PYTHONPATH"] = str(ROOT)
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 page.py".split()
    command = [sys.executable, *launch]
    done = subprocess.run(command, cwd=folder, env=around, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stderr[-4000:])
