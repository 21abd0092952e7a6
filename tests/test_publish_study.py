"""What of a sweep gets into the repository, and how the pages find it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from .test_two_hosts import load

STUDIES = Path(__file__).resolve().parent.parent / "results" / "studies"


def summary(**arms: list[float]) -> dict[str, Any]:
    """What is read of a study's summary.json: accuracies by seed, and a cost that is the number of the arm."""
    cells = [
        {
            "arm": arm,
            "test_accuracy": {"values": {str(seed): value for seed, value in enumerate(values)}},
            "cost": {"total": 100.0 * number},
        }
        for number, (arm, values) in enumerate(arms.items(), 1)
    ]
    return {"cells": cells}


def test_marks_name_rows() -> None:
    # Red when: the comma of a thousand becomes a dash, or a word's sign stays.
    slug = load("study_tables").slug
    assert [slug(text) for text in ("1,000", "+ ConAdv, tau = 1", "0.5")] == [
        "1000",
        "ConAdv-tau-1",
        "0-5",
    ]


def test_a_table_may_be_one_row_group() -> None:
    # Red when: the first column is not compared, or is left in.
    content = {
        "head": ["arm", "tau", "kept"],
        "rows": [["+ A, 1", "1", "9"], ["B", "1", "8"]],
        "texts": 2,
    }
    made = load("study_tables").report_table(content, "A-1")
    assert made.splitlines()[0] == "| tau | kept |"
    assert made.splitlines()[2:] == ["| 1 | 9 |"]
    with pytest.raises(SystemExit, match="No rows at 'C'"):
        load("study_tables").report_table(content, "C")


def test_what_staleness_keeps_has_a_row_for_every_arm_and_phase() -> None:
    # Red when: a phase takes another's column, or an arm another's row.
    head = [
        "arm",
        "tau",
        "predictor",
        "loss increase, peak",
        "loss increase, decay",
        "prediction error, peak",
    ]
    rows = [[arm, tau, by, arm + tau + by[:2], f"{arm}{tau}{by[:2]} late", "-"] for arm in "AB" for tau in ("1", "2")
            for by in ("stale", "momentum")]  # fmt: skip
    made = load("study_tables").kept(
        {"head": head, "rows": [["A", "0", "noise", "9", "8", "-"], *rows], "texts": 3}
    )
    lines = made.splitlines()
    assert (
        lines[0]
        == "| arm | phase | stale, tau = 1 | stale, tau = 2 | momentum, tau = 1 | momentum, tau = 2 |"
    )
    assert lines[2] == "| A | peak | A1st | A2st | A1mo | A2mo |"
    assert lines[5] == "| B | decay | B1st late | B2st late | B1mo late | B2mo late |"
    assert len(lines) == 6


def test_only_figures_that_a_page_shows_are_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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


def test_the_interval_of_a_share_holds_what_a_paired_test_does_not_refuse() -> None:
    # Red when: the covariance is left out, or the interval is that of the mean of the ratios.
    rng = np.random.default_rng(0)
    below = [float(x) for x in 2 + 0.8 * rng.standard_normal(5)]
    above = [float(0.7 * x + 0.3 * rng.standard_normal()) for x in below]
    low, high = load("study_contrasts").ratio_interval(above, below)
    assert [
        stats.ttest_1samp(np.array(above) - r * np.array(below), 0).pvalue for r in (low, high)
    ] == pytest.approx([0.05, 0.05])
    assert low < np.mean(above) / np.mean(below) < high
    with pytest.raises(SystemExit, match="may be 0"):
        load("study_contrasts").ratio_interval(above, [-1.0, 1.2, 0.1, -0.3, 0.2])


def test_what_is_kept_of_a_gain_is_said_with_its_aim() -> None:
    # Red when: the aim is asked of the middle of the interval, the gain is not over the baseline, or the rival's
    # accuracies are taken for another arm's.
    base = [0.40, 0.41, 0.42, 0.40]
    gains = [0.0200, 0.0201, 0.0199, 0.0200]
    arms = {
        "LARS": base,
        "ConAdv": [b + g for b, g in zip(base, gains, strict=True)],
        "ConAdv, much": [b + 0.95 * g for b, g in zip(base, gains, strict=True)],
        "ConAdv, little": [b + 0.5 * g for b, g in zip(base, gains, strict=True)],
        "recycle": [b + s * g for b, g, s in zip(base, gains, (1.1, 0.6, 0.8, 0.9), strict=True)],
    }
    rival = {seed: b + 0.01 for seed, b in enumerate(base)}
    head, rows = load("study_contrasts").gain(summary(**arms), "ConAdv", ("LAMB", rival))
    assert head[-1] == "against LAMB"
    assert [row[-1].split()[0] for row in rows[:3]] == ["+1.00", "+0.90", "+0.00"]
    assert head[1] == "gradient images, times LARS's"
    assert [row[0] for row in rows] == list(arms)[1:]
    assert [row[-2] for row in rows] == ["–", "yes", "no", "cannot be told"]
    assert rows[1][1] == "3"
    assert rows[2][3].startswith("50 % [50, 50]")


