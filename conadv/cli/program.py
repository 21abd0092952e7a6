"""The program: ``conadv COMMAND``. Torch is imported only by the commands that compute."""

from __future__ import annotations

import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro
from pydantic import ValidationError

from conadv import __version__
from conadv.cli.limits import check_numbers
from conadv.config.schema import (
    Config,
    explain,
    flatten,
    home,
    load_yaml,
    override,
    replace,
    resolve,
)
from conadv.errors import ConadvError, printable, printable_lines, unknown
from conadv.training.allocator import keep_freed_memory

if TYPE_CHECKING:
    from conadv.engine.execution import Execution
    from conadv.training.observer import Observer

HELP = """\
usage: conadv COMMAND [options]

Large-batch training with concurrent adversarial learning.

  recipes                  list the recipes
  slurm                    print a Slurm script for the ImageNet recipes: conadv slurm > job.sh
  train RECIPE [options]   train; `conadv train RECIPE --help` lists every setting with the recipe's values
  train --config FILE      train again by a saved config.yaml
  eval RUN                 evaluate a trained run, clean and under attack
  analyze RUN...           Hessian, sharpness, loss landscape and robust accuracy of trained models
  export RUN               write the clean route as model.safetensors, torch.export program or ONNX
  report RUN...            an HTML and Markdown report about runs, folders of runs, or a sweep
  timeline RUN             what ran beside what: a trace, a picture, the hidden shares
  staleness RUN...         what the probe measured: attacks at stale and at predicted weights, table and picture
  plan PROFILE             predict step time, cost and the best split for machines that you do not have
  sweep SPEC               a grid of runs: tuned on validation images, confirmed on other seeds, reported
  watch RUN                a live view of a run, a sweep or a folder of runs in the terminal
  doctor                   what is installed, what devices and links are seen, and what would be slow or wrong
  demo                     the main comparison on the embedded digits, a few minutes on 2 cores
  bench WHAT [options]     timings: attack-cost, data
  check DIR                read every image of an image folder and list those that training would stumble over

  --version, --help        `conadv COMMAND --help` has the details
  --debug                  show tracebacks (also with CONADV_DEBUG=1 in the environment)

exit codes: 0 done, 1 check found something, 2 an error that you can act on, 70 a bug of conadv,
            130 interrupted and 143 terminated (saved, if training), 141 nobody reads the output any more
"""

T = TypeVar("T")

EXIT_FOUND = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_PIPE = 141  # 128 + SIGPIPE, as a shell reports a program that SIGPIPE ends


@dataclass
class RunOptions:
    """Where a run goes and what it shows; none of this changes what is computed."""

    out: Path | None = None
    """Run directory (default: runs/RECIPE/METHOD-seedN)."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint."""
    auto_resume: bool = False
    """Continue the run of these settings in --out if there is one, and start it where there is none: one command for
    every start of a job that may be pre-empted."""
    overwrite: bool = False
    """Delete the run that is in --out first."""
    quiet: bool = False
    """Show nothing but errors."""
    dry_run: bool = False
    """Check data, settings, memory and disk, show the schedule, the parameter groups, cost and time, and end before
    the first step. Writes nothing."""
    profile: Path | None = None
    """With --dry-run: take the time from this profile of `conadv plan`, instead of a few synthetic steps."""
    link_gbit: float | None = None
    """With --profile: the link between ranks has this many Gbit/s per rank, instead of the measured one."""
    latency_us: float | None = None
    """With --profile: this latency per step of an all-reduce, in microseconds."""
    figure: Path | None = None
    """With --dry-run: also write the schedule as this PNG."""
    tensorboard: bool = False
    """Also write TensorBoard scalars into OUT/tensorboard."""
    wandb: bool = False
    """Also log to Weights & Biases, into OUT/wandb; offline, unless WANDB_MODE says otherwise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    """CPU threads that torch uses (bitwise repeatability needs the same number)."""
    comm_timeout: float = 600.0
    """Seconds after which a rank that does not answer ends the others (torchrun with several processes). With attack
    ranks, which wait meanwhile, it must be longer than an evaluation and a checkpoint."""
    executor: Literal["auto", "inline", "stream", "ranks"] = "auto"
    """When and where the attack on a future batch runs; auto picks, and the record says why."""
    attack_ranks: int = 0
    """How many of torchrun's processes do nothing but attack (conadv only)."""
    late: Literal["wait", "skip"] = "wait"
    """If attack ranks are late: wait (same bits as without them), or skip the adversarial images of that step."""
    on_attack_loss: Literal["stop", "continue"] = "stop"
    """When an attack rank dies or cannot be reached: end the run, or let the learners attack in its place (same bits;
    attack ranks then need a torchrun of their own)."""
    timeline_steps: int = 200
    """For so many steps the record says when each phase ran on each rank (conadv timeline)."""


