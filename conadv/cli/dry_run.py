"""``conadv train ... --dry-run``: a preview on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conadv.cli.format import duration
from conadv.errors import printable
from conadv.planning.dry_run import Preview
from conadv.planning.memory import gib
from conadv.training.build import make_schedule, overview


def show(shown: Preview, console: Console | None = None) -> None:
    """Write a preview to ``console`` (standard output by default); fits into 80 columns."""
    console = console or Console(highlight=False)
    run = shown.run
    title = f"{run.config.recipe} {run.config.method}: dry run"
    console.print(Text(printable(title), style="bold"))
    for line in overview(run):
        console.print(printable(line), markup=False)
    console.print()
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _needs(shown).items():
        table.add_row(name, Text(text))
    console.print(table)
    notes = "loading images, evaluation, checkpoints and communication between ranks come on top"
    console.print(f"- time: of random images on this device; {notes}", markup=False)
    console.print(
        "ready: nothing has been trained, and nothing written into the run directory", style="bold"
    )


def _needs(shown: Preview) -> dict[str, str]:
    """What is needed, beside what is there."""
    data, held_out = shown.run.data, shown.run.data.source.validation
    held = f", {len(held_out.labels):,} held out" if held_out is not None else ""
    free = "not known" if shown.memory_free is None else gib(shown.memory_free)
    waiting = f", {gib(shown.waiting)} of it images that wait" if shown.waiting else ""
    left = shown.run.derived.steps - shown.first_step
    step = shown.step_seconds
    steps, schedule = shown.run.derived.steps, make_schedule(shown.run.config, shown.run.derived)
    lrs = ", ".join(f"{schedule(i * (steps - 1) // 8):.3g}" for i in range(9))
    needs = {
        "schedule": f"{steps:,} steps ({shown.run.derived.epochs:.4g} epochs); "
        f"learning rate at every eighth: {lrs}",
        "data": f"{data.train_size:,} training{held} and {data.test_size:,} test images",
        "memory": f"a step needs at least {gib(shown.memory_needed)}; {free} free",
        "disk": f"{shown.checkpoints} checkpoint(s) of about {gib(shown.checkpoint)}{waiting}; "
        f"{gib(shown.disk_free)} free",
        "cost": f"{shown.gradient_images:.3f} gradient images per clean image",
        "time": f"about {duration(step * left)}: {left:,} steps of {duration(step)}",
    }
    if shown.first_step:
        needs["resume"] = f"would go on from step {shown.first_step}"
    return needs
