"""One frame of one run. Everything that comes from a file is put in as plain text, never as markup."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from conadv.preflight.picture import bars
from conadv.watch.state import State, text

COLOURS = {"running": "green", "waiting": "cyan", "silent": "yellow", "finished": "bold green"}
SILENT_SECONDS = 30.0
CURVE_HEIGHT = 3


@dataclass(frozen=True)
class Shown:
    """What a frame is about beside the record. ``age``: seconds since the record grew, None without a record."""

    name: str
    state: State
    age: float | None
    finished: bool
    broken: int = 0


def status(shown: Shown) -> str:
    """ "finished", "failed", "stopped", "waiting" (for the first step), "silent" or "running"."""
    state = shown.state
    if shown.finished:
        return "finished"
    if state.ended is not None:
        return state.ended
    if shown.age is not None and shown.age > max(
        SILENT_SECONDS, 10 * (state.step_seconds() or 0.0)
    ):
        return "silent"
    return "running" if state.last is not None else "waiting"


def frame(shown: Shown, width: int, height: int, *, ascii_only: bool = False) -> RenderableType:
    """Everything about a run within ``width`` x ``height`` characters; from 80 x 24 on nothing is cut but events."""
    state = shown.state
    warnings = list(_warnings(shown))
    parts: list[RenderableType] = [_head(shown), _progress(state, width)]
    if state.last is not None:
        parts += [Text(), _numbers(state), Text(), *_curve(state, width, ascii_only)]
        parts.append(_phases(state, width, ascii_only))
    used = 2 + (
        0
        if state.last is None
        else 2 + len(_rows(state)) + CURVE_HEIGHT + len(state.phase_shares())
    )
    parts += [_line(f"! {warning}", "yellow") for warning in warnings]
    room = max(1, height - used - len(warnings) - 1)
    parts += [_line(f"  {event}", "dim") for event in list(state.events)[-room:]]
    return Group(*parts)


def _line(content: str, style: str = "") -> Text:
    return Text(content, style=style, no_wrap=True, overflow="ellipsis")


def _head(shown: Shown) -> Text:
    config: Any = shown.state.header.get("config")
    config = config if isinstance(config, dict) else {}
    now = status(shown)
    silent = (
        f", nothing new for {shown.age:.0f} s" if now == "silent" and shown.age is not None else ""
    )
    what = " ".join(text(config[key], 30) for key in ("recipe", "method") if key in config)
    ranks = text(shown.state.header.get("ranks", 1), 8)
    seed = text(config.get("seed", "-"), 20)
    head = _line("")
    head.append(text(shown.name, 60), style="bold")
    head.append(f"  {what}  seed {seed}  ranks {ranks}  ")
    head.append(now + silent, style=COLOURS.get(now, "bold red"))
    return head


def _progress(state: State, width: int) -> RenderableType:
    total, done = max(state.total, state.done), state.done
    left = state.seconds_left() if done < total else None
    epoch = "" if state.last is None else f" epoch {state.last.epoch}"
    share = f" {100 * done / total:3.0f} %" if total else ""
    words = f"step {done}/{total or '?'}{share}{epoch}" + (
        "" if left is None else f"  left {duration(left)}"
    )
    table = Table.grid(padding=(0, 1))
    table.add_column(width=max(10, width - len(words) - 2))
    table.add_column(no_wrap=True)
    table.add_row(ProgressBar(total=max(total, 1), completed=done), Text(words))
    return table


def duration(seconds: float) -> str:
    """h:mm:ss, or days and hours."""
    whole = round(seconds)
    if whole >= 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _rows(state: State) -> list[tuple[str, str]]:
    last = state.last
    assert last is not None
    views = "  ".join(f"{name} {_number(value)}" for name, value in last.losses.items())
    stale = "" if last.staleness is None else f"  staleness {last.staleness:g}"
    seconds = state.step_seconds()
    step = (
        "-"
        if seconds is None
        else f"{1000 * seconds:.4g} ms"
        if seconds < 1
        else f"{seconds:.4g} s"
    )
    batch = state.header.get("config", {}) if isinstance(state.header.get("config"), dict) else {}
    images = batch.get("global_batch_size")
    rate = f"  {images / seconds:,.0f} images/s" if isinstance(images, int) and seconds else ""
    rows = [
        ("loss", f"{_number(last.loss)}  ({views})" if views else _number(last.loss)),
        ("lr", f"{_number(last.lr)}  gradient norm {_number(last.grad_norm)}{stale}"),
        ("step time", f"{step}{rate}"),
    ]
    return [*rows, ("accuracy", _accuracies(state))] if state.evals else rows


def _accuracies(state: State) -> str:
    found = []
    for split, (step, accuracy, _) in list(state.evals.items())[:6]:
        best = state.best.get(split)
        more = (
            f", best {100 * best:.2f}"
            if accuracy is not None and best is not None and best > accuracy
            else ""
        )
        shown = "-" if accuracy is None else f"{100 * accuracy:.2f} %"
        found.append(f"{split} {shown} (step {step}{more})")
    return "  ".join(found)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _numbers(state: State) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for name, value in _rows(state):
        table.add_row(name, Text(value, no_wrap=True, overflow="ellipsis"))
    return table


def _curve(state: State, width: int, ascii_only: bool) -> Iterator[Text]:
    """The loss from the first step to now."""
    columns = max(10, width - 12)
    losses = _squeezed(state.losses, columns)
    if not losses:
        return
    marks = [f"{max(losses):.3g}", *[""] * (CURVE_HEIGHT - 2), "loss"]
    for mark, line in zip(marks, bars(losses, CURVE_HEIGHT, ascii_only=ascii_only), strict=True):
        yield _line(f"{mark:>9}  {line}")


def _squeezed(values: Sequence[float], columns: int) -> list[float]:
    """At most ``columns`` means of neighbours."""
    if len(values) <= columns:
        return list(values)
    edges = [len(values) * i // columns for i in range(columns + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _phases(state: State, width: int, ascii_only: bool) -> Table:
    """Shares of the phases of the recent steps."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, justify="right", min_width=9)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True)
    block = "#" if ascii_only else "█"
    for name, share in state.phase_shares().items():
        table.add_row(Text(name), f"{100 * share:.1f} %", block * round(share * (width - 20)))
    return table


def _warnings(shown: Shown) -> Iterator[str]:
    yield from shown.state.warnings()
    if shown.broken:
        yield f"{shown.broken} line(s) of the record cannot be read"
    if status(shown) == "silent":
        yield "the record does not grow: an evaluation may be under way, or the process is gone"
