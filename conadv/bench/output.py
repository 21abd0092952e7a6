"""What a benchmark hands over: the facts that its numbers depend on, a JSON file, and tables of text."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conadv.bench.harness import Row
from conadv.bench.options import BenchArgs
from conadv.errors import ConadvError, printable
from conadv.training.allocator import keep_freed_memory
from conadv.training.record import git_state, machine, now, versions, write_atomic


def prepare(options: BenchArgs) -> None:
    """Set threads and the allocator of this process, and find out before measuring whether --out can be written."""
    import torch

    torch.set_num_threads(options.threads)
    if not options.system_allocator:
        keep_freed_memory()
    if options.out is not None:
        try:
            options.out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConadvError(
                f"--out {printable(options.out)} cannot be written: {error}"
            ) from error


def facts(name: str, options: BenchArgs, device: Any, **more: Any) -> dict[str, Any]:
    """What the numbers depend on: machine, versions, git, and every option."""
    import torch

    where = machine(
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch.get_num_threads(),
    )
    return {
        "bench": name,
        "command": command_line(sys.argv[1:]),
        "date": now(),
        "machine": where,
        "versions": versions(),
        "git": git_state(),
        "options": options.facts(),
        **more,
    }


def command_line(args: Sequence[str]) -> str:
    """The command for a reader to repeat, without where its result went."""
    kept: list[str] = []
    skip = False
    for arg in args:
        if not skip and not arg.startswith("--out="):
            kept.append(arg)
        skip = arg == "--out"
        if skip:
            kept.pop()
    return shlex.join(["conadv", *kept])


def write(
    path: Path | None, about: Mapping[str, Any], title: str, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write the table ``title`` as JSON, if a file was asked for."""
    if path is None:
        return
    content = {**about, "tables": {title: rows}}
    try:
        write_atomic(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ConadvError(f"--out {printable(path)} cannot be written: {error}") from error


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for first, *others in (head, *rows):
        cells = [
            first.ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def ratio_text(row: Row) -> str:
    return f"{row.ratio:.3f} [{row.ratio_low:.3f}, {row.ratio_high:.3f}]"


def describe_rounds(rows: Sequence[Row]) -> str:
    """How many rounds, and what the brackets mean."""
    coverage = min(row.coverage for row in rows)
    return f"{len(rows[0].samples_ms)} interleaved rounds; [ ]: {100 * coverage:.1f} % interval of the median ratio"


def finish(name: str, options: BenchArgs, device: Any, rows: Sequence[Row], **more: Any) -> None:
    """Print the table of a benchmark on one process and write its JSON."""
    cells = [
        [row.name, f"{row.median_ms:.2f}", f"{row.min_ms:.2f}", ratio_text(row), row.yardstick]
        for row in rows
    ]
    say(f"{text_table(['', 'median ms', 'min ms', 'ratio', 'to'], cells)}\n{describe_rounds(rows)}")
    write(options.out, facts(name, options, device, **more), name, [asdict(row) for row in rows])