def test_held_out_images_have_a_table_of_their_own() -> None:
    # Red when: differences are of the test images, or the baseline's cost is not the yardstick.
    content = summary(A=[0.1, 0.1], B=[0.3, 0.3]) | {"baseline": "A", "controls": ["B"]}
    for number, cell in enumerate(content["cells"], 5):
        cell["test_accuracy"] |= {"mean": 0.2, "std": 0.01}
        values = {"0": number / 10, "1": number / 10 + 0.01 * (number - 5)}
        cell["validation_accuracy"] = {"values": values, "mean": number / 10, "std": 0.02}
    head, rows = load("study_contrasts").held_out(content)
    assert head[1:] == [
        "gradient images, times A's",
        "held-out accuracy, %",
        "test accuracy, %",
    ] + [f"against {arm}, held-out" for arm in "AB"]
    assert rows[0] == ["A", "1", "50.00 ± 2.00", "20.00 ± 1.00", "–", "−10.50 [−16.85, −4.15]"]
    assert rows[1][:2] == ["B", "2"]


def test_primary_comparisons_are_corrected_together() -> None:
    # Red when: the test images are taken, or p is corrected over fewer comparisons.
    contrasts = load("study_contrasts")
    names = dict.fromkeys(arm for pair in contrasts.PRIMARY for arm in pair)
    noise = np.random.default_rng(2).normal(0, 0.01, (len(names), 5))
    content = summary(**{arm: [0.5, 0.5] for arm in names})
    for cell, offsets in zip(content["cells"], noise, strict=True):
        high = 0.03 if "ConAdv" in cell["arm"] else 0.0
        cell["validation_accuracy"] = {
            "values": {str(seed): 0.4 + high + x for seed, x in enumerate(offsets)}
        }
    rows = contrasts.primary(content)[1]
    raw = [stats.ttest_rel(*(noise[list(names).index(arm)] + 0.03 * ("ConAdv" in arm) for arm in pair)).pvalue
           for pair in contrasts.PRIMARY]  # fmt: skip
    assert [row[3] for row in rows] == [f"{p:.2g}" for p in raw]
    assert float(rows[int(np.argmin(raw))][4]) == pytest.approx(4 * min(raw), rel=0.05)
    assert {row[5] for row in rows} == {"+0.00 [+0.00, +0.00]"}


def test_predictors_are_compared_at_the_same_staleness() -> None:
    # Red when: a predictor is compared with the stale weights of another tau, or Holm's family is one row.
    contrasts = load("study_contrasts")
    offsets = {"": 0.0, ", momentum": 0.01, ", last update": 0.02, ", momentum and gradient": 0.03}
    noise = np.random.default_rng(1).normal(0, 0.02, (2, 4, 5))
    arms = {
        f"+ ConAdv, tau = {tau}{by}": [
            float(0.5 + tau / 10 + offset + e) for e in noise[row, column]
        ]
        for row, tau in enumerate((1, 4))
        for column, (by, offset) in enumerate(offsets.items())
    }
    (head, rows), said = contrasts.predictors(summary(**arms))
    assert head == ["tau", *(f"{by} − stale" for by in contrasts.PREDICTORS),
                    "last update − momentum", "momentum and gradient − momentum"]  # fmt: skip
    assert rows[1][4].startswith(
        f"{100 * (0.01 + np.mean(noise[1, 2] - noise[1, 1])):+.2f}".replace("-", "−")
    )
    assert rows[1][0] == "4"
    assert said.startswith("Of these 10 differences ")


def test_dirty_commits_are_marked() -> None:
    # Red when: a clean commit is called dirty, or a dirty one is not.
    tables = load("study_tables")
    assert tables.commit("commit 0123456789, dirty yes") == "0123456 (dirty)"
    assert tables.commit("commit 0123456789, dirty no") == "0123456"
    facts = {"machines": ["m"], "software": ["s"], "command": "c", "cells": [{"seeds": [0, 1]}]}
    assert "dirty" not in tables.made({**facts, "git": ["commit 0123456789, dirty no"]})
    assert "; dirty is with" in tables.made({**facts, "git": ["commit 0123456789, dirty yes"]})