@dataclass
class TrainArgs:
    """Train by a recipe."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    run: Annotated[RunOptions, tyro.conf.arg(name="")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code, see HELP.

    Errors are one message. With --debug, or CONADV_DEBUG in the environment, the traceback comes before it.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("CONADV_DEBUG", "0") not in ("", "0") or "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    _open_closed_output()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII locale must not end a run
    try:
        code = _dispatch(args)
        sys.stdout.flush()  # here, or a pipe that was closed is found after the last line of the program
    except BrokenPipeError:
        if debug:
            traceback.print_exc()
        _drop_output()
        return EXIT_PIPE
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        code, message = _explained(error)
        if message:
            sys.stderr.write(f"conadv: {printable_lines(message)}\n")
    return code


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        _say(HELP)
    elif args[0] == "--version":
        _say(__version__)
    elif args[0] not in COMMANDS:
        raise unknown("command", args[0], COMMANDS)
    else:
        return COMMANDS[args[0]](args[1:]) or 0
    return 0


def _explained(error: BaseException) -> tuple[int, str]:
    """The exit code for an error, and what to say of it."""
    if isinstance(error, ConadvError):
        said = (
            error.agreed and os.environ.get("RANK", "0") != "0"
        )  # what all ranks raise is said once
        return EXIT_USER_ERROR, "" if said else str(error)
    if isinstance(
        error, ValidationError
    ):  # tyro explains those of nested settings, not those of the top level
        return EXIT_USER_ERROR, str(explain(error, "options"))
    if (code := getattr(error, "code", None)) is not None:  # training.signals.Stopped
        said = os.environ.get("RANK", "0") != "0"  # all ranks stop together
        return code, "" if said else f"stopped{error}"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, f"interrupted{''.join(map(str, error.args))}"
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return (
            EXIT_USER_ERROR,
            f"{error.strerror or error}{where}. Check the path, its permissions and free space.",
        )
    if (
        isinstance(error, MemoryError)
        or "out of memory" in str(error)
        or "can't allocate memory" in str(error)
    ):
        return (
            EXIT_USER_ERROR,
            f"Out of memory: {error}. Choose a smaller micro_batch_size, image_size or model.",
        )
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(__file__).parents[1] in Path(frame.filename).parents]
    frame = (ours or list(frames))[-1]
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    return EXIT_BUG, (
        f"Unexpected {type(error).__name__} in {where}: {error}. This is a bug of conadv: please report it with what "
        "--debug shows (the traceback)."
    )


def _open_closed_output() -> None:
    """A program that is started with its output closed (``>&-``) has no stream to write to: what it says is dropped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (for as long as we run)


def _drop_output() -> None:
    """Let nothing else be written to a pipe that nobody reads, so that Python does not complain when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")


def _parsed(kind: Callable[..., T], args: Sequence[str], prog: str) -> T:
    """A command's options."""
    options = tyro.cli(kind, args=args, prog=prog)
    check_numbers(options)
    return options


def _recipes(args: Sequence[str]) -> None:
    """List the recipes with one line each."""
    from conadv.config import recipes

    tyro.cli(_no_arguments, args=args, prog="conadv recipes", description="List the recipes.")
    width = max(map(len, recipes.RECIPES))
    for name in recipes.RECIPES:
        _say(f"{name:<{width}}  {recipes.summary(name)}")


def _slurm(args: Sequence[str]) -> None:
    """Print the Slurm script that comes with the package."""
    about = "Print a Slurm script that trains an ImageNet recipe on several nodes. conadv slurm > job.sh, and read it."
    tyro.cli(_no_arguments, args=args, prog="conadv slurm", description=about)
    _say((files("conadv.config.recipes") / "slurm_imagenet.sh").read_text(encoding="utf-8"))


def _no_arguments() -> None:
    return None


