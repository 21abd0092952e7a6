"""``conadv report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from conadv.errors import ConadvError


@dataclass
class Args:
    """Write a report about runs, or about one sweep: report.html, report.md and summary.json."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, or folders that contain runs; or the folder of one sweep."""
    out: Path | None = None
    """The HTML file; the others lie beside it (default: runs/report.html; for a sweep, report.html
    in its folder).
    """
    baseline: str | None = None
    """Label of the arm that differences refer to."""


def command(args: Args) -> None:
    if not args.runs:
        raise ConadvError("Name at least one run directory: conadv report RUN...")
    from conadv.cli.tables import show_report
    from conadv.report import is_sweep, write_report, write_sweep_report

    sweeps = [path for path in args.runs if is_sweep(path)]
    if sweeps and len(args.runs) > 1:
        raise ConadvError(f"{sweeps[0]} is a sweep, which has a report of its own: name it alone.")
    out = args.out or (sweeps[0] if sweeps else Path("runs")) / "report.html"
    if sweeps:
        report = write_sweep_report(sweeps[0], out, baseline=args.baseline)
    else:
        report = write_report(args.runs, out, baseline=args.baseline)
    show_report(report, out)