def test_runs_of_several_studies_are_said(tmp_path: Path) -> None:
    # Red when: runs are told apart by their names, which differ between studies, or one run is counted twice.
    def line(run: str, seconds: float) -> str:
        return json.dumps(
            {
                "run": run,
                "seed": 0,
                "steps": 5,
                "seconds": seconds,
                "test_accuracy": 0.5,
                "train_loss": 1.0,
            }
        )

    for name, lines in {
        "a": [line("x", 1.5), line("y", 2.5)],
        "b": [line("z", 1.5)],
        "c": [line("x", 9.0), line("w", 1.5)],
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "runs.jsonl").write_text("\n".join(lines) + "\n")
    shared = load("study_tables").shared
    assert shared(tmp_path, "a") == (
        " Trained once for several studies: 1 of its 2 runs, tuning included (1 with b, 1 with c)."
    )
    (tmp_path / "a" / "runs.jsonl").write_text(line("y", 2.5) + "\n")
    assert shared(tmp_path, "a") == ""


def test_how_robust_accuracy_was_measured_stands_below_the_tables() -> None:
    # Red when: the sharpness table gets the runs' way of measuring, or other tables get any.
    footnote = load("study_tables").footnote
    said = {"robust": "R <5.", "analysed_robust": "A."}
    assert [footnote(said, kind) for kind in ("accuracy", "sharpness", "costs")] == [
        "\n\nR &lt;5.",
        "\n\nA.",
        "",
    ]
    assert footnote({"analysed_robust": ""}, "sharpness") == ""


def test_a_published_study_is_reported_again(tmp_path: Path) -> None:
    # Red when: another run's results or costs are restored, or what was published of curves and probes is lost.
    records, study = load("study_records"), STUDIES / "lamb-cifar10"
    records.restore(study, tmp_path)
    made = records.report_again(study, tmp_path)
    before = json.loads((study / "summary.json").read_text())
    for name in ("tables", "git", "machines", "command", "differences"):
        assert made[name] == before[name]
    assert (tmp_path / "figures" / "cost.png").is_file()
    lines = (study / "runs.jsonl").read_text().splitlines()
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in ("sweep.json", "summary.json"):
        (wrong / file).write_text((study / file).read_text())
    first = json.loads(lines[0])
    (wrong / "runs.jsonl").write_text(
        "\n".join([json.dumps({**first, "test_accuracy": 0.1}), *lines[1:]])
    )
    records.restore(wrong, tmp_path / "again")
    with pytest.raises(SystemExit, match="are not those"):
        records.report_again(wrong, tmp_path / "again")


def analysed(arm: str, seed: int, sharp: float, final: float, here: float) -> dict[str, object]:
    measures = dict.fromkeys(("eigenvalue", "trace", "sam", "keskar"), sharp)
    return {
        "arm": arm,
        "seed": seed,
        **measures,
        "final_test_accuracy": final,
        "test_accuracy": here,
    }


def test_sharpness_is_ranked_against_accuracy() -> None:
    # Red when: the sign is turned, accuracies of the finished run and the checkpoint are exchanged, the arm to leave
    # out stays, or values are taken in place of ranks.
    runs = [
        *(analysed("a", seed, 1000.0, 0.9, 0.3) for seed in (0, 1)),
        *(analysed("b", seed, 10.0, 0.8, 0.2) for seed in (0, 1)),
        *(analysed("c", seed, 9.0, 0.95, 0.25) for seed in (0, 1)),
    ]
    head, rows = load("study_flatness").ranks(runs, "c")
    assert head[1:] == ["finished runs", "without c", "the same checkpoints", "without c"]
    assert [row[0] for row in rows] == list(load("study_flatness").MEASURES.values())
    assert [cell.split()[0] for cell in rows[0][1:]] == ["−0.50", "+1.00", "+0.50", "+1.00"]


def test_flatter_by_how_much_is_a_ratio_of_paired_seeds() -> None:
    # Red when: the ratio is turned, seeds are not paired, or the interval is that of the values and not of their logs.
    base = [analysed("LARS", seed, 8.0 * 2**seed, 0.9, 0.9) for seed in (0, 1, 2)]
    flat = [analysed("a", seed, 2.0 * 2**seed, 0.9, 0.9) for seed in (2, 0, 1)]
    wide = [analysed("b", seed, 8.0 * 2**seed / 4.0**seed, 0.9, 0.9) for seed in (0, 1, 2)]
    rows = load("study_flatness").ratios([*base, *flat, *wide])[1]
    assert rows[0][:2] == ["a", "4 [4, 4]"]
    middle, low, high = (float(text.strip("[],")) for text in rows[1][1].split())
    assert (middle, low * high) == (4.0, pytest.approx(16.0, rel=0.1))
    assert low < 1 < high


