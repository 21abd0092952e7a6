"""``conadv analyze RUN...``: sharpness, Hessian and robust accuracy of trained models."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from conadv import __version__
from conadv.analysis.options import Options
from conadv.cli.options import say, trust
from conadv.errors import ConadvError, printable
from conadv.safe_io import read_document, write_atomic
from conadv.training.documents import Analysis
from conadv.training.run_dir import RunDir

_COLUMNS: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "loss": (".3g", ("loss",)),
    "acc. %": (".2%", ("accuracy",)),
    "top eig.": (".4g", ("hessian", "eigenvalues", 0)),
    "trace": (".4g", ("hessian", "trace")),
    "± s.e.": (".2g", ("hessian", "trace_stderr")),
    "SAM": (".4g", ("sharpness", "sam", "value")),
    "Keskar %": (".4g", ("sharpness", "keskar", "value")),
    "PGD %": (".2%", ("robust", "accuracy")),
}


class Written(Analysis):
    """analysis.json with what says whether it need not be computed again."""

    version: str | None = None
    newest_step: int | None = None
    at_loss: float | None = None
    options: dict[str, Any]


@dataclass
class Args:
    """Write RUN/analysis.json: Hessian, sharpness and robust accuracy.

    All of the clean route. Runs that have the same analysis already are skipped.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories with a checkpoint."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    data: Path | None = None
    """Where the data of these runs lie now, if they have moved."""
    at_loss: float | None = None
    """Analyse the kept checkpoint whose training loss is nearest to this, not the newest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    """CPU threads that torch uses."""
    overwrite: bool = False
    """Compute again, and replace an analysis with other options."""
    model: str | None = None
    """Only for runs whose model is code of yours: repeat its module:function, to say that it may
    run.
    """


def command(args: Args) -> None:
    """Analyse every run in turn and show all as one table.

    Raises ConadvError before any computation for a folder that is not a run or has no checkpoint,
    and for an analysis with other options that only --overwrite may replace.
    """
    if not args.runs:
        raise ConadvError("Name at least one run directory: conadv analyze RUN...")
    trust(args.model)
    settings = {path: _settings(path, args) for path in args.runs}
    todo = [path for path in settings if not _done(path, settings[path], args.overwrite)]
    from rich.console import Console

    from conadv.cli.tables import fitted

    for path in todo:
        _write(path, settings[path], args)
    console = Console(highlight=False)
    console.print(fitted([row(path, read(path)) for path in settings], console, ["run"]))
    for path in settings:
        state = "written" if path in todo else "had it already"
        say(f"{printable(RunDir(path).analysis_file)}: {state}")


def _settings(path: Path, args: Args) -> dict[str, Any]:
    """What an analysis that need not be repeated agrees in."""
    from conadv.training.checkpoint import steps

    run = RunDir(path)
    run.open()
    found = steps(run.checkpoints)
    if not found:
        raise run.without_weights()
    what = {"version": __version__, "newest_step": found[-1], "at_loss": args.at_loss}
    return what | {"options": asdict(args.options)}


def _done(path: Path, now: dict[str, Any], overwrite: bool) -> bool:
    """Whether the run has this analysis. Another one is an error, unless it may be overwritten."""
    if overwrite or not RunDir(path).analysis_file.exists():
        return False
    found = read(path)
    old, new = {**found.model_dump(), **found.options}, {**now, **now["options"]}
    del new["options"]
    changed = [f"{key}: {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key]]
    if changed:
        raise ConadvError(
            f"{printable(path)} has another analysis ({'; '.join(changed)}). "
            "Add --overwrite to replace it."
        )
    return True


def read(path: Path) -> Written:
    """RUN/analysis.json. Raises ConadvError where it cannot be read."""
    remedy = "Replace it with: conadv analyze RUN --overwrite"
    return read_document(Written, RunDir(path).analysis_file, remedy)


def _write(path: Path, settings: dict[str, Any], args: Args) -> None:
    """Compute, then write analysis.json."""
    from conadv.analysis.equal_loss import step_at_loss
    from conadv.analysis.model import analyze
    from conadv.distributed.environment import pick_device
    from conadv.training.allocator import keep_freed_memory
    from conadv.training.resume import load_run

    keep_freed_memory()
    device, step = pick_device(args.device), None
    if args.at_loss is not None:
        step = step_at_loss(path, args.at_loss, args.options.images, device, args.data)
    parts = load_run(path, device, step=step, data=args.data)
    found = {**settings, "step": parts.step.version, "split": "train"}
    shown = printable(path)
    what = parts.model, parts.data, parts.space, parts.config, args.options
    found |= analyze(*what, lambda part: say(f"{shown}: {part}"))
    write_atomic(RunDir(path).analysis_file, json.dumps(found, indent=2, allow_nan=False) + "\n")


def row(path: Path, found: Written) -> dict[str, str]:
    """A run's row of the table. A dash for what was left out or is not finite."""
    cells = {"run": str(path)}
    for column, (form, keys) in _COLUMNS.items():
        value: Any = found.model_dump()
        for key in keys:
            value = None if not value else value[key]
        cells[column] = "–" if value is None else f"{value:{form}}".rstrip("%")
    return cells
