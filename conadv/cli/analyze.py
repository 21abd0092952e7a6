"""``conadv analyze RUN...``: sharpness, Hessian, landscape and robust accuracy of trained models."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from conadv import __version__
from conadv.analysis.options import Options
from conadv.analysis.watch import Watch
from conadv.errors import ConadvError, printable
from conadv.safe_io import JSON_BYTES, checked, parse_json, read_text
from conadv.training.documents import Analysis
from conadv.training.record import write_atomic
from conadv.training.run_dir import RunDir

if TYPE_CHECKING:
    from rich.table import Table

    from conadv.training.trainer import Parts

NONE = "–"
_SHOWN = {"options", "loss", "accuracy", "hessian", "sharpness", "robust"}
LINE, PLANE = "landscape_1d.png", "landscape_2d.png"


@dataclass
class AnalyzeArgs:
    """Write RUN/analysis.json and pictures: Hessian, sharpness, loss landscape and robust accuracy on the clean route.

    Runs that have the same analysis already are skipped.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories with a checkpoint."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    at_loss: float | None = None
    """Analyse the kept checkpoint whose training loss is nearest to this, not the newest: flatness at equal loss."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    """CPU threads that torch uses."""
    overwrite: bool = False
    """Compute again, and replace an analysis with other options."""
    model: str | None = None
    """Only for runs whose model is code of yours: repeat its module:function, to say that it may run."""


def command(args: AnalyzeArgs) -> None:
    """Analyse every run in turn and show all as one table.

    Raises ConadvError before any computation for a folder that is no run or has no checkpoint, and for an analysis
    with other options that --overwrite would have to allow to be replaced; and, when its turn comes, for a run without
    a checkpoint near --at-loss.
    """
    if not args.runs:
        raise ConadvError("Name at least one run directory: conadv analyze RUN...")
    if args.at_loss is not None and not 0 < args.at_loss < float("inf"):
        raise ConadvError(f"--at-loss {args.at_loss} must be a number above 0.")
    settings = {path: _settings(args.options, _newest(path), args.at_loss) for path in args.runs}
    todo = [path for path in settings if not _done(path, settings[path], args.overwrite)]
    from rich.console import Console

    from conadv.analysis.equal_loss import step_at_loss
    from conadv.distributed.environment import pick_device
    from conadv.training.allocator import keep_freed_memory
    from conadv.training.trainer import load_run

    keep_freed_memory()
    device = pick_device(args.device)
    for path in todo:
        step = (
            None
            if args.at_loss is None
            else step_at_loss(path, args.at_loss, args.options.images, device)
        )
        parts, watch = load_run(path, device, step=step), _Progress(path)
        try:
            _write(path, parts, settings[path], args.options, watch)
        finally:
            watch.close()
    Console(highlight=False).print(table([(path, read(path)) for path in settings]))
    for path in settings:
        state = "written" if path in todo else "had it already"
        sys.stdout.write(f"{printable(RunDir(path).analysis_file)}: {state}\n")


def _newest(path: Path) -> int:
    """The step of the run's newest checkpoint."""
    from conadv.training.checkpoint import steps

    RunDir(path).open()
    found = steps(RunDir(path).checkpoints)
    if not found:
        raise RunDir(path).without_weights()
    return found[-1]


def _settings(options: Options, newest: int, at_loss: float | None) -> dict[str, Any]:
    return {
        "version": __version__,
        "newest_step": newest,
        "at_loss": at_loss,
        "options": asdict(options),
    }


def _done(path: Path, now: dict[str, Any], overwrite: bool) -> bool:
    """Whether the run has this very analysis. Another one is an error unless it may be overwritten."""
    if overwrite or not RunDir(path).analysis_file.exists():
        return False
    before = read(path)
    plain = [key for key in now if key != "options"]
    changed = [
        f"{key}: {before.get(key)} -> {now[key]}" for key in plain if before.get(key) != now[key]
    ]
    old = before["options"]
    changed += [
        f"{key}: {old.get(key)} -> {value}"
        for key, value in now["options"].items()
        if old.get(key) != value
    ]
    if changed:
        raise ConadvError(
            f"{printable(path)} has another analysis ({'; '.join(changed)}). Add --overwrite to replace it."
        )
    return True


