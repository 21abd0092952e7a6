"""The ImageNet recipes against tables and formulas written down here once more, step by step.

Sources: mlcommons/logging, training_2.0.0/rcps_resnet.json; mlcommons/training,
image_classification/tensorflow2/ lars_util.py; the ConAdv authors' TF1 code;
fastalgo/imagenet_resnet50_lamb; README_revenge.md of facebookresearch/deit.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from conadv.cli.train import read_options
from conadv.config import recipes
from conadv.config.resolve import accumulation, derive, resolve, scaled_lr
from conadv.config.schema import Config
from conadv.data.workers import GRACE_SECONDS
from conadv.methods import METHODS
from conadv.optim.schedules import WarmupDecay
from conadv.training.build import make_schedule

ROOT = Path(__file__).parent.parent
SLURM = ROOT / "conadv" / "config" / "recipes" / "slurm_imagenet.sh"

TRAIN_IMAGES = 1_281_167
IMAGENET = [name for name in recipes.RECIPES if name.startswith("imagenet_")]


@dataclass(frozen=True)
class Point:
    """A row of FACTS: LARS, polynomial decay. ``decay_steps``: opt_learning_rate_decay_steps."""

    batch: int
    lr: float
    warmup_epochs: int
    momentum: float
    weight_decay: float
    decay_steps: int
    bn_images: int
    power: float = 2.0


POINTS = {
    "imagenet_resnet50_8k": Point(8192, 17, 5, 0.9, 2e-4, 6095, 64),
    "imagenet_resnet50_32k": Point(32768, 21.2, 16, 0.94, 2.5e-5, 2267, 128),
    "imagenet_resnet50_64k": Point(65536, 24.699, 31, 0.951807, 1e-4, 1133, 128),
    # the authors' code: 1,301 steps in all, of which 41 x 13 warm up
    "imagenet_resnet50_96k": Point(98304, 43, 41, 0.92, 5e-5, 1301 - 533, 96, 1.6),
}


def schedule_of(name: str) -> tuple[Config, WarmupDecay]:
    """The schedule as the trainer builds it for ImageNet's number of images."""
    config = resolve(recipes.get(name))
    return config, make_schedule(config, derive(config, TRAIN_IMAGES))


def mlperf_lr(point: Point, warmup_steps: int, step: int) -> float:
    """PolynomialDecayWithWarmup of the reference, step counted from 0, its power free: lr 0 at step
    0, the peak at step warmup_steps, end lr after decay_steps more.
    """
    if step <= warmup_steps:
        return point.lr * step / warmup_steps
    left = 1 - min(step - warmup_steps, point.decay_steps) / point.decay_steps
    return 1e-4 + (point.lr - 1e-4) * left**point.power


