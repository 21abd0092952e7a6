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

from conadv.report import write_sweep_report

from .report_records import write_sweep

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync")

# What layout made of the page, left in an attribute for --dump-dom: a report itself holds no
# script.
MEASURE = """<script>
const box = (element) => element.getBoundingClientRect();
const all = (what) => [...document.querySelectorAll(what)];
parent.document.documentElement.dataset.measured = JSON.stringify({
  page: [document.documentElement.scrollWidth, document.documentElement.clientWidth],
  rows: all("tbody tr").filter((row) => box(row).height > 10).length,
  figures: all("figure svg").map((svg) => [box(svg).width, box(svg).height]),
  inks: [...new Set(all("figure svg path").map((path) => getComputedStyle(path).stroke))],
  ink: getComputedStyle(document.body).color,
  paper: getComputedStyle(document.body).backgroundColor,
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sweep(tmp_path_factory.mktemp("browser"), seeds=2)
    text = (folder / "sweep.json").read_text()
    (folder / "sweep.json").write_text(text.replace("+ ConAdv", "x" * 120))  # longer than any line
    write_sweep_report(folder)
    return folder / "report.html"


def measure(page: Path, *arguments: str, width: int = 1280) -> dict[str, Any]:
    """The layout in a frame of ``width`` pixels: a window cannot be as narrow as a phone."""
    inner = html.escape(page.read_text().replace("</body>", MEASURE + "</body>"))
    probe = page.with_name("probe.html")
    probe.write_text(
        f'<!DOCTYPE html><iframe width="{width}" height="900" srcdoc="{inner}"></iframe>'
    )
    shutil.rmtree(page.with_name("profile"), ignore_errors=True)
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={page.with_name('profile')}", "--dump-dom"]
    command += [*arguments, probe.as_uri()]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'data-measured="([^"]*)"', out)
    assert found is not None
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [1400, 400])
def test_the_page_fits_and_only_tables_scroll(page: Path, width: int) -> None:
    # Red when: style.css loses ".scroll { overflow-x: auto }", or a figure has a width of its own.
    measured = measure(page, width=width)
    content, window = measured["page"]
    assert width - 20 <= window <= width  # less a scroll bar
    assert content <= window
    assert measured["rows"] > 60
    assert len(measured["figures"]) == 4
    assert all(min(600, window - 40) < w <= window and h > 80 for w, h in measured["figures"])


def test_figures_follow_the_dark_page(page: Path) -> None:
    # Red when: to_svg leaves the figures' grey in place of the page's text colour.
    light, dark = measure(page), measure(page, "--blink-settings=preferredColorScheme=0")
    assert light["paper"] != dark["paper"]
    for measured in (light, dark):
        assert measured["ink"] in measured["inks"]
        assert "rgb(118, 131, 144)" not in measured["inks"]