def read(path: Path) -> dict[str, Any]:
    """RUN/analysis.json. Raises ConadvError where it cannot be read."""
    file = RunDir(path).analysis_file
    try:
        found = parse_json(read_text(file, JSON_BYTES))
    except (OSError, ValueError) as error:
        raise ConadvError(
            f"Cannot read {printable(file)}: {error}. Compute it with: conadv analyze RUN --overwrite"
        ) from error
    if (
        not isinstance(found, dict)
        or not found.keys() >= _SHOWN
        or not isinstance(found["options"], dict)
    ):
        raise ConadvError(
            f"{printable(file)} is not an analysis. Replace it with: conadv analyze RUN --overwrite"
        )
    checked(Analysis, found, file, "Replace it with: conadv analyze RUN --overwrite")
    return found


def _write(
    path: Path, parts: Parts, settings: dict[str, Any], options: Options, watch: Watch
) -> None:
    """Compute, then write pictures and, last, analysis.json: a run with that file has everything."""
    from conadv.analysis.model import analyze

    found = {
        **settings,
        "step": parts.engine.version,
        "split": "train",
        **analyze(parts, options, watch),
    }
    pictures = _pictures(found, f"{parts.config.method}, {path.name}")
    run = RunDir(path)
    try:
        run.analysis.mkdir(exist_ok=True)
        for name in (LINE, PLANE):
            (run.analysis / name).unlink(missing_ok=True)
        for name, image in pictures.items():
            (run.analysis / name).write_bytes(image)
        write_atomic(run.analysis_file, json.dumps(found, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise ConadvError(f"Cannot write into {printable(path)}: {error}.") from error


def _pictures(found: dict[str, Any], title: str) -> dict[str, bytes]:
    if found["landscape_1d"] is None:
        return {}
    from conadv.analysis.surface import line_figure, plane_figure, to_png

    pictures = {LINE: to_png(line_figure(found["landscape_1d"], title))}
    if found["landscape_2d"] is not None:
        pictures[PLANE] = to_png(plane_figure(found["landscape_2d"], title))
    return pictures


class _Progress(Watch):
    """A bar with the time left on a terminal; elsewhere a line for each part."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._began, self._said = path, time.monotonic(), ""
        self._bar: Any = None
        self._task: Any = None

    def begin(self, total: float) -> None:
        super().begin(total)
        if sys.stdout.isatty():
            from rich.progress import (
                BarColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            left = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), *left
            )
            self._task = self._bar.add_task(printable(self._path), total=total)
            self._bar.start()

    def tick(self, work: float) -> None:
        super().tick(work)
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self.done, description=f"{printable(self._path)}: {self.part}"
            )
        elif self.part != self._said:
            self._said = self.part
            sys.stdout.write(f"{printable(self._path)}: {self.part}{self._left()}\n")
            sys.stdout.flush()

    def _left(self) -> str:
        if not self.done:
            return ""
        spent = time.monotonic() - self._began
        return f", {100 * self.done / self.total:.0f} % done, left {spent * (self.total / self.done - 1):.0f} s"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


COLUMNS = ("run", "loss", "acc. %", "top eig.", "trace", "SAM", "Keskar %", "PGD %")


def table(analyses: list[tuple[Path, dict[str, Any]]]) -> Table:
    """One row per run: its folder and analysis.json. A dash for what was switched off or is not finite."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        left = column == "run"
        made.add_column(
            column, justify="left" if left else "right", overflow="fold", no_wrap=not left
        )
    unique = len({path.name for path, _ in analyses}) == len(analyses)
    for path, found in analyses:
        made.add_row(
            *(
                Text(printable(cell))
                for cell in (path.name if unique else str(path), *_cells(found))
            )
        )
    return made


def _cells(found: dict[str, Any]) -> tuple[str, ...]:
    hessian, sharpness = found["hessian"] or {}, found["sharpness"] or {}
    largest = hessian.get("eigenvalues") or [None]
    error = hessian.get("trace_stderr")
    return (
        _number(found["loss"], ".3g"),
        _number(found["accuracy"], ".2f", 100),
        _number(largest[0]),
        _number(hessian.get("trace")) + (f" ± {error:.2g}" if error is not None else ""),
        _number((sharpness.get("sam") or {}).get("value")),
        _number((sharpness.get("keskar") or {}).get("value")),
        _number((found["robust"] or {}).get("accuracy"), ".2f", 100),
    )


def _number(value: float | None, form: str = ".4g", factor: float = 1) -> str:
    return NONE if value is None else f"{factor * value:{form}}"
