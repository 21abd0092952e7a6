"""What benchmarks/two_hosts.sh needs besides the benchmark: the link's true rate, one JSON, a table and a figure.

python benchmarks/two_hosts.py probe HOST ADDRESS FILE          both hosts at once: bandwidth and round trip
python benchmarks/two_hosts.py join RATE BENCH LINK FILE        one rate: the benchmark's JSON and the link's
python benchmarks/two_hosts.py combine FILE RATE_FILE...        all rates in one JSON
python benchmarks/two_hosts.py table FILE
python benchmarks/two_hosts.py draw FILE FIGURE.svg             or .png
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from points import Json, read, write

PORT = 29501
CHUNK = bytes(2**20)
PROBE_SECONDS = 1.0
ROUND_TRIPS = 200
METHODS = {
    "disadv": "disadv (sequential)",
    "conadv": "conadv",
    "conadv-lookahead": "conadv + look-ahead",
}
INK = "#7d8590"  # readable on white and on black


# ---- the link


def probe(host: str, address: str, out: str) -> None:
    """Megabits of payload per second and direction while both hosts send, and the median round trip. Host 0 writes."""
    with _connect(int(host), address) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = [_round_trip(link, int(host)) for _ in range(ROUND_TRIPS)]
        sender = threading.Thread(target=_send, args=(link,))
        sender.start()
        rate = _receive(link)
        sender.join()
    if host == "0":
        found = {"measured_mbit": rate, "round_trip_ms": 1e3 * statistics.median(trips)}
        Path(out).write_text(json.dumps(found) + "\n")


def _connect(host: int, address: str) -> socket.socket:
    if host == 0:
        with socket.create_server((address, PORT)) as server:
            server.settimeout(30)
            return server.accept()[0]
    for _ in range(100):
        try:
            return socket.create_connection((address, PORT), timeout=30)
        except OSError:  # the other host is not there yet
            time.sleep(0.1)
    raise SystemExit(f"no connection to {address}:{PORT} in 10 seconds")


def _round_trip(link: socket.socket, host: int) -> float:
    start = time.perf_counter()
    if host == 0:
        link.sendall(b"x")
    link.recv(1)
    if host == 1:
        link.sendall(b"x")
    return time.perf_counter() - start


def _send(link: socket.socket) -> None:
    end = time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < end:
        link.sendall(CHUNK)
    link.shutdown(socket.SHUT_WR)


def _receive(link: socket.socket) -> float:
    start = time.perf_counter()
    received = 0
    while data := link.recv(len(CHUNK)):
        received += len(data)
    return 8e-6 * received / (time.perf_counter() - start)


# ---- the JSON


def join(rate: str, bench: str, link: str, out: str) -> None:
    if not Path(bench).exists():
        raise SystemExit(f"The benchmark left no result for rate {rate}.")
    content = json.loads(Path(bench).read_text())
    content["link"] = {
        "rate_mbit": None if rate == "none" else int(rate),
        **json.loads(Path(link).read_text()),
    }
    temporary = Path(out).with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(out)


def combine(out: str, *files: str) -> None:
    """All rates in one file, the slowest first. They must have been measured alike."""
    alike = ("command", "machine", "versions", "options", "ranks")
    points = sorted(read(files, alike), key=rate_of)
    write(out, "two-hosts", points, alike, ("date", "git", "link", "tables"))


def rate_of(point: Json) -> float:
    """Mbit/s of the link's limit; infinity without one."""
    rate = point["link"]["rate_mbit"]
    return float("inf") if rate is None else float(rate)


def find(point: Json, method: str, overlap: bool) -> Json | None:
    """The row of a method at one rate."""
    rows = point["tables"]["attack-cost"]
    labels = {"method": method, "overlap": overlap}
    return next((row for row in rows if labels.items() <= row["labels"].items()), None)


# ---- the table


def table(file: str) -> None:
    """Per rate: the step of noise, the sum over hosts and the attack by themselves, and every method's overhead."""
    content = json.loads(Path(file).read_text())
    for overlap in (True, False):
        print(
            f"\nover noise, {'with' if overlap else 'without'} backward overlap [interval of the median ratio]"
        )
        print(
            f"{'Mbit/s':>7} {'noise ms':>9} {'sum ms':>7} {'attack ms':>9}",
            *(f"{m:>21}" for m in METHODS),
            sep=" ",
        )
        for point in content["points"]:
            print(_line(point, overlap))
    print("\nddp over vanilla (above 1: the engine is faster)")
    for point in content["points"]:
        if (row := find(point, "ddp", True)) is not None:
            print(f"{_name(point):>7} {_ratio(row)}")


