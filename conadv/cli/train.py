"""``conadv train RECIPE``: a recipe with a user's options, trained into a run directory."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field

from conadv.cli.options import say, set_threads, trust
from conadv.cli.recipes import recipe_list
from conadv.config import recipes
from conadv.config.files import home, load_yaml
from conadv.config.overrides import given_settings, override
from conadv.config.resolve import resolve
from conadv.config.schema import Config, Section, replace
from conadv.errors import ConadvError, printable

if TYPE_CHECKING:
    from conadv.training.observer import Observer


class RunOptions(Section):
    """Where a run goes and what it shows; none of this changes what is computed."""

    out: Path | None = None
    """Run directory (default: runs/RECIPE/METHOD-seedN)."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint."""
    auto_resume: bool = False
    """Continue the run of these settings in --out if there is one, else start it: one command for
    every start of a job that may be pre-empted."""
    overwrite: bool = False
    """Delete the run that is in --out first."""
    quiet: bool = False
    """Show nothing but errors."""
    dry_run: bool = False
    """Check data, settings, memory and disk, show the schedule, the parameter groups, cost and
    time, and end before the first step. Writes nothing.
    """
    tensorboard: bool = False
    """Also write TensorBoard scalars into OUT/tensorboard."""
    wandb: bool = False
    """Also log to Weights & Biases, into OUT/wandb; offline, unless WANDB_MODE says otherwise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads that torch uses (bitwise repeatability needs the same number)."""
    comm_timeout: float = 600.0
    """Seconds after which a rank that does not answer ends the others (torchrun with several
    processes). With attack ranks, which wait meanwhile, it must be longer than an evaluation and a
    checkpoint."""
    executor: Literal["auto", "inline", "stream", "ranks"] = "auto"
    """When and where the attack on a future batch runs; auto picks, and the record says why."""
    attack_ranks: int = Field(0, le=2**20)
    """How many of torchrun's processes do nothing but attack (conadv only)."""
    late: Literal["wait", "skip"] = "wait"
    """If attack ranks are late: wait (same bits as without them), or skip the adversarial images of
    that step."""
    on_attack_loss: Literal["stop", "continue"] = "stop"
    """When an attack rank dies or cannot be reached: end the run, or let the learners attack in its
    place (same bits; attack ranks then need a torchrun of their own)."""
    timeline_steps: int = Field(200, le=10**9)
    """For so many steps the record says when each phase ran on each rank (conadv timeline)."""


@dataclass
class TrainArgs:
    """Train by a recipe."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    run: Annotated[RunOptions, tyro.conf.arg(name="")]


SET_FIRST = {  # option: what it is, short enough for 80 columns
    "--data": "folder of images, or where a data set is kept",
    "--model": "resnet8 to 56, torchvision, timm:NAME, your own",
    "--method": "vanilla conadv disadv recycle noise multiview",
    "--eps": "perturbation in [0, 1] pixels, such as 4/255",
    "--lookahead": "attack at predicted weights (conadv)",
    "--optimizer": "lars lamb sgd adamw",
    "--lr": "peak learning rate",
    "--global-batch-size": "clean images per update, over all ranks",
    "--micro-batch-size": "images that batch norm sees; auto tries",
    "--epochs": "passes over the training set",
    "--augment": "none basic autoaugment randaugment ...",
    "--seed": "of every random draw",
    "--out": "run directory",
    "--resume": "go on with the run in --out",
    "--dry-run": "check everything, show cost and time",
}


def main(args: Sequence[str]) -> None:
    """Parse, resolve, train. A recipe's name or --config FILE comes first."""
    if not args or args[0] in ("-h", "--help"):
        say("usage: conadv train RECIPE [options], or conadv train --config RUN/config.yaml\n")
        say(recipe_list())
        say("\n`conadv train RECIPE --help` shows the settings.")
    elif any(arg in ("-h", "--help") for arg in args):
        base, prog, _ = _base_config(list(args))
        say(_first_settings(base, prog))
    else:
        _train(*read_options(args))


def read_options(args: Sequence[str]) -> tuple[Config, RunOptions]:
    """The resolved config of a command line, and how to run it. Raises ConadvError, or SystemExit
    as tyro does.
    """
    base, prog, rest = _base_config(list(args))
    rest = ["--help" if arg == "--help-all" else arg for arg in rest]
    given = given_settings(rest)
    about = recipes.RECIPES[base.recipe].__doc__ if base.recipe in recipes.RECIPES else None
    parsed = tyro.cli(
        TrainArgs, default=TrainArgs(base, RunOptions()), args=rest, prog=prog, description=about
    )
    config = resolve(override(base, _with_absolute_folder(parsed.config), given))
    if "model.name" in given:
        trust(config.model.name)
    return config, parsed.run


