"""``conadv timeline RUN``: when every rank did what, as a trace, a picture and text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from conadv.cli.options import say
from conadv.errors import ConadvError, printable
from conadv.methods import METHODS
from conadv.safe_io import refuse_links, write_atomic
from conadv.training.record import BESIDE, read_lines
from conadv.training.run_dir import RunDir

if TYPE_CHECKING:
    from conadv.analysis.shares import Hidden
    from conadv.analysis.timeline import Timeline

TRACE, PICTURE = "trace.json", "timeline.png"
EXECUTORS = ("inline", "stream", "ranks")
EVEN = 0.05  # shares of ranks that lie within this are one share


@dataclass
class Args:
    """Show what ran beside what in a run: a trace, a picture, and the hidden shares."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    steps: str | None = None
    """The picture's steps as FIRST:END, END left out (default: 3 typical steps after the warm-up).
    """
    out: Path | None = None
    """Folder for trace.json and timeline.png (default: RUN/timeline)."""


def command(args: Args) -> None:
    """Write both files and print what they show. Raises ConadvError for a record without valid
    spans.
    """
    steps = None if args.steps is None else parse_steps(args.steps)
    record = RunDir(args.run).record
    if not record.is_file():
        raise ConadvError(f"{printable(args.run)} is not a run: it holds no {record.name}.")
    refuse_links(args.run)
    from conadv.analysis.timeline import timeline

    found = timeline(read_lines(record), printable(record))
    out = args.out or RunDir(args.run).timeline
    _write(found, steps, out)
    say("\n".join(text(found)))
    say(f"trace:   {printable(out / TRACE)} (open it at ui.perfetto.dev)")
    say(f"picture: {printable(out / PICTURE)}")


def _write(found: Timeline, steps: range | None, out: Path) -> None:
    from conadv.analysis.picture import picture, window
    from conadv.analysis.style import to_png
    from conadv.analysis.trace import trace

    image = to_png(picture(found, steps or window(found), title(found)), dpi=200)
    events = json.dumps(trace(found), separators=(",", ":"), allow_nan=False)
    out.mkdir(parents=True, exist_ok=True)
    (out / PICTURE).write_bytes(image)
    write_atomic(out / TRACE, events + "\n")


def parse_steps(value: str) -> range:
    """ "40:44" -> steps 40 to 43."""
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", value, re.ASCII)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConadvError(f"--steps {value} must be FIRST:END with FIRST < END, such as 40:44.")
    return range(int(match[1]), int(match[2]))


def title(found: Timeline) -> str:
    """Method, executor, ranks; of what the record says only names that this version knows."""
    method, executor = found.config.get("method"), found.execution.get("executor")
    known = [name for name in METHODS if name == method]
    known += [f"executor {name}" for name in EXECUTORS if name == executor]
    counts = {"learner": len(found.ranks("learner")), "attack rank": len(found.ranks("attack"))}
    ranks = [f"{n} {name}{'s' * (n > 1)}" for name, n in counts.items() if n]
    return ", ".join([*known, " + ".join(ranks)])


def text(found: Timeline) -> Iterator[str]:
    """The table of phases and the hidden shares in words, line by line."""
    from conadv.analysis.shares import hidden_attack, hidden_communication, summary

    part = "" if found.resumed is None else f", since the resume at step {found.resumed}"
    recorded = f"recorded: {found.steps.start} to {found.steps.stop - 1}{part}"
    yield title(found)
    yield f"steps {found.steady.start} to {found.steady.stop - 1} ({recorded})"
    yield ""
    yield f"{'role':<9}{'phase':<12}{'median ms':>10}{'share':>9}"
    for row in summary(found).itertuples():
        role, phase = row.Index
        beside = "   beside it" if phase in BESIDE else ""
        yield f"{role:<9}{phase:<12}{_ms(row.median):>10}{_percent(row.share):>9}{beside}"
    yield ""
    yield _hidden("Communication", hidden_communication(found))
    if _missing(found, "learners", "learner"):
        yield "Learners are missing in the record: waiting for them counts as communication."
    if _missing(found, "attack_ranks", "attack"):
        yield "Attack: unknown. Attack ranks write their spans when training ends."
    else:
        yield _hidden("Attack", hidden_attack(found))
    if late := sum(step in found.late for step in found.steady):
        count = f"{late} of {len(found.steady)} steps"
        yield f"{count} went without adversarial images, which came too late."


def _missing(found: Timeline, setting: str, role: str) -> bool:
    expected = found.execution.get(setting)
    return isinstance(expected, int) and expected > len(found.ranks(role))


def _hidden(name: str, hidden: Hidden | None) -> str:
    if hidden is None:
        return f"{name}: none."
    beside = ", ".join(f"{_ms(value)} ms beside {work}" for work, value in hidden.beside.items())
    shares = hidden.by_rank.values() or [0.0]
    low, high = min(shares), max(shares)
    spread = f" (by learner: {_percent(low)} to {_percent(high)})" if high - low > EVEN else ""
    text = f"{name}: {_percent(hidden.share)} hidden{spread}. {_ms(hidden.seconds)} ms per step, "
    text += f"{beside}, {_ms(hidden.exposed)} ms exposed."
    if hidden.delay > 1e-5:
        text += f" Only slower learners were missing for {_ms(hidden.delay)} ms."
    return text


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