def _line(point: Json, overlap: bool) -> str:
    noise, attack = find(point, "noise", overlap), attack_ms(point)
    step = f"{noise['median_ms']:9.0f}" if noise else f"{'-':>9}"
    cells = (
        f"{_ratio(row) if (row := find(point, method, overlap)) else '-':>21}" for method in METHODS
    )
    return " ".join([f"{_name(point):>7} {step} {sum_ms(point):7.0f} {attack or 0:9.0f}", *cells])


def _name(point: Json) -> str:
    rate = point["link"]["rate_mbit"]
    return "none" if rate is None else str(rate)


def _ratio(row: Json) -> str:
    return f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"


def attack_ms(point: Json) -> float | None:
    """What the attack takes by itself: its phase in a sequential step."""
    row = find(point, "disadv", True) or find(point, "disadv", False)
    return row and float(row["phases_ms"]["attack"])


def sum_ms(point: Json) -> float:
    """What summing the gradients takes at the measured rate: each of n ranks sends 2 (n - 1) / n of them."""
    row = point["tables"]["attack-cost"][0]
    n = row["labels"]["learners"]
    largest = max(other["labels"]["gradient_bytes"] for other in point["tables"]["attack-cost"])
    return float(largest * 2 * (n - 1) / n * 8e-3 / point["link"]["measured_mbit"])


# ---- the figure


def draw(file: str, out: str) -> None:
    """Overhead over noise by link rate, with and without backward overlap; bands are the intervals of the medians."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    content = json.loads(Path(file).read_text())
    points = content["points"]
    names = [
        "axes.edgecolor",
        "axes.labelcolor",
        "text.color",
        "xtick.color",
        "ytick.color",
        "grid.color",
    ]
    colours = dict.fromkeys(names, INK)
    look = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
        "svg.fonttype": "path",
    }
    with mpl.rc_context({**colours, **look, "svg.hashsalt": "conadv", "figure.facecolor": "none"}):
        figure = Figure(figsize=(8.2, 3.7), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, overlap in zip(panels, (True, False), strict=True):
            _panel(axes, points, overlap)
        panels[0].set_ylabel("step time over noise (no attack)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(
            out,
            dpi=130,
            transparent=True,
            metadata={"Date": None} if out.endswith(".svg") else None,
        )


def _panel(axes: Any, points: list[Json], overlap: bool) -> None:
    from conadv.analysis.style import COLOURS
    from conadv.report.figure_style import MARKERS

    for colour, marker, (method, label) in zip(COLOURS, MARKERS, METHODS.items(), strict=False):
        rows = [(x, row) for x, point in enumerate(points) if (row := find(point, method, overlap))]
        if rows:
            x = [place for place, _ in rows]
            axes.plot(
                x,
                [row["ratio"] for _, row in rows],
                color=colour,
                marker=marker,
                markersize=4.5,
                label=label,
            )
            low, high = ([row[end] for _, row in rows] for end in ("ratio_low", "ratio_high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    longer = [
        x for x, point in enumerate(points) if sum_ms(point) >= (attack_ms(point) or float("inf"))
    ]
    if longer:
        axes.axvspan(
            -0.4,
            max(longer) + 0.5,
            color=INK,
            alpha=0.12,
            linewidth=0,
            label="sum takes longer than attack",
        )
    axes.axhline(1, color=INK, linewidth=1)
    axes.grid(axis="y", alpha=0.25)
    axes.set_xlim(-0.4, len(points) - 0.6)
    axes.set_xticks(
        range(len(points)), ["no limit" if name == "none" else name for name in map(_name, points)]
    )
    axes.set_xlabel("link, Mbit/s")
    axes.set_title(f"{'with' if overlap else 'without'} backward overlap", fontsize=10)


COMMANDS = {"probe": probe, "join": join, "combine": combine, "table": table, "draw": draw}


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in COMMANDS:
        raise SystemExit((__doc__ or "").strip())
    COMMANDS[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