def _train(config: Config, options: RunOptions) -> None:
    """Train, or show what training would need. Ranks: rank 0 speaks."""
    out = options.out or default_out(config)
    set_threads(options.threads)
    from conadv.distributed.comm import Comm
    from conadv.engine.execution import Execution
    from conadv.planning.micro_batch import settle
    from conadv.training.allocator import keep_freed_memory
    from conadv.training.loop import train

    keep_freed_memory()
    names = ("executor", "attack_ranks", "late", "on_attack_loss", "timeline_steps")
    execution = Execution(**{name: getattr(options, name) for name in names})
    observer = _observer(config, options, out)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    comm = Comm.from_environment(options.device, options.comm_timeout)
    try:
        config = settle(
            config,
            comm,
            out,
            attack_ranks=options.attack_ranks,
            goes_on=options.resume or options.auto_resume or restarted,
            tell=observer.message if comm.is_main else lambda line: None,
        )
        how: dict[str, Any] = {"comm": comm, "execution": execution, "observer": observer}
        how |= {name: getattr(options, name) for name in ("resume", "overwrite", "auto_resume")}
        if options.dry_run:
            _dry_run(config, out, options, how)
            return
        summary = train(config, out, restarted=restarted, **how)
    finally:
        comm.close()
    if comm.is_main and not options.quiet:
        say(_result_line(summary))
        say(f"run directory: {printable(out)}")


def _dry_run(config: Config, out: Path, options: RunOptions, how: dict[str, Any]) -> None:
    """Everything up to the first step. ``how``: what training would be called with."""
    from conadv.cli.dry_run import show
    from conadv.planning.dry_run import preview

    try:
        found = preview(config, out, **how)
    finally:
        how["observer"].finish()
    if how["comm"].is_main and not options.quiet:
        show(found)


def _first_settings(base: Config, prog: str) -> str:
    """The settings that matter, on one screen; --help-all has tyro's page of all."""
    shown = {**base.model_dump(mode="json"), **RunOptions().model_dump(mode="json")}
    values = {
        "--data": base.data.dir,
        "--model": base.model.name,
        "--eps": f"{255 * base.attack.eps:g}/255",
        "--optimizer": base.optim.name,
        "--lr": f"{base.optim.lr:g}",
        "--augment": base.data.augment,
    }
    rows = []
    for option, about in SET_FIRST.items():
        value = values.get(option, shown.get(option[2:].replace("-", "_")))
        text = "" if value is None else "no" if value is False else value
        rows.append(f"  {option:<20} {text!s:<9} {about}")
    about = recipes.summary(base.recipe) if base.recipe in recipes.RECIPES else ""
    head = [f"usage: {prog} [options]", *textwrap.wrap(about, 80), ""]
    return "\n".join([*head, *rows, "", "--help-all lists every setting, in groups."])


def _base_config(args: list[str]) -> tuple[Config, str, list[str]]:
    """The config that options apply to (the recipe named first, or a saved file), and the rest."""
    recipe = None if args[0].startswith("-") else args[0]
    # --config=FILE, or --config FILE
    words = [word for arg in args for word in re.split("(?<=^--config)=", arg, maxsplit=1)]
    if "--config" not in words:
        if recipe is None:
            raise ConadvError(
                "Name the recipe first: conadv train RECIPE [options]. `conadv recipes` lists them."
            )
        return recipes.get(recipe), f"conadv train {recipe}", args[1:]
    if recipe is not None:
        raise ConadvError(
            f"Give a recipe ({recipe}) or --config, not both: the file holds every setting."
        )
    at = words.index("--config")
    path = "".join(words[at + 1 : at + 2])
    if not path:
        raise ConadvError("--config needs a file, such as RUN/config.yaml.")
    # a stranger's file must not make this machine write somewhere, and changed data are accepted
    # for one start: both are given anew
    once = {"data__download": False, "data__changed": "error"}
    base = replace(load_yaml(Path(path)), **once)
    return base, f"conadv train --config {path}", words[:at] + words[at + 2 :]


def _with_absolute_folder(config: Config) -> Config:
    """The data folder as an absolute path: a run must find it from anywhere."""
    if config.data.dir is None:
        return config
    moved: Config = replace(config, data__dir=home(config.data.dir).absolute())
    return moved


def default_out(config: Config) -> Path:
    """runs/RECIPE/METHOD...; a recipe's name from somebody's file must not lead out of runs."""
    if not re.fullmatch(r"\w[\w.-]{0,99}", config.recipe):
        shown = printable(config.recipe)[:100]
        raise ConadvError(f"The recipe's name {shown!r} cannot be a folder's. Give --out.")
    tau = f"-tau{config.staleness}" if config.method == "conadv" else ""
    method = config.method + tau + ("-lookahead" if config.lookahead else "")
    name = f"{method}-{config.optim.name}-batch{config.global_batch_size}-seed{config.seed}"
    return Path("runs") / config.recipe / name


def _observer(config: Config, options: RunOptions, out: Path) -> Observer:
    from conadv.cli.progress import for_terminal
    from conadv.training.loggers import TensorBoard, WandB
    from conadv.training.observer import Guarded
    from conadv.training.run_dir import RunDir

    run_dir = RunDir(out)
    shown: list[Observer] = [for_terminal(options.quiet)]
    if options.tensorboard:
        shown.append(TensorBoard(run_dir.tensorboard))
    if options.wandb:
        shown.append(WandB(run_dir.wandb, config.model_dump(mode="json")))
    return Guarded(*shown)


def _result_line(summary: dict[str, Any]) -> str:
    names = ("test_accuracy", "robust_accuracy", "train_accuracy", "attack_seconds_share")
    known = [summary[name] for name in names]
    test, robust, train, share = ("-" if x is None else f"{100 * x:.2f} %" for x in known)
    return (
        f"test accuracy {test}, under attack {robust}, train accuracy {train}; {summary['steps']} "
        f"steps in {summary['seconds']:.1f} s, attack share {share}"
    )
