"""A preview on the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conadv.errors import printable
from conadv.preflight import picture
from conadv.preflight.dryrun import DataFound, Preview, hours
from conadv.preflight.estimate import Group, gib

HEIGHT = 8
PATTERNS = 3


def show(shown: Preview, console: Console | None = None) -> None:
    """Write a preview to ``console`` (standard output by default); fits into 80 columns."""
    console = console or Console(highlight=False)
    console.print(Text(printable(f"{shown.title}: dry run"), style="bold"))
    for line in shown.lines:
        console.print(printable(line), markup=False)
    width = min(console.width, 100) - 1
    ascii_only = not (console.encoding or "").lower().startswith("utf")
    for name, curve in shown.curves:
        label = f"{name} over {shown.cost.steps} steps ({shown.cost.epochs:.4g} epochs)"
        console.print()
        for line in picture.plot(
            curve, shown.cost.steps, width, HEIGHT, label, ascii_only=ascii_only
        ):
            console.print(line, markup=False, no_wrap=True, overflow="crop")
    console.print(group_table(shown.groups))
    console.print(needs_table(shown))
    for line in _notes(shown):
        console.print(printable(f"- {line}"), markup=False)
    console.print(
        Text(
            "ready: nothing has been trained, and nothing written into the run directory",
            style="bold",
        )
    )


def group_table(groups: tuple[Group, ...]) -> Table:
    """One line per parameter group, the names of its parameters below each other."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, header_style="bold")
    for name in ("group", "names (* is a number)"):
        table.add_column(name, overflow="fold")
    for name in ("tensors", "parameters", "weight\ndecay"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("trust\nratio", no_wrap=True)
    table.add_column("routes", overflow="fold")
    for group in groups:
        table.add_row(
            Text(group.name),
            Text(_patterns(group.patterns)),
            f"{group.tensors:,}",
            f"{group.parameters:,}",
            f"{group.weight_decay:g}",
            "yes" if group.adapted else "no",
            Text(", ".join(group.routes) or "-"),
        )
    return table


def _patterns(patterns: tuple[str, ...]) -> str:
    more = len(patterns) - PATTERNS
    return "\n".join([*patterns[:PATTERNS], *([f"and {more} more"] if more > 0 else [])])


def needs_table(shown: Preview) -> Table:
    """What is needed, beside what is there."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    free = "not known" if shown.memory_free is None else gib(shown.memory_free)
    memory = f"a step needs at least {gib(shown.memory_needed)}; {free} free on {shown.device}"
    one, files = gib(shown.disk.checkpoint), shown.disk.files
    waiting = f", {gib(shown.disk.waiting)} of it images that wait" if shown.disk.waiting else ""
    disk = f"{files} checkpoint{'s' * (files > 1)} of about {one}{waiting}; {gib(shown.disk.free)} free"
    cost = shown.cost
    images = f"{cost.steps:,} steps, {cost.total:.4g} gradient images ({cost.per_clean_image:.3f} per clean image)"
    left = cost.steps - shown.first_step
    time = f"about {hours(shown.time.step * left)}: {left:,} steps of {shown.time.step:.3g} s, {shown.time.source}"
    for name, text in (
        ("data", _data(shown.data)),
        ("memory", memory),
        ("disk", disk),
        ("cost", images),
    ):
        table.add_row(name, Text(text))
    table.add_row("time", Text(time))
    if shown.first_step:
        table.add_row("resume", Text(f"would go on from step {shown.first_step}"))
    return table


def _data(data: DataFound) -> str:
    held = f", {data.validation:,} held out" if data.validation is not None else ""
    sampled = f"; {data.sampled:,} files read, {len(data.bad)} bad" if data.sampled else ""
    size = f"{data.channels} x {data.image_size} x {data.image_size}"
    return f"{data.train:,} training{held} and {data.test:,} test images, {data.classes} classes, {size}{sampled}"


def _notes(shown: Preview) -> list[str]:
    notes = [
        "time: training steps only, evaluation and checkpoints come on top; "
        + "; ".join(shown.time.notes)
    ]
    if shown.data.bad:
        more = f" (and {len(shown.data.bad) - 1} more)" if len(shown.data.bad) > 1 else ""
        notes.append(f"left out, as it cannot be read: {shown.data.bad[0]}{more}")
    return notes