def _train(args: Sequence[str]) -> None:
    from conadv.config import recipes

    base, prog, rest = _base_config(list(args), recipes.get)
    parsed = tyro.cli(
        TrainArgs,
        default=TrainArgs(base, RunOptions()),
        args=rest,
        prog=prog,
        description=recipes.RECIPES[base.recipe].__doc__
        if base.recipe in recipes.RECIPES
        else None,
    )
    check_numbers(parsed.run)
    config = resolve(override(base, _absolute(parsed.config), given_settings(rest)))
    if "model.name" in given_settings(rest):
        _trust(config.model.name)
    options = parsed.run
    out = options.out or _default_out(config)
    _set_threads(options.threads)
    keep_freed_memory()
    from conadv.distributed.comm import Comm
    from conadv.engine.execution import Execution
    from conadv.planning.micro_batch import settle
    from conadv.training.trainer import train

    execution = Execution(
        options.executor,
        options.attack_ranks,
        options.late,
        options.on_attack_loss,
        options.timeline_steps,
    )
    _check_dry_run(options)
    if options.dry_run:
        _dry_run(config, out, options, execution)
        return
    observer = _observer(config, options, out)
    comm = Comm.from_environment(options.device, options.comm_timeout)
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    try:
        config = settle(
            config,
            comm,
            out,
            attack_ranks=options.attack_ranks,
            goes_on=options.resume or options.auto_resume or restarted,
            tell=observer.message if comm.is_main else lambda line: None,
        )
        summary = train(
            config,
            out,
            resume=options.resume,
            overwrite=options.overwrite,
            auto_resume=options.auto_resume,
            restarted=restarted,
            observer=observer,
            comm=comm,
            execution=execution,
        )
    finally:
        comm.close()
    if comm.is_main and not options.quiet:
        _say(_result_line(summary))
        _say(f"run directory: {printable(out)}")


def _check_dry_run(options: RunOptions) -> None:
    """ConadvError for options that have no effect without others."""
    for name, needed in {
        "profile": "dry_run",
        "figure": "dry_run",
        "link_gbit": "profile",
        "latency_us": "profile",
    }.items():
        if getattr(options, name) is not None and not getattr(options, needed):
            option, other = (f"--{word.replace('_', '-')}" for word in (name, needed))
            raise ConadvError(
                f"{option} has no effect without {other}. Give it as well, or leave {option} out."
            )


def _dry_run(config: Config, out: Path, options: RunOptions, execution: Execution) -> None:
    """Everything up to the first step. Ranks: rank 0 speaks."""
    from conadv.cli.dry_run import draw, show
    from conadv.cli.progress import for_terminal
    from conadv.distributed.comm import Comm
    from conadv.planning.cost_model import Planner
    from conadv.planning.dry_run import preview
    from conadv.planning.micro_batch import settle
    from conadv.planning.profile import link_of, load

    observer = for_terminal(options.quiet)
    comm = Comm.from_environment(options.device, options.comm_timeout)
    link = options.link_gbit, options.latency_us
    try:
        with comm.agreed():
            planner = None
            if options.profile is not None:
                profile = load(options.profile)
                planner = Planner(profile, link_of(profile, *link), config.staleness or 1)
        goes_on = options.resume or options.auto_resume
        ranks = options.attack_ranks
        tell = observer.message if comm.is_main else lambda line: None
        config = settle(config, comm, out, attack_ranks=ranks, goes_on=goes_on, tell=tell)
        found = preview(
            config,
            out,
            comm=comm,
            execution=execution,
            observer=observer,
            planner=planner,
            link_given=link != (None, None),
            resume=options.resume,
            overwrite=options.overwrite,
            auto_resume=options.auto_resume,
        )
        with comm.agreed():
            if comm.is_main and options.figure is not None:
                draw(found, options.figure)
    finally:
        observer.finish()
        comm.close()
    if comm.is_main and not options.quiet:
        show(found, f"{config.recipe} {config.method}")


_ALIASES = {
    "data": "data.dir",
    "download": "data.download",
    "on_bad_image": "data.on_bad_image",
    "mixup": "data.mixup",
    "cutmix": "data.cutmix",
    "precise_bn": "eval.precise_bn_images",
    "augment": "data.augment",
    "aug_view": "data.aug_view",
    "model": "model.name",
    "optimizer": "optim.name",
    "lr": "optim.lr",
    "eps": "attack.eps",
}


def given_settings(args: Sequence[str]) -> set[str]:
    """The dotted names of the config settings that the options give, whatever their values."""
    options = [arg[2:].partition("=")[0].replace("-", "_") for arg in args if arg.startswith("--")]
    names = {
        ".".join((*head, tail.removeprefix("no_")))
        for *head, tail in (name.split(".") for name in options)
    }
    return {_ALIASES.get(name, name) for name in names} & flatten(Config().model_dump()).keys()


def _absolute(config: Config) -> Config:
    """The data folder as an absolute path: a run must find it from anywhere."""
    if config.data.dir is None:
        return config
    moved: Config = replace(config, data__dir=home(config.data.dir).absolute())
    return moved


