"""benchmarks/two_hosts.sh takes everything along that it made, however it ends; and what is drawn
from its results.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPT = BENCHMARKS / "two_hosts.sh"
OURS = re.compile(r"conadv-[0-9a-f]{8}-[01]")  # how the script names a namespace


def load(name: str) -> ModuleType:
    """A script of benchmarks/ as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up the module that they are defined in
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCHMARKS))
    return module


def result(methods: dict[str, float]) -> dict[str, Any]:
    """A benchmark's JSON with a row for each method, with and without overlap: its ratio to
    noise.
    """
    rows = []
    for method, ratio in methods.items():
        for overlap in (True, False):
            labels = {"method": method, "overlap": overlap, "learners": 2, "images": 16}
            labels["gradient_bytes"] = 50_000_000
            interval = {"ratio": ratio, "ratio_low": ratio - 0.1, "ratio_high": ratio + 0.1}
            times = {"median_ms": 100.0, "phases_ms": {"attack": 40.0}}
            rows.append({"name": method, "labels": labels, **times, **interval})
    same = {name: {} for name in ("machine", "versions", "options", "ranks")}
    return {"command": "c", "date": "d", "git": None, **same, "tables": {"attack-cost": rows}}


def test_rates_come_together_slowest_first(tmp_path: Path) -> None:
    # Red when: rates are sorted as text, or "none" comes first; the two kinds of overlap are mixed
    # up; bits are taken for bytes.
    two_hosts = load("two_hosts")
    methods = {"noise": 1.0, "disadv": 1.3, "conadv": 1.04, "conadv-lookahead": 1.05, "ddp": 1.01}
    files = []
    for rate in ("none", "400", "1600"):
        (tmp_path / "bench").write_text(json.dumps(result(methods)))
        (tmp_path / "link").write_text(json.dumps({"measured_mbit": 300.0, "round_trip_ms": 0.1}))
        files.append(str(tmp_path / f"rate-{rate}.json"))
        two_hosts.join(rate, str(tmp_path / "bench"), str(tmp_path / "link"), files[-1])
    out = tmp_path / "all.json"
    load("points").combine("two-hosts", str(out), *files)
    points = json.loads(out.read_text())["points"]
    assert [point["link"]["rate_mbit"] for point in points] == [400, 1600, None]
    # 50 MB by 400 Mbit/s, sent by each of two hosts once
    assert two_hosts.sum_ms({**points[0], "link": {"measured_mbit": 400.0}}) == pytest.approx(
        1000.0
    )
    found = two_hosts.find(points[0], "conadv", False)
    assert (found["ratio"], found["labels"]["overlap"]) == (1.04, False)
    two_hosts.draw(str(out), str(tmp_path / "all.svg"))
    assert "<svg" in (tmp_path / "all.svg").read_text()


# ---- the script

ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def run(*args: object, command: str = "true") -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, "CONADV_TWO_HOSTS_COMMAND": command}
    words = [str(SCRIPT), *map(str, args)]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=120, env=environment, check=False
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["4OO"], "neither a number"),
        (["0"], "neither a number"),
        (["--per-host", "x"], "--per-host 'x'"),
    ],
)
def test_bad_arguments(args: list[str], message: str, tmp_path: Path) -> None:
    done = run("--out", tmp_path, *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def why_not() -> str:
    """Why this machine cannot make network namespaces; empty if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    missing = [tool for tool in ("ip", "tc", "taskset") if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    name = f"conadv-test-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def names() -> set[str]:
    """The script's namespaces; other tests make their own at the same time."""
    listed = subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, check=True
    ).stdout
    return {
        name for name in (line.split()[0] for line in listed.splitlines()) if OURS.fullmatch(name)
    }


def running(words: str) -> list[str]:
    """The processes with these words in their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found += [file.parent.name] * (
                words in file.read_bytes().decode(errors="replace").replace("\0", " ")
            )
    return found


def test_namespaces_and_processes_go_with_the_script(tmp_path: Path) -> None:
    # Red when: the trap on EXIT is taken out; on_both waits for a host before it starts the other;
    # tc gets the rate in another unit; a rate with a JSON is measured again. One test, since each
    # part looks at the list of namespaces.
    if reason := why_not():
        pytest.skip(reason)
    before = names()
    fails(tmp_path / "fails")
    assert names() == before
    ends(tmp_path / "ends", before)
    assert names() == before
    measures(tmp_path / "measures")
    assert names() == before


def fails(out: Path) -> None:
    done = run("--out", out, "500", command="exit 3")
    assert done.returncode == 1
    assert "failed at rate 500" in done.stderr
    assert not list(out.glob("rate-*.json"))


def ends(out: Path, before: set[str]) -> None:
    """Ctrl-C in the middle of a run."""
    out.mkdir()
    mark = f"sleep {time.time_ns() % 10**6 + 10**6}"  # a number of seconds that no other sleep has
    environment = {**ENVIRONMENT, "CONADV_TWO_HOSTS_COMMAND": f"touch {out}/$HOST; {mark}; true"}
    # Whoever starts the tests in the background may ignore SIGINT, and a script of bash cannot undo
    # that.
    script = subprocess.Popen(
        ["env", "--default-signal=INT", str(SCRIPT), "--out", str(out), "500"],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(
            lambda: (out / "0").exists() and (out / "1").exists() and len(running(mark)) >= 2
        )
        assert len(names() - before) == 2
        script.send_signal(signal.SIGINT)
        assert script.wait(timeout=60) == 130
    finally:
        script.kill()
    assert running(mark) == []


def measures(out: Path) -> None:
    out.mkdir()
    (out / "fake").write_text(json.dumps(result({"noise": 1.0, "disadv": 1.2, "conadv": 1.1})))
    done = run("--out", out, "200", command=f'[ "$HOST" = 1 ] || cp {out}/fake "$RESULT"')
    assert done.returncode == 0, done.stderr
    link = json.loads((out / "rate-200.json").read_text())["link"]
    assert link["rate_mbit"] == 200
    assert 0 < link["measured_mbit"] < 205  # never faster than the limit, however slow the machine
    assert (out / "two_hosts.svg").stat().st_size > 1000
    again = run("--out", out, "200", command="exit 3")
    assert again.returncode == 0
    assert "is there" in again.stdout


def wait_until(happened: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)
