"""``conadv timeline RUN``: when every rank did what, as a trace, a picture and a few lines of text."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from conadv.analysis.shares import Hidden, StepRow, hidden_attack, hidden_communication, summary
from conadv.analysis.timeline import Timeline, timeline
from conadv.analysis.trace import trace
from conadv.errors import ConadvError, printable
from conadv.methods import METHODS
from conadv.safe_io import refuse_links
from conadv.training.record import BESIDE, read_lines, write_atomic
from conadv.training.run_dir import RunDir

TRACE, PICTURE = "trace.json", "timeline.png"
EXECUTORS = ("inline", "stream", "ranks")
NEGLIGIBLE = 1e-3  # of a step: an attack phase in which nothing was attacked
EVEN = 0.05  # shares of ranks that lie within this are one share


@dataclass
class TimelineArgs:
    """Show what ran beside what in a run: a trace for ui.perfetto.dev, a picture, and the hidden shares."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    steps: str | None = None
    """The picture's steps as FIRST:END, END left out (default: 4 typical steps after the warm-up)."""
    out: Path | None = None
    """Folder for trace.json and timeline.png (default: RUN/timeline)."""


def command(args: TimelineArgs) -> None:
    """Write both files and say what they show. Raises ConadvError where the record has no spans, or bad ones."""
    steps = None if args.steps is None else parse_steps(args.steps)
    record = RunDir(args.run).record
    if not record.is_file():
        raise ConadvError(f"{printable(args.run)} is not a run: it holds no {record.name}.")
    refuse_links(args.run)
    found = timeline(read_lines(record), str(record))
    out = args.out or RunDir(args.run).timeline
    _write(found, steps, out)
    for line in text(found):
        sys.stdout.write(line + "\n")
    sys.stdout.write(
        f"trace:   {printable(out / TRACE)} (open it at ui.perfetto.dev)\npicture: {printable(out / PICTURE)}\n"
    )


def _write(found: Timeline, steps: range | None, out: Path) -> None:
    from conadv.analysis.picture import picture, to_png, window  # only this needs matplotlib

    image = to_png(picture(found, steps or window(found), title(found)))
    events = json.dumps(trace(found), separators=(",", ":"), allow_nan=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PICTURE).write_bytes(image)
        write_atomic(out / TRACE, events + "\n")
    except OSError as error:
        raise ConadvError(
            f"Cannot write into {printable(out)}: {error}. Choose another --out."
        ) from error


def parse_steps(value: str) -> range:
    """ "40:44" -> steps 40 to 43."""
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", value, re.ASCII)
    if match is None or int(match[1]) >= int(match[2]):
        raise ConadvError(
            f"--steps {value} must be FIRST:END with FIRST < END, such as 40:44 for steps 40 to 43."
        )
    return range(int(match[1]), int(match[2]))


def title(found: Timeline) -> str:
    """The method, the executor and who takes part. Only words that this version knows: a record may hold anything."""
    method, executor = found.setting("config", "method"), found.setting("execution", "executor")
    known = (
        [method] if method in list(METHODS) else []
    )  # a list: what is asked for may be unhashable
    known += [f"executor {executor}"] if executor in EXECUTORS else []
    roles = [
        _count(found, role, name)
        for role, name in (("learner", "learner"), ("attack", "attack rank"))
    ]
    return ", ".join([*known, " + ".join(filter(None, roles))])


def _count(found: Timeline, role: str, name: str) -> str:
    count = len(found.of(role))
    return f"{count} {name}{'s' if count > 1 else ''}" if count else ""


def text(found: Timeline) -> Iterator[str]:
    """The table of phases and the hidden shares in words, line by line."""
    all_steps, steady, rows = found.steps, found.steady, summary(found)
    part = "" if found.resumed is None else f", the part since the resume at step {found.resumed}"
    yield title(found)
    yield f"steps {steady.start} to {steady.stop - 1} (recorded: {all_steps.start} to {all_steps.stop - 1}{part})"
    yield ""
    yield f"{'role':<9}{'phase':<12}{'median ms':>10}{'share':>9}"
    for row in rows:
        yield from _table(row)
    yield ""
    yield _communication_text(found)
    yield from _attack_text(found, rows)


def _table(row: StepRow) -> Iterator[str]:
    """The step's own phases, the step, and what the network did beside it."""
    own = [phase for phase in row.phases if phase.phase not in BESIDE]
    for phase in own:
        yield f"{row.role:<9}{phase.phase:<12}{_ms(phase.median):>10}{_percent(phase.share):>9}"
    yield f"{row.role:<9}{'step':<12}{_ms(row.median):>10}{'':>9}   and {_ms(row.between)} to the next one"
    for phase in row.phases:
        if phase not in own:
            yield f"{row.role:<9}{phase.phase:<12}{_ms(phase.median):>10}{_percent(phase.share):>9}   beside it"


def _communication_text(found: Timeline) -> str:
    hidden, learners = hidden_communication(found), found.setting("execution", "learners")
    if hidden is None:
        return "Communication: none; no gradients were on a network."
    missing = isinstance(learners, int) and learners > len(found.of("learner"))
    return (
        f"Communication: {_percent(hidden.share)} hidden. Gradients were on the network for {_ms(hidden.seconds)} ms "
        f"of a step, {_ms(hidden.exposed)} ms of it while the learner did nothing else{_range(hidden)}. "
        f"For slower learners it waited {_ms(hidden.delay)} ms."
        + (
            " Learners are missing in the record, so that all waiting for them counts as network."
            if missing
            else ""
        )
    )


def _attack_text(found: Timeline, rows: Sequence[StepRow]) -> Iterator[str]:
    hidden = hidden_attack(found)
    expected = found.setting("execution", "attack_ranks")
    if isinstance(expected, int) and expected > len(found.of("attack")):
        yield "Attack: unknown. The record lacks spans of attack ranks; they are written when training ends."
    elif hidden is None or hidden.seconds < NEGLIGIBLE * rows[0].median:
        yield "Attack: none."
    elif found.of("attack"):
        yield from _attack_ranks_text(found, hidden)
    else:
        yield _own_attack_text(hidden)


def _own_attack_text(hidden: Hidden) -> str:
    gradient = hidden.beside["gradient"]
    stream = f" and {_ms(gradient)} ms beside the gradient on the same device, where each may slow the other"
    late = f", {_ms(hidden.delay)} ms of it while slower learners were still at their gradients"
    return (
        f"Attack: {_percent(hidden.share)} hidden. Of {_ms(hidden.seconds)} ms per step, "
        f"{_ms(hidden.beside['network'])} ms were beside gradients on the network{stream if gradient else ''}; "
        f"{_ms(hidden.exposed)} ms were exposed{_range(hidden)}{late if hidden.delay > 0.01 * hidden.seconds else ''}."
    )


def _attack_ranks_text(found: Timeline, hidden: Hidden) -> Iterator[str]:
    yield (
        f"Attack: {_percent(hidden.share)} hidden. An attack rank attacked for {_ms(hidden.seconds)} ms per step, and "
        f"a learner spent {_ms(hidden.exposed)} ms on it: on sending weights and on waiting for images{_range(hidden)}."
    )
    late = sum(step in found.late for step in found.steady)
    if late:
        yield f"{late} of {len(found.steady)} steps went without adversarial images, which came too late."


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(hidden: Hidden) -> str:
    """The learners' own shares where they differ."""
    low, high = min(hidden.by_rank.values(), default=0.0), max(hidden.by_rank.values(), default=0.0)
    return f" (by learner: {_percent(low)} to {_percent(high)})" if high - low > EVEN else ""