def _base_config(args: list[str], get: Callable[[str], Config]) -> tuple[Config, str, list[str]]:
    """The config that options apply to: the recipe named first, or a saved file."""
    named = bool(args) and not args[0].startswith("-")
    for i, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name == "--config":
            path = value or (args[i + 1] if i + 1 < len(args) else "")
            if named:
                raise ConadvError(
                    f"Give a recipe ({args[0]}) or --config, not both: the file holds every setting."
                )
            if not path:
                raise ConadvError("--config needs a file, such as RUN/config.yaml.")
            rest = args[:i] + args[i + (1 if value else 2) :]
            # what a file from somebody else says must not make this machine write somewhere: --download is given anew
            base = replace(load_yaml(Path(path)), data__download=False)
            return base, f"conadv train --config {path}", rest
    if args and args[0] in ("-h", "--help"):
        return Config(), "conadv train RECIPE", args
    if not args or args[0].startswith("-"):
        raise ConadvError(
            "Name the recipe first: conadv train RECIPE [options]. `conadv recipes` lists them."
        )
    return get(args[0]), f"conadv train {args[0]}", args[1:]


def _trust(model: str | None) -> None:
    """A model module:function that was typed in this command may run its code; one in a config alone may not."""
    if model is not None:
        from conadv.models.own import trust

        trust(model)


def _default_out(config: Config) -> Path:
    """runs/RECIPE/METHOD...; the recipe's name may come from somebody's file, and must not lead out of runs."""
    if not re.fullmatch(r"\w[\w.-]{0,99}", config.recipe):
        raise ConadvError(
            f"The recipe's name {printable(config.recipe)[:100]!r} is no folder name. Give --out."
        )
    return Path("runs") / config.recipe / f"{_slug(config)}-seed{config.seed}"


def _slug(config: Config) -> str:
    """The run directory's default name."""
    method = config.method
    if method == "conadv":
        method += f"-tau{config.staleness}" + ("-lookahead" if config.lookahead else "")
    return f"{method}-{config.optim.name}-batch{config.global_batch_size}"


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    import torch

    torch.set_num_threads(threads)


def _observer(config: Config, options: RunOptions, out: Path) -> Observer:
    from conadv.cli.progress import for_terminal
    from conadv.training.loggers import TensorBoard, WandB
    from conadv.training.observer import Guarded
    from conadv.training.run_dir import RunDir

    run = RunDir(out)
    shown: list[Observer] = [for_terminal(options.quiet)]
    if options.tensorboard:
        shown.append(TensorBoard(run.tensorboard))
    if options.wandb:
        shown.append(WandB(run.wandb, config.model_dump(mode="json")))
    return Guarded(*shown)


def _result_line(summary: dict[str, object]) -> str:
    def percent(name: str) -> str:
        value = summary[name]
        return "-" if not isinstance(value, float) else f"{100 * value:.2f} %"

    return (
        f"test accuracy {percent('test_accuracy')}, under attack {percent('robust_accuracy')}, "
        f"train accuracy {percent('train_accuracy')}; {summary['steps']} steps in {summary['seconds']:.1f} s, "
        f"attack share {percent('attack_seconds_share')}"
    )


@dataclass
class EvalArgs:
    """Evaluate a run's newest checkpoint on its own data, clean and under PGD."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    best: bool = False
    """The checkpoint with the best validation accuracy instead (checkpoint.keep_best)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    """CPU threads that torch uses."""
    model: str | None = None
    """Only for a run whose model is code of yours: repeat its module:function, to say that it may run."""


def _eval(args: Sequence[str]) -> None:
    options = _parsed(EvalArgs, args, "conadv eval")
    _set_threads(options.threads)
    from conadv.training.run_dir import RunDir

    RunDir(options.run).open()
    _trust(options.model)
    from conadv.distributed.environment import pick_device
    from conadv.training.trainer import load_run, measure

    parts = load_run(options.run, pick_device(options.device), best=options.best)
    for name, result in measure(parts).items():
        if result is not None:
            _say(
                f"{name:<6}  accuracy {100 * result.accuracy:6.2f} %  loss {result.loss:.4f}  images {result.images}"
            )
    for bad in parts.data.bad.take(parts.engine.version - 1):
        _say(printable(f"left out, as it cannot be read: {bad['path']} ({bad['reason']})"))