def test_what_is_published_of_an_analysis(tmp_path: Path) -> None:
    # Red when: tuning runs or runs without an analysis are taken, or the accuracy is not that at alpha = 0.
    cells = [{"arm": "a", "runs": ["runs/x", "runs/y"], "seeds": [3, 4]}]
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": cells}))
    for name in ("x", "y", "tuning"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "summary.json").write_text('{"test_accuracy": 0.9}')
    document = {
        "at_loss": 0.1,
        "step": 5,
        "newest_step": 9,
        "images": 8,
        "loss": 0.11,
        "accuracy": 1.0,
        "landscape_1d": {"alphas": [-1.0, 0.0, 1.0], "test_accuracy": [0.1, 0.7, 0.2]},
        "hessian": {"eigenvalues": [4.0, 1.0], "trace": 6.0},
        "sharpness": {"sam": {"value": 0.2}, "keskar": {"value": 3.0}},
    }
    for name in ("x", "tuning"):
        (tmp_path / "runs" / name / "analysis.json").write_text(json.dumps(document))
    (found,) = load("study_flatness").lines(tmp_path)
    assert (found["run"], found["seed"], found["step"], found["eigenvalue"], found["keskar"]) == (
        "x",
        3,
        5,
        4.0,
        3.0,
    )
    assert (found["test_accuracy"], found["final_test_accuracy"]) == (0.7, 0.9)


def test_an_interval_that_no_record_has_is_found_in_a_sentence(tmp_path: Path) -> None:
    # Red when: the middle, its sign or the interval is not compared, or an interval over a line's end is not seen.
    (tmp_path / "x").mkdir()
    content = summary(LARS=[0.40, 0.42, 0.41], LAMB=[0.43, 0.44, 0.42])
    (tmp_path / "x" / "summary.json").write_text(json.dumps(content))
    prose = load("study_prose")
    known = prose.figures(tmp_path)
    assert known == {("+2.00", "[−0.48, +4.48]"), ("−2.00", "[−4.48, +0.48]")}
    said = "LAMB is 2.00 points above LARS [−0.48,\n  +4.48], LARS −2.00 [−4.48, +0.48] to LAMB; [2.00](x.md) [12](y.md)."
    assert prose.unknown(said, known) == []
    assert prose.unknown("LAMB: −2.00 [−0.48, +4.48].", known) == ["−2.00 [−0.48, +4.48]"]
    assert (
        prose.unknown(
            "LAMB gains 2.00 of all points, over the line\n  that LARS has [−0.48, +4.48].", known
        )
        == []
    )
    assert prose.unknown("None [−0.48, +4.48].", known) == ["[−0.48, +4.48]"]
    wrong = "It gains +2.01 [−0.48, +4.48], or 2.00 points [−0.47, +4.48], or 80 % [22, 167]."
    assert prose.unknown(wrong, known) == [
        "+2.01 [−0.48, +4.48]",
        "2.00 [−0.47, +4.48]",
        "80 [22, 167]",
    ]


def test_a_claim_that_a_record_does_not_bear_stops_the_table(tmp_path: Path) -> None:
    # Red when: the verdict is not asked, or the cell of another batch is taken.
    arms = {"A": [0.50, 0.51, 0.52], "B": [0.401, 0.409, 0.42], "C": [0.41, 0.40, 0.415]}
    cells = [
        {**cell, "settings": {"global_batch_size": batch}}
        for batch in (4, 8)
        for cell in summary(**arms)["cells"]
    ]
    for cell in cells[3:]:
        cell["test_accuracy"]["values"] = {str(seed): 0.3 for seed in range(3)}
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "summary.json").write_text(json.dumps({"cells": cells}))
    study = load("study_answers").Study(tmp_path, "x")
    assert study.above("A", "B", 4) == "10.00 [+9.75, +10.25]"
    with pytest.raises(SystemExit, match=r"x: A to B is \+0.00 .*, not 'higher'"):
        study.above("A", "B", 8)
    with pytest.raises(SystemExit, match="2 cells of the arm 'A'"):
        study.above("A", "B")
    study.not_above(["B", "C"], "A", 4)
    with pytest.raises(SystemExit, match="A is not above C is not shown"):
        study.not_above(["B", "A"], "C", 4)
    study.summary["cells"] = cells[:3]
    assert study.alike("B", "C").startswith("+0.17 [")
    with pytest.raises(SystemExit, match="not 'not distinguishable'"):
        study.alike("A", "B")