@pytest.mark.parametrize("name", POINTS)
def test_lars_points_step_by_step(name: str) -> None:
    # Red when: a number of the table differs, steps_per_epoch is rounded up, power is 2 for all,
    # end_lr is 0, steps leaves out the warm-up, or the micro-batch is left at the default.
    point = POINTS[name]
    config, lr = schedule_of(name)
    warmup = point.warmup_epochs * (TRAIN_IMAGES // point.batch)
    assert config.steps == warmup + point.decay_steps
    for step in range(config.steps):
        ahead = step < warmup  # ours does not lose its first update at lr 0
        assert lr(step) == pytest.approx(mlperf_lr(point, warmup, step + ahead), rel=1e-12), step
    assert lr(warmup - 1) == lr(warmup) == scaled_lr(config.optim, point.batch) == point.lr
    assert lr(config.steps) == 1e-4
    optim = config.optim
    formula = (optim.name, optim.variant, optim.trust_coefficient, optim.eps)
    assert formula == ("lars", "tf", 0.001, 0.0)
    assert (optim.momentum, optim.weight_decay) == (point.momentum, point.weight_decay)
    assert (config.global_batch_size, config.micro_batch_size) == (point.batch, point.bn_images)
    assert (config.label_smoothing, config.model.name) == (0.1, "resnet50")
    for ranks in (8, 64):
        assert accumulation(config, ranks) * ranks * point.bn_images == point.batch


def lamb_lr(peak: float, warmup: int, total: int, step: int) -> float:
    """optimization.py of the authors' LAMB: linear up, linear down to 0."""
    return peak * (step + 1) / warmup if step < warmup else peak * (total - step) / (total - warmup)


def cosine_lr(peak: float, warmup: int, total: int, step: int) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@pytest.mark.parametrize(
    ("name", "batch", "peak", "warmup_epochs", "epochs", "weight_decay", "formula"),
    [
        ("imagenet_efficientnet_b0_4k", 4096, 4 / (2**1.5 * 100), 2.5, 350, 0.02, lamb_lr),
        ("imagenet_efficientnet_b0_32k", 32768, 0.04, 20, 350, 0.02, lamb_lr),
        ("imagenet_vit_s_4k", 4096, 4e-3 * 2**0.5, 10, 300, 0.05, cosine_lr),
        ("imagenet_vit_s_32k", 32768, 0.016, 80, 300, 0.05, cosine_lr),
    ],
)
def test_lamb_points_step_by_step(
    name: str,
    batch: int,
    peak: float,
    warmup_epochs: float,
    epochs: int,
    weight_decay: float,
    formula: Callable[[float, int, int, int], float],
) -> None:
    # Red when: the square root is left out, the decay has power 2, or warm-up counts steps as
    # epochs.
    config, lr = schedule_of(name)
    per_epoch = TRAIN_IMAGES // batch
    warmup, total = round(warmup_epochs * per_epoch), epochs * per_epoch
    for step in range(0, total, 7):
        assert lr(step) == pytest.approx(formula(peak, warmup, total, step), rel=1e-9), step
    assert lr(warmup - 1) == lr(warmup) == pytest.approx(peak, rel=1e-12)
    assert lr(total) == 0
    optim = config.optim
    assert (optim.name, optim.weight_decay, optim.betas) == ("lamb", weight_decay, (0.9, 0.999))
    assert accumulation(config, 8) * 8 * 128 == accumulation(config, 32) * 32 * 128 == batch


def ranks_of(doc: str) -> list[int]:
    """The number of ranks of every command in a recipe's docstring, in their order."""
    default = int(re.findall(r"#SBATCH --nodes=(\d+)", SLURM.read_text())[0])
    found: list[int] = []
    for line in map(str.strip, doc.splitlines()):
        nodes = re.search(r"--nodes (\d+)|--nnodes (\d+)", line)
        count = int(nodes[1] or nodes[2]) if nodes else None
        if line.startswith("torchrun "):
            found.append((count or 1) * int(re.findall(r"--nproc-per-node (\d+)", line)[0]))
        elif " sbatch " in line:
            found.append((count or default) * 8)
        elif line.startswith("conadv plan "):
            found += map(int, re.findall(r"--devices ([\d,]+)", line)[0].split(","))
    return found


@pytest.mark.parametrize("name", IMAGENET)
def test_the_commands_of_a_recipe_are_those_of_its_config(name: str) -> None:
    # Red when: a recipe names another in its config, its docstring plans another batch, or a 4K
    # recipe is started on eight nodes (4,096 is not 64 ranks x 128), by torchrun or on Slurm.
    config, doc = resolve(recipes.get(name)), recipes.RECIPES[name].__doc__ or ""
    sizes = (config.global_batch_size, config.micro_batch_size)
    assert "--global-batch-size {} --micro-batch-size {}".format(*sizes) in doc
    assert (config.recipe, config.checkpoint.background) == (name, True)
    assert (config.data.source, config.data.image_size, config.precision) == ("folder", 224, "bf16")
    one_node, several, slurm, *planned = ranks_of(doc)
    assert (one_node, several, planned) == (8, slurm, [one_node, several])
    for ranks in planned:
        accumulation(config, ranks)  # raises where the numbers do not divide


# ---- the Slurm script

TOOL = "#!/bin/bash\nset -u\n{}\n"
SCONTROL = """case "$1" in
hostnames|show) for ((i = 1; i <= HOSTS_NAMED; i++)); do echo "${NODE:-node$i}"; done ;;
requeue) echo "$2" > "$DATA/requeued" ;;
esac"""
SRUN_SHOWS = (
    """printf '%s\\n' "$@"; echo "master $MASTER_ADDR:$MASTER_PORT"; exit "${SRUN_EXIT:-0}\""""
)
SRUN_STARTS = """while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
done
code=0
for ((i = 0; i < SLURM_NTASKS; i++)); do wait -n || code=$?; done
exit $code"""
RANK = """echo "rank $RANK of $WORLD_SIZE, $LOCAL_RANK of $LOCAL_WORLD_SIZE at $MASTER_ADDR"
exit 143"""


def ended(folder: Path, srun: str, **job: str) -> subprocess.CompletedProcess[str]:
    """The script as a job of a Slurm played by two small programs; ``stdout`` is its log."""
    for name, body in (("srun", srun), ("scontrol", SCONTROL), ("rank", RANK)):
        (folder / name).write_text(TOOL.format(body))
        (folder / name).chmod(0o755)
    around = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    around |= {"HOSTS_NAMED": "2", "SLURM_CPUS_PER_TASK": "12", "DATA": str(folder)}
    around |= {"PYTHON": "python", "OUT": str(folder / "run")}
    around["PATH"] = f"{folder}:{os.environ['PATH']}"
    environment = {**os.environ, **around, **job}
    pipe, both, command = subprocess.PIPE, subprocess.STDOUT, ["bash", SLURM]
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=pipe, stderr=both, text=True, check=False
    )


