"""A plan as a table for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from conadv.errors import printable
from conadv.plan.profile import Profile
from conadv.plan.rows import Plan, Row
from conadv.report.table import duration

GIB = 2**30
RIGHT = (
    "devices",
    "batch",
    "step",
    "total",
    "images/s",
    "overhead",
    "device-s\nper epoch",
    "cost",
    "GiB",
)
NEEDS_WIDTH = {
    "GiB": 125,
    "micro-batch": 118,
    "batch": 106,
    "device-s\nper epoch": 98,
    "overhead": 86,
    "limit": 78,
}
TOTAL_WIDTH = 9
LEGEND = (
    "basis: m = inside the measured points; outside of them or given: B the micro-batch, R the number of ranks, L the "
    "link.",
    "executor: learners, or learners:attack ranks. Devices beyond them would make no step faster, and cost nothing.",
    "overhead: step time over that of noise on as many learners.",
    "limit: what the step would gain most by, were it free; memory, where it made the micro-batch smaller.",
)


def show(
    plan: Plan,
    epoch_images: int,
    price: float | None,
    steps: int | None = None,
    console: Console | None = None,
) -> None:
    """Write the table, its legend and what was left out to ``console`` (standard output by default)."""
    console = console or Console(highlight=False)
    console.print(printable(_about(plan)), markup=False)
    console.print(plan_table(plan, epoch_images, price, console.width, steps))
    for line in (*LEGEND, *_stream(plan), *_left_out(plan)):
        console.print(f"- {line}", markup=False)


def plan_table(
    plan: Plan,
    epoch_images: int,
    price: float | None = None,
    width: int = 160,
    steps: int | None = None,
) -> Table:
    """One line per row; columns that can wait are left out of a terminal narrower than they need."""
    names = list(cells(plan.rows[0], epoch_images, price, steps))
    room = width - (TOTAL_WIDTH if steps is not None else 0)
    shown = [name for name in names if room >= NEEDS_WIDTH.get(name, 0)]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, header_style="bold")
    for name in shown:
        table.add_column(name, justify="right" if name in RIGHT else "left", no_wrap=True)
    last: tuple[int, int] | None = None
    for row in plan.rows:
        if last not in (None, (row.global_batch, row.devices)):
            table.add_section()
        last = row.global_batch, row.devices
        values = cells(row, epoch_images, price, steps)
        table.add_row(*(values[name] for name in shown))
    return table


def cells(
    row: Row, epoch_images: int, price: float | None = None, steps: int | None = None
) -> dict[str, str]:
    """Column -> text. ``price``: of one device for one hour; ``steps``: of the whole training."""
    prediction, layout = row.prediction, row.prediction.layout
    epoch = prediction.device_seconds_per_image * epoch_images
    split = (
        f"ranks {layout.learners}:{layout.attack_ranks}"
        if layout.attack_ranks
        else f"inline {layout.learners}"
    )
    values = {
        "devices": f"{row.devices}",
        "batch": f"{row.global_batch}",
        "method": row.method,
        "executor": split,
        "micro-batch": f"{layout.micro_batch} x {layout.accumulation}",
        "step": duration(prediction.step),
        **({} if steps is None else {"total": duration(prediction.step * steps)}),
        "images/s": f"{prediction.images_per_second:,.0f}",
        "overhead": f"{row.overhead:.2f}",
        "device-s\nper epoch": f"{epoch:,.0f}",
        "GiB": f"{row.memory / GIB:.2f}",
        "limit": row.limit,
        "basis": "".join(name[0].upper() for name in row.extrapolated) or "m",
    }
    return values if price is None else values | {"cost": f"{epoch / 3600 * price:,.2f}"}


def _about(plan: Plan) -> str:
    profile, link = plan.planner.profile, plan.planner.link
    return f"{describe(profile)}; link: " + (
        "none"
        if link is None
        else f"{8e-9 / link.seconds_per_byte:.3g} Gbit/s and {1e6 * link.latency:.3g} us per step of an all-reduce"
    )


def describe(profile: Profile) -> str:
    """The workload and the machine on one line."""
    work = profile.workload
    device = profile.machine.get("device", profile.device)
    where = profile.machine.get("processor", "cpu") if profile.device == "cpu" else device
    return (
        f"{work.model}, {work.image_size}x{work.image_size}, {work.precision}, {work.optimizer}; measured on {where}, "
        f"{profile.processes} process(es) of {profile.threads} thread(s)"
    )


def _stream(plan: Plan) -> list[str]:
    if plan.planner.profile.device != "cuda":
        return []
    gains = [
        f"{row.method} on {row.devices}: {duration(row.prediction.lower)} to {duration(row.prediction.step)}"
        for row in plan.rows
        if row.prediction.lower < row.prediction.step
    ]
    return (
        [f"stream executor, bounds of a step, not measured: {'; '.join(gains)}."] if gains else []
    )


def _left_out(plan: Plan) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for omitted in plan.omitted:
        reasons.setdefault(omitted.reason, []).append(f"{omitted.method} on {omitted.devices}")
    return [f"left out: {', '.join(which)}: {reason}" for reason, which in reasons.items()]
