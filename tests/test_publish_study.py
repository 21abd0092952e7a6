"""What of a sweep gets into the repository, and how the pages find it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_two_hosts import load


def test_marks_name_rows() -> None:
    # Red when: the comma of a thousand becomes a dash, or a word's sign stays.
    slug = load("study_tables").slug
    assert [slug(text) for text in ("1,000", "+ ConAdv, tau = 1", "0.5")] == ["1000", "ConAdv-tau-1", "0-5"]


def test_a_table_may_be_one_row_group() -> None:
    # Red when: the first column is not compared, or is left in.
    content = {"head": ["arm", "tau", "kept"], "rows": [["+ A, 1", "1", "9"], ["B", "1", "8"]], "texts": 2}
    made = load("study_tables").report_table(content, "A-1")
    assert made.splitlines()[0] == "| tau | kept |"
    assert made.splitlines()[2:] == ["| 1 | 9 |"]
    with pytest.raises(SystemExit, match="No rows at 'C'"):
        load("study_tables").report_table(content, "C")


def test_what_staleness_keeps_has_a_row_for_every_arm_and_phase() -> None:
    # Red when: a phase takes another's column, or an arm another's row.
    head = ["arm", "tau", "predictor", "loss increase, peak", "loss increase, decay", "prediction error, peak"]
    rows = [[arm, tau, by, arm + tau + by[:2], f"{arm}{tau}{by[:2]} late", "-"] for arm in "AB" for tau in ("1", "2")
            for by in ("stale", "momentum")]  # fmt: skip
    made = load("study_tables").kept({"head": head, "rows": [["A", "0", "noise", "9", "8", "-"], *rows], "texts": 3})
    lines = made.splitlines()
    assert lines[0] == "| arm | phase | stale, tau = 1 | stale, tau = 2 | momentum, tau = 1 | momentum, tau = 2 |"
    assert lines[2] == "| A | peak | A1st | A2st | A1mo | A2mo |"
    assert lines[5] == "| B | decay | B1st late | B2st late | B1mo late | B2mo late |"
    assert len(lines) == 6


def test_only_figures_that_a_page_shows_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Red when: either half of the condition is dropped.
    publish = load("publish_study")
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    page = "![a](../img/studies/x/accuracy.png) ![g](../img/studies/x/gallery.png)"
    (tmp_path / "docs" / "results" / "x.md").write_text(page)
    assert publish.wanted("x/accuracy.png")
    assert not publish.wanted("x/gallery.png")
    assert not publish.wanted("x/curves.png")
    assert not publish.wanted("y/accuracy.png")