def test_slurm_script_runs_a_recipe_with_options_that_exist(tmp_path: Path) -> None:
    # Red when: the script's recipe is renamed, an option is misspelt, a requeued job would not go
    # on, or the task gets one core; `head` is given more hosts than a pipe holds and the script
    # ends with its SIGPIPE.
    many = {"SLURM_JOB_NUM_NODES": "20000", "HOSTS_NAMED": "20000"}
    job = ended(tmp_path, SRUN_SHOWS, **many)
    words = job.stdout.splitlines()
    assert job.returncode == 0, words
    assert {"--cpus-per-task=12", "--export=ALL", "master node1:10007", "--auto-resume"} <= set(
        words
    )
    args = words[words.index("train") + 1 : -1]
    text = SLURM.read_text()
    config, _ = read_options(args)
    nodes, tasks, gpus = (int(re.findall(rf"#SBATCH --{what}=(\d+)", text)[0]) for what in SIZES)
    assert tasks == gpus == 8
    assert accumulation(config, tasks * nodes) == 4


SIZES = ("nodes", "ntasks-per-node", "gpus-per-node")


def test_slurm_script_names_the_run_by_recipe_and_job_name(tmp_path: Path) -> None:
    # Red when: the folder names a method that OPTIONS may not have chosen, or has the job's number
    # in it (a job that is sent once more would start again), or two job names share a folder.
    def folder(**job: str) -> str:
        words = ended(
            tmp_path, SRUN_SHOWS, OUT="", OPTIONS="--method noise", **job
        ).stdout.splitlines()
        return words[words.index("--out") + 1]

    found = folder(SLURM_JOB_NAME="noise", RECIPE="imagenet_vit_s_4k")
    assert found == str(tmp_path / "runs" / "imagenet_vit_s_4k" / "noise")
    assert folder(SLURM_JOB_NAME="noise", RECIPE="imagenet_vit_s_4k", SLURM_JOB_ID="8") == found
    (default,) = re.findall(r"--job-name=(.+)", SLURM.read_text())
    assert default not in METHODS


def test_slurm_script_grants_what_workers_outlive() -> None:
    # Red when: one of the three numbers changes alone: the signal's lead, what the run is told, and
    # how long the loader's workers go on after a signal to all processes.
    found = re.findall(r"(?:--signal=TERM@|GRACE_SECONDS=)(\d+)", SLURM.read_text())
    assert list(map(int, found)) == [GRACE_SECONDS] * 2


def test_slurm_script_requeues_no_error_and_starts_on_no_unknown_hosts(tmp_path: Path) -> None:
    # Red when: an error is requeued for ever, or the number of hosts is not compared (mapfile does
    # not see that scontrol failed).
    for code in (0, 2):
        assert ended(tmp_path, SRUN_SHOWS, SRUN_EXIT=str(code)).returncode == code
        assert not (tmp_path / "requeued").exists()
    job = ended(tmp_path, SRUN_SHOWS, HOSTS_NAMED="1")
    assert job.returncode == 1
    assert "names 1 hosts of 2" in job.stdout
    assert "master" not in job.stdout


def test_slurm_tasks_are_ranks_and_a_stopped_job_is_requeued(tmp_path: Path) -> None:
    # Red when: a task's RANK is not its SLURM_PROCID; exit code 143 of a task, which is a stop with
    # a checkpoint (tests/test_signals.py), does not reach the script.
    tasks = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "PYTHON": str(tmp_path / "rank")}
    job = ended(tmp_path, SRUN_STARTS, **tasks)
    assert job.returncode == 143
    said = {line for line in job.stdout.splitlines() if line.startswith("rank ")}
    assert said == {f"rank {n} of 2, {n} of 2 at node1" for n in range(2)}
    assert (tmp_path / "requeued").read_text().strip() == "7"
