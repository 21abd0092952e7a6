"""What of a sweep gets into the repository, and what pages draw from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from conadv.report.comparison import read_sweep

from .report_records import write_sweep
from .test_two_hosts import load

STUDIES = Path(__file__).resolve().parent.parent / "results" / "studies"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def publish(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The script with a repository of its own, into which it has published ``sweep``."""
    script = load("publish_study")
    for name in ("STUDIES", "PICTURES", "ROOT"):
        setattr(script, name, tmp_path_factory.mktemp(name))
    script.publish(sweep)
    return script


def test_pages_have_the_tables_of_the_records() -> None:
    # Red when: a number of a table in README.md or docs/ is edited by hand.
    script = load("publish_study")
    for page in (script.ROOT / "README.md", *(script.ROOT / "docs").rglob("*.md")):
        for found in script.MARK.finditer(page.read_text()):
            assert found[0] == f"{found[1]}{script.section(found['what'])}\n{found[3]}", page.name


@pytest.mark.parametrize("folder", sorted(STUDIES.iterdir()), ids=lambda path: path.name)
def test_studies_published_by_version_01_are_read(folder: Path) -> None:
    # Red when: results, roles or costs are of another arm, or the unit of the cost changes.
    before = json.loads((folder / "summary.json").read_text())
    study = read_sweep(folder)
    arms = {(arm.grid["global_batch_size"], arm.name): arm for arm in study.arms}
    seen = 0
    for cell in before["cells"]:
        found = [
            a
            for (x, n), a in arms.items()
            if x == cell["settings"]["global_batch_size"] and n.startswith(cell["arm"])
        ]
        values = cell["test_accuracy"] and cell["test_accuracy"]["values"]
        same = [a for a in found if values == {str(s): v for s, v in a.values().items()}]
        if values:
            seen += 1
            assert same[0].medians.gradient_images == pytest.approx(cell["cost"]["total"])
    assert seen > 1
    p = {(a.x, a.name, b.name): (d.p, adjusted) for a, b, d, adjusted in study.contrasts()}
    for found in before["differences"]:
        assert p[found["x"], found["arm"], found["minus"]] == pytest.approx(
            (found["p"], found["p_holm"])
        )


def test_a_sweep_is_published_and_drawn_again(publish: Any, sweep: Path) -> None:
    # Red when: a line takes another run's results, or the published study has other numbers than
    # the sweep.
    folder = publish.STUDIES / "digits"
    (publish.PICTURES / "digits" / "accuracy.png").unlink()
    publish.draw_figures()
    names = {file.name for file in (publish.PICTURES / "digits").iterdir()}
    assert names == {"cost.png", "training.png", "sharpness.png"}
    again, before = read_sweep(folder), read_sweep(sweep)
    for new, old in zip(again.arms, before.arms, strict=True):
        assert (new.name, new.role, new.edge, new.attacks) == (
            old.name,
            old.role,
            old.edge,
            old.attacks,
        )
        assert new.values().to_dict() == old.values().to_dict()
        assert new.medians.gradient_images == old.medians.gradient_images
    assert publish.section("digits made").startswith(
        "4 seeds; `conadv sweep studies/digits.yaml`; "
    )
    assert "0123abc" in publish.section("digits made")
    assert "| + ConAdv | 2 | stale | 80 |" in publish.section("digits staleness | at: 100")


def test_a_mark_says_what_is_drawn(publish: Any) -> None:
    # Red when: the metric, the place, or the family of the named pairs is not the mark's.
    short = publish.section("digits accuracy | at: 300 | columns: arm; cost").splitlines()
    assert short[0] == "| arm | cost |"
    assert short[2:4] == ["| LARS | 1 |", "| + second clean view | 2 |"]
    pairs = [("+ ConAdv", "LARS"), ("+ ConAdv", "+ random-sign noise")]
    said = publish.section(
        "digits differences | at: 300 | pairs: " + "; ".join(map(" minus ".join, pairs))
    )
    arms = {arm.name: arm for arm in read_sweep(publish.STUDIES / "digits").at(300)}
    raw = sorted(stats.ttest_rel(arms[a].values(), arms[b].values()).pvalue for a, b in pairs)
    assert {line.split(" | ")[-1] for line in said.splitlines()[2:]} <= {
        f"{p:.3f} |" if p > 5e-4 else "< 0.001 |".replace("<", "&lt;")
        for p in (2 * raw[0], max(raw[1], 2 * raw[0]))
    }
    win = load("publish_study").section(
        "win-cifar10 against | to: LARS; LAMB | on: validation_accuracy | "
        "columns: arm; against its optimizer alone"
    )
    assert "| LAMB | – |" in win
    assert "| LAMB + ConAdv | +1.18 [+0.60, +1.76] |" in win
    with pytest.raises(SystemExit, match="No rows"):
        publish.section("digits accuracy | at: 7")


def test_a_page_that_differs_is_found_and_mended(
    publish: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: --check writes, or what stands outside of the marks changes.
    (publish.ROOT / "docs").mkdir(parents=True)
    page = publish.ROOT / "README.md"
    page.write_text(text := "a\n<!-- table: digits tuning -->\nold\n<!-- end table -->\nb\n")
    monkeypatch.setattr("sys.argv", ["publish_study.py", "--check"])
    with pytest.raises(SystemExit, match=r"README\.md is not what"):
        publish.main()
    assert page.read_text() == text
    monkeypatch.setattr("sys.argv", ["publish_study.py", "--readme"])
    publish.main()
    assert page.read_text().startswith("a\n<!-- table: digits tuning -->\n| batch |")
    assert page.read_text().endswith("|\n<!-- end table -->\nb\n")
