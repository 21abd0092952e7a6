"""``conadv train ... --dry-run``: a preview on the terminal, and the schedule as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conadv.cli.format import duration, plot
from conadv.errors import printable
from conadv.planning.dry_run import Preview
from conadv.planning.memory import gib

HEIGHT = 8


def show(shown: Preview, title: str, console: Console | None = None) -> None:
    """Write a preview to ``console`` (standard output by default); fits into 80 columns."""
    console = console or Console(highlight=False)
    console.print(Text(printable(f"{title}: dry run"), style="bold"))
    for line in shown.overview:
        console.print(printable(line), markup=False)
    epochs = shown.steps / shown.steps_per_epoch
    console.print(f"\nlearning rate over {shown.steps} steps ({epochs:.4g} epochs)")
    ascii_only = not (console.encoding or "").lower().startswith("utf")
    width = min(console.width, 100) - 1
    for line in plot(shown.schedule, shown.steps, width, HEIGHT, ascii_only=ascii_only):
        console.print(line, markup=False, no_wrap=True, overflow="crop")
    console.print(_groups(shown))
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _needs(shown).items():
        table.add_row(name, Text(text))
    console.print(table)
    notes = "; ".join(shown.time.notes)
    console.print(f"- time: evaluation and checkpoints come on top; {notes}", markup=False)
    console.print(
        "ready: nothing has been trained, and nothing written into the run directory", style="bold"
    )


def _groups(shown: Preview) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold")
    for name in ("group", "tensors", "parameters", "weight decay", "trust ratio"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for group in shown.groups:
        numbers = f"{group['tensors']:,}", f"{group['parameters']:,}", f"{group['weight_decay']:g}"
        table.add_row(group["name"], *numbers, "yes" if group["adapt"] else "no")
    return table


def _needs(shown: Preview) -> dict[str, str]:
    """What is needed, beside what is there."""
    images = ", ".join(f"{count:,} {name}" for name, count in shown.images.items() if count)
    files = (
        f"; {shown.files_read:,} files read, {len(shown.bad_files)} bad" if shown.files_read else ""
    )
    free = "not known" if shown.memory_free is None else gib(shown.memory_free)
    waiting = f", {gib(shown.waiting)} of it images that wait" if shown.waiting else ""
    left = shown.steps - shown.first_step
    time, how = shown.time.step, shown.time.source
    needs = {
        "data": f"{images} images{files}",
        "memory": f"a step needs at least {gib(shown.memory_needed)}; {free} free on {shown.device}",
        "disk": f"{shown.checkpoints} checkpoint(s) of about {gib(shown.checkpoint)}{waiting}; "
        f"{gib(shown.disk_free)} free",
        "cost": f"{shown.gradient_images:.3f} gradient images per clean image",
        "time": f"about {duration(time * left)}: {left:,} steps of {duration(time)}, {how}",
    }
    if shown.bad_files:
        needs["left out"] = f"cannot be read: {shown.bad_files[0]}"
    if shown.first_step:
        needs["resume"] = f"would go on from step {shown.first_step}"
    return needs


def draw(shown: Preview, path: Path) -> None:
    """The learning rate over epochs as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    count = min(shown.steps, 1000)
    steps = [i * (shown.steps - 1) // max(1, count - 1) for i in range(count)]
    axes.plot([step / shown.steps_per_epoch for step in steps], list(map(shown.schedule, steps)))
    axes.set(xlabel="epoch", ylabel="learning rate", ylim=(0, None))
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)
