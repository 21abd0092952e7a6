"""``conadv doctor`` on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conadv.doctor.facts import Facts, look
from conadv.doctor.findings import Finding, findings
from conadv.errors import printable
from conadv.preflight.estimate import gib

COLOURS = {"wrong": "bold red", "slow": "yellow", "note": "dim"}


@dataclass
class DoctorArgs:
    """Show what is installed, what devices and links are seen, and what of it would be slow or wrong.

    Exit code 0: nothing is wrong (some of it may be slow); 1: something is. Changes nothing, and sends nothing.
    """

    json: bool = False
    """Write facts and findings as JSON."""


def command(args: DoctorArgs, console: Console | None = None) -> bool:
    """Look and show; returns whether nothing is wrong."""
    facts = look(Path.cwd())
    found = findings(facts)
    if args.json:
        text = json.dumps(
            {"facts": facts.to_json(), "findings": [asdict(finding) for finding in found]}, indent=1
        )
        sys.stdout.write(text + "\n")
    else:
        show(facts, found, console or Console(highlight=False))
    return all(finding.level != "wrong" for finding in found)


def show(facts: Facts, found: list[Finding], console: Console) -> None:
    """Write facts and findings to ``console``; fits into 80 columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows(facts):
        table.add_row(name, Text(printable(value)))
    console.print(table)
    console.print()
    for finding in found:
        line = Text(f"{finding.level:<6}", style=COLOURS[finding.level])
        line.append(printable(finding.what), style="default")
        console.print(line)
        console.print(Text(f"      -> {printable(finding.todo)}"))
    counts = {level: sum(finding.level == level for finding in found) for level in COLOURS}
    console.print(
        Text(", ".join(f"{count} {level}" for level, count in counts.items()), style="bold")
    )


def rows(facts: Facts) -> Iterator[tuple[str, str]]:
    """What is shown of the facts."""
    yield "versions", ", ".join(f"{name} {number}" for name, number in facts.versions.items())
    extras = [f"{name} {number}" for name, number in facts.extras.items() if number is not None]
    yield "extras", ", ".join(extras) or "none"
    yield (
        "processor",
        f"{facts.processor}, {facts.system}, {' '.join(facts.cpu_flags) or 'no vector units known'}",
    )
    yield (
        "cores",
        f"{facts.cores}, of which {facts.usable_cores:g} usable; torch uses {facts.threads} thread(s)",
    )
    free = "not known" if facts.memory_free is None else gib(facts.memory_free)
    yield (
        "memory",
        f"{free} free; allocator {facts.allocator}; oneDNN {'yes' if facts.onednn else 'no'}",
    )
    for index, device in enumerate(facts.cuda):
        peers = ", ".join(f"cuda:{j}" for j in device.peers) or "none"
        major, minor = device.capability
        sizes = f"{gib(device.free)} of {gib(device.memory)} free"
        yield f"cuda:{index}", f"{device.name}, capability {major}.{minor}, {sizes}; peers {peers}"
    if not facts.cuda:
        built = f"for CUDA {facts.cuda_built}" if facts.cuda_built else "without CUDA"
        yield "cuda", f"no device; torch is built {built}"
    yield "backends", ", ".join(facts.backends) or "none"
    yield "network", ", ".join(_interfaces(facts)) or "no interface"
    shm = "none" if facts.shm is None else f"{gib(facts.shm[1])} of {gib(facts.shm[0])} free"
    yield "/dev/shm", shm
    yield "disk", f"{gib(facts.disk_free)} free here"
    if facts.variables:
        yield "variables", " ".join(f"{name}={value}" for name, value in facts.variables.items())


def _interfaces(facts: Facts) -> Iterator[str]:
    for interface in facts.interfaces:
        speed = "" if interface.speed is None else f" {interface.speed / 1000:g} Gbit/s"
        yield f"{interface.name}{speed}{'' if interface.up else ' (down)'}"
