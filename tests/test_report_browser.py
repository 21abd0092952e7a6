"""The HTML report in a real browser: headless Chromium, skipped where there is none."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conadv.report import write_report

from .test_report import write_study

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# What layout made of the page, left in an attribute for --dump-dom: a report itself holds no script.
MEASURE = """<script>
const box = (element) => element.getBoundingClientRect();
parent.document.documentElement.dataset.measured = JSON.stringify({
  page: [document.documentElement.scrollWidth, document.documentElement.clientWidth],
  rows: [...document.querySelectorAll("table.arms tbody tr")].filter((row) => box(row).height > 10).length,
  figures: [...document.querySelectorAll("figure svg")].map((svg) => [box(svg).width, box(svg).height]),
  inks: [...new Set([...document.querySelectorAll("figure svg path")].map((path) => getComputedStyle(path).stroke))],
  bottom: box(document.querySelector("main > section")).bottom,
  ink: getComputedStyle(document.body).color,
  paper: getComputedStyle(document.body).backgroundColor,
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of seven arms, with one arm's name too long for any line."""
    folder = tmp_path_factory.mktemp("browser")
    write_study(folder / "runs")
    names = {str(path): "x" * 120 for path in (folder / "runs" / "3").iterdir()}
    write_report([folder / "runs"], folder / "report.html", names=names)
    return folder / "report.html"


def chromium(page: Path, *arguments: str) -> str:
    """Open ``page`` with a fresh profile; what it prints."""
    profile = page.parent / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def measure(page: Path, *arguments: str, width: int | None = None) -> dict[str, Any]:
    """Layout numbers of the report, in a frame of ``width`` pixels (a window cannot be as narrow as a phone)."""
    text = page.read_text().replace("</body>", MEASURE + "</body>")
    if width is not None:
        text = f'<!DOCTYPE html><iframe width="{width}" height="900" srcdoc="{html.escape(text)}"></iframe>'
    probe = page.with_name("probe.html")
    probe.write_text(text)
    found = re.search(r'data-measured="([^"]*)"', chromium(probe, "--dump-dom", *arguments))
    assert found is not None
    return json.loads(found[1].replace("&quot;", '"'))


@pytest.mark.parametrize("width", [1280, 360])
def test_rows_and_figures_are_laid_out_without_overflow(page: Path, width: int) -> None:
    """Red when: style.css loses ".scroll { overflow-x: auto }" or the overflow-wrap rule."""
    measured = measure(page, width=width)
    content, window = measured["page"]
    assert width - 20 <= window <= width  # less a scroll bar
    assert content <= window
    assert measured["rows"] == 7
    assert len(measured["figures"]) == 5
    assert all(w > 500 and h > 80 for w, h in measured["figures"])


def test_figures_follow_the_dark_page(page: Path) -> None:
    """Red when: to_svg() leaves INK in place, which is invisible on a dark page."""
    light, dark = measure(page), measure(page, "--blink-settings=preferredColorScheme=0")
    assert light["paper"] != dark["paper"]
    for measured in (light, dark):
        assert measured["ink"] in measured["inks"]
        assert "rgb(1, 2, 3)" not in measured["inks"]


def test_screenshot_is_not_blank(page: Path) -> None:
    picture = page.with_name("report.png")
    chromium(page, "--window-size=1280,2000", f"--screenshot={picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000  # an empty page of this size compresses to about 10 kB