@dataclass
class ExportArgs:
    """Write the clean route of a run for other programs: weights with a model card, or a program for any language."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    format: Literal["safetensors", "torch-export", "onnx"] = "safetensors"
    """model.safetensors, weights under the plain model's own names; model.pt2 (torch.export); or model.onnx."""
    best: bool = False
    """The checkpoint with the best validation accuracy instead (checkpoint.keep_best)."""
    model: str | None = None
    """Only for a run whose model is code of yours: repeat its module:function, to say that it may run."""


def _export(args: Sequence[str]) -> None:
    options = _parsed(ExportArgs, args, "conadv export")
    _trust(options.model)
    from conadv.training.export import export
    from conadv.training.run_dir import RunDir

    _say(printable(export(options.run, best=options.best, kind=options.format)))
    if options.format == "safetensors":
        _say(f"model card: {printable(RunDir(options.run).card)}")


@dataclass
class ReportArgs:
    """Write a report about runs, or about one sweep: report.html, report.md and summary.json."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, or folders that contain runs; or the folder of one sweep."""
    out: Path | None = None
    """The HTML file; the others lie beside it (default: runs/report.html; for a sweep, report.html in its folder)."""
    baseline: str | None = None
    """Label of the arm that differences refer to."""


def _report(args: Sequence[str]) -> None:
    options = _parsed(ReportArgs, args, "conadv report")
    if not options.runs:
        raise ConadvError("Name at least one run directory: conadv report RUN...")
    from conadv.report import is_sweep, show, show_study, write_report, write_sweep_report

    sweeps = [path for path in options.runs if is_sweep(path)]
    if sweeps and len(options.runs) > 1:
        raise ConadvError(f"{sweeps[0]} is a sweep, which has a report of its own: name it alone.")
    if sweeps:
        out = options.out or sweeps[0] / "report.html"
        show_study(write_sweep_report(sweeps[0], out, baseline=options.baseline))
    else:
        out = options.out or Path("runs/report.html")
        show(write_report(options.runs, out, baseline=options.baseline))
    _say(f"report: {printable(out)}")


def _analyze(args: Sequence[str]) -> None:
    from conadv.cli.analyze import AnalyzeArgs, command

    options = _parsed(AnalyzeArgs, args, "conadv analyze")
    _trust(options.model)
    _set_threads(options.threads)
    command(options)


def _timeline(args: Sequence[str]) -> None:
    from conadv.cli.timeline import TimelineArgs, command

    command(_parsed(TimelineArgs, args, "conadv timeline"))


def _staleness(args: Sequence[str]) -> None:
    from conadv.cli.staleness import StalenessArgs, command

    command(_parsed(StalenessArgs, args, "conadv staleness"))


def _plan(args: Sequence[str]) -> None:
    from conadv.cli.plan import PlanArgs, command

    command(_parsed(PlanArgs, args, "conadv plan"))


def _sweep(args: Sequence[str]) -> None:
    from conadv.cli.sweep import SweepArgs, sweep

    sweep(_parsed(SweepArgs, args, "conadv sweep"))


def _watch(args: Sequence[str]) -> None:
    from conadv.cli.watch import WatchArgs, watch

    watch(_parsed(WatchArgs, args, "conadv watch"))


def _doctor(args: Sequence[str]) -> int:
    from conadv.cli.doctor import DoctorArgs, doctor

    return 0 if doctor(_parsed(DoctorArgs, args, "conadv doctor")) else EXIT_FOUND


def _demo(args: Sequence[str]) -> None:
    from conadv.cli.demo import DemoArgs, demo

    demo(_parsed(DemoArgs, args, "conadv demo"))


def _bench(args: Sequence[str]) -> None:
    from conadv.cli import bench

    if not args or args[0] in ("-h", "--help"):
        _say(bench.overview())
        return
    if args[0] not in bench.BENCHES:
        raise unknown("benchmark", args[0], bench.BENCHES)
    kind, run, _ = bench.BENCHES[args[0]]
    options = _parsed(kind, args[1:], f"conadv bench {args[0]}")
    bench.prepare(options)
    run(options)


def _check(args: Sequence[str]) -> int:
    from conadv.cli.check import CheckArgs, command

    return 0 if command(_parsed(CheckArgs, args, "conadv check")) else EXIT_FOUND


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "recipes": _recipes,
    "slurm": _slurm,
    "train": _train,
    "eval": _eval,
    "analyze": _analyze,
    "export": _export,
    "report": _report,
    "timeline": _timeline,
    "staleness": _staleness,
    "plan": _plan,
    "sweep": _sweep,
    "watch": _watch,
    "doctor": _doctor,
    "demo": _demo,
    "bench": _bench,
    "check": _check,
}
