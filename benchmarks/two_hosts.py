"""What benchmarks/two_hosts.sh needs besides the benchmark: the link's true rate, and a figure.

python benchmarks/two_hosts.py probe HOST ADDRESS FILE     both hosts at once: bandwidth, round trip
python benchmarks/two_hosts.py join RATE BENCH LINK FILE   the benchmark's JSON and the link's
python benchmarks/two_hosts.py draw FILE FIGURE.svg        or .png
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import threading
import time
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from points import Json

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


def probe(host: str, address: str, out: str) -> None:
    """Mbit/s of payload while both hosts send, and the median round trip. Host 0 writes."""
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


def join(rate: str, bench: str, link: str, out: str) -> None:
    if not Path(bench).exists():
        raise SystemExit(f"The benchmark left no result for rate {rate}.")
    limit = {"rate_mbit": None if rate == "none" else int(rate)}
    content = json.loads(Path(bench).read_text())
    content["link"] = limit | json.loads(Path(link).read_text())
    Path(out).write_text(json.dumps(content, indent=1) + "\n")


def find(point: Json, method: str, overlap: bool) -> Json | None:
    """The row of a method at one rate."""
    labels = {"method": method, "overlap": overlap}
    rows = point["tables"]["attack-cost"]
    return next((row for row in rows if labels.items() <= row["labels"].items()), None)


def attack_ms(point: Json) -> float | None:
    """What the attack takes by itself: its phase in a sequential step."""
    row = find(point, "disadv", True) or find(point, "disadv", False)
    return row and float(row["phases_ms"]["attack"])


def sum_ms(point: Json) -> float:
    """The all-reduce at the measured rate: each of n ranks sends 2 (n - 1) / n of the gradients."""
    rows = point["tables"]["attack-cost"]
    n = rows[0]["labels"]["learners"]
    largest = max(row["labels"]["gradient_bytes"] for row in rows)
    return float(largest * 2 * (n - 1) / n * 8e-3 / point["link"]["measured_mbit"])


def draw(file: str, out: str) -> None:
    """Overhead over noise by link rate; bands are the intervals of the medians."""
    points = json.loads(Path(file).read_text())["points"]
    inked = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    look = dict.fromkeys(inked, INK) | {"svg.hashsalt": "conadv", "figure.facecolor": "none"}
    with mpl.rc_context(look):
        figure = Figure(figsize=(8.2, 3.7), layout="constrained")
        for axes, overlap in zip(figure.subplots(1, 2, sharey=True), (True, False), strict=True):
            for method in METHODS:
                rows = [(x, row) for x, p in enumerate(points) if (row := find(p, method, overlap))]
                x = [place for place, _ in rows]
                axes.plot(x, [row["ratio"] for _, row in rows], "o-", label=METHODS[method])
                ends = ([row[end] for _, row in rows] for end in ("ratio_low", "ratio_high"))
                axes.fill_between(x, *ends, alpha=0.2, linewidth=0)
            for x, point in enumerate(points):  # where the sum takes longer than the attack
                if sum_ms(point) >= (attack_ms(point) or float("inf")):
                    axes.axvspan(x - 0.5, x + 0.5, color=INK, alpha=0.12, linewidth=0)
            axes.axhline(1, color=INK, linewidth=1)
            names = [str(p["link"]["rate_mbit"] or "no limit") for p in points]
            axes.set_xticks(range(len(points)), names)
            axes.set_xlabel("link, Mbit/s (grey: the sum takes longer than the attack)")
            axes.set_title(f"{'with' if overlap else 'without'} backward overlap", fontsize=10)
        figure.axes[0].set_ylabel("step time over noise (no attack)")
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(out, dpi=130, metadata={"Date": None} if out.endswith(".svg") else None)


COMMANDS = {"probe": probe, "join": join, "draw": draw}

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in COMMANDS:
        raise SystemExit((__doc__ or "").strip())
    COMMANDS[sys.argv[1]](*sys.argv[2:])
