"""A sweep folder -> Study -> report, on the made-up sweep of tests/sweep_folder.py and on one real run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats as scipy_stats

from conadv.cli.program import main
from conadv.config.schema import Config, replace
from conadv.errors import ConadvError
from conadv.report import show_study
from conadv.report.stats import holm, paired_difference
from conadv.report.study import (
    StudySummary,
    accuracy_figure,
    answers,
    cost,
    cost_figure,
    differences,
    equal_cost,
    gallery,
    load_sweep,
    probes,
    sharpness,
    sharpness_figure,
    staleness_course_figure,
    staleness_figure,
    tables,
    write_sweep_report,
)
from conadv.report.study.figures import _sizes
from conadv.report.study.gallery import factor, magnify
from conadv.report.study.page import Picture

from .sweep_folder import ARMS, CONTROLS, IMAGES, write_sweep
from .test_report_browser import CHROMIUM, measure


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def study(folder: Path) -> Any:
    return load_sweep(folder)


@pytest.fixture(scope="module")
def report(folder: Path) -> Any:
    return write_sweep_report(folder, command="conadv sweep digits.yaml")


def edited(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of the sweep with other top-level values in sweep.json."""
    shutil.copytree(folder, to)
    document = json.loads((to / "sweep.json").read_text())
    (to / "sweep.json").write_text(json.dumps({**document, **changes}))
    return to


def cell(study: Any, arm: str, x: float = 300) -> Any:
    return next(found for found in study.at(x) if found.arm == arm)


# Reading


def test_a_sweep_is_read_as_cells(study: Any) -> None:
    """Red when: the largest x is taken over all arms' smallest, or seeds are not sorted."""
    assert (study.name, study.title, study.axis) == (
        "digits",
        "Digits <by> batch",
        "global_batch_size",
    )
    assert study.lines == tuple(ARMS)
    assert (study.points, study.largest) == ((20, 100, 300), 300)
    assert [run.seed for run in cell(study, "LARS").runs] == [0, 1, 2, 3]
    assert [found.arm for found in study.adversarial(300)] == [
        arm for arm in ARMS if "attack" in arm or "Con" in arm
    ]
    assert study.failed == (("runs/lars-7", "loss is <nan> in step 3"),)
    assert cell(study, "LARS").gap.mean == pytest.approx(0.99 - cell(study, "LARS").stat().mean)


def test_what_has_not_run_yet_is_counted_and_said(folder: Path, tmp_path: Path) -> None:
    """Red when: Cell.planned counts only the runs that exist."""
    partial = edited(folder, tmp_path / "sweep")
    for seed in (2, 3):
        shutil.rmtree(partial / "runs" / f"0-300-seed{seed}")
    shutil.rmtree(partial / "runs" / "6-20-seed0")
    (partial / "runs" / "1-20-seed0" / "summary.json").unlink()
    study = load_sweep(partial)
    assert tables.seeds(cell(study, "LARS")) == "2 of 4"
    assert tables.seeds(cell(study, CONTROLS[0], 20)) == "3 of 4"
    assert any(
        "4 of its runs are not finished" in note for note in StudySummary(study, partial).notes
    )


def test_arms_with_more_axes_are_lines_of_their_own(folder: Path, tmp_path: Path) -> None:
    """Red when: _agree() demands equal settings, so that the baseline, which has no eps axis, is never found."""
    document = json.loads((folder / "sweep.json").read_text())
    for raw in document["cells"]:
        if raw["arm"] == "+ sequential attack":
            raw["settings"]["attack.eps"] = 4 / 255
    study = load_sweep(edited(folder, tmp_path / "sweep", cells=document["cells"]))
    assert "+ sequential attack, eps 4/255" in study.lines
    found = [c for c in differences(study, 300) if c.cell.arm == "+ sequential attack"]
    assert [c.reference.arm for c in found] == ["LARS", *CONTROLS]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "readable"), ("[]", "not what conadv writes"), ('{"cells": []}', "no conf")],
)
def test_a_broken_sweep_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ConadvError, match=message):
        load_sweep(tmp_path)


# Numbers


def test_differences_are_those_of_scipy(study: Any) -> None:
    """Red when: p is one-sided, or the references of a control include the other controls."""
    found = differences(study, 300)
    assert (
        len(found) == 2 + 3 * 3
    )  # controls to the baseline; three attacks to the baseline and two controls
    one = next(
        c for c in found if c.cell.arm == "+ sequential attack" and c.reference.arm == CONTROLS[1]
    )
    a, b = (list(c.values().values()) for c in (one.cell, one.reference))
    test = scipy_stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    assert one.difference.mean == pytest.approx(np.mean(a) - np.mean(b))
    assert (one.difference.low, one.difference.high) == (
        pytest.approx(interval.low),
        pytest.approx(interval.high),
    )
    assert one.difference.p == pytest.approx(test.pvalue)


def test_holm_by_hand(study: Any) -> None:
    """Red when: holm() multiplies every p by m (Bonferroni), or forgets that adjusted p never fall."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
    found = differences(study, 300)
    assert min(c.adjusted for c in found) == pytest.approx(11 * min(c.difference.p for c in found))


def test_equal_pairs_have_no_p() -> None:
    assert paired_difference({0: 0.5, 1: 0.5}, {0: 0.25, 1: 0.25}).p is None  # type: ignore[union-attr]
    assert paired_difference({0: 0.5}, {0: 0.25}).p is None  # type: ignore[union-attr]


def test_cost_is_counted_in_gradient_images(study: Any) -> None:
    """Red when: total is per second, or per_image divides by the number of steps."""
    found = cost(cell(study, "+ sequential attack"))
    assert (found.per_image, found.total) == (pytest.approx(3), pytest.approx(3 * IMAGES))
    assert (found.step_seconds, found.seconds) == (pytest.approx(0.15), pytest.approx(30.0))


def test_the_equal_cost_rival_is_the_best_that_costs_no_more(study: Any) -> None:
    """Red when: equal_cost() takes the dearest rival, another attack, or one that costs more."""
    attack = cell(study, "+ ConAdv, look-ahead")
    found = equal_cost(study, attack)
    assert found.best.arm == "+ random-sign noise"
    assert found.share == pytest.approx(2 / 3)
    assert found.difference == paired_difference(attack.values(), found.best.values())
    assert equal_cost(study, cell(study, "LARS")).best is None


def test_what_others_spent_is_that_of_the_dearest(study: Any) -> None:
    """Red when: share is that of the best, which here is the cheapest."""
    base = cell(study, "LARS")
    runs = tuple(changed(run, summary={**run.summary, "test_accuracy": 0.999}) for run in base.runs)
    better = changed(
        study, cells=tuple(changed(c, runs=runs) if c is base else c for c in study.cells)
    )
    found = equal_cost(better, cell(better, "+ ConAdv, look-ahead"))
    assert found.best.arm == "LARS"
    assert found.share == pytest.approx(2 / 3)


def test_arms_of_the_same_cost_do_not_hide_one_another() -> None:
    """Red when: all costs are one group, or marks of one cost have one size."""
    assert _sizes([100.0, 300.0, 301.0, 302.0]) == pytest.approx([10.0, 10.0, 8.5, 7.0])


# The three questions


def test_the_first_question_names_trials_choice_split_and_edge(study: Any) -> None:
    text = " ".join(answers.tuned(study))
    assert text.startswith(
        "Yes. Settings were chosen by accuracy on 150 training images held out of every run"
    )
    assert "with seed 100; the test set took no part" in text
    assert "batch 300: lr 4 (3 trials: 1, 2, 4)" in text
    assert "At the edge, so a better value may lie outside: lr at batch 300." in text
    assert "Their choices at the edge: 0 of 16." in text
    assert "Every other arm had as many trials (3) at every batch." in text


def test_a_cell_that_stands_twice_is_no_crash(folder: Path, tmp_path: Path) -> None:
    """Red when: cells are compared with ==, which compares the arrays of their runs."""
    cells = json.loads((folder / "sweep.json").read_text())["cells"]
    study = load_sweep(edited(folder, tmp_path / "sweep", cells=[*cells, cells[0]]))
    assert answers.tuned(study)


def test_unfair_tuning_is_said(folder: Path, tmp_path: Path) -> None:
    """Red when: _others() or _seed_overlap() says nothing."""
    document = json.loads((folder / "sweep.json").read_text())
    for raw in document["cells"]:
        if raw["arm"] == "+ random-sign noise":
            raw["trials"] = []
        if raw["arm"] == "small batch, SGD":
            raw["trials"] = raw["trials"][:2]
    tune = {"seeds": [3, 100], "by": "test_accuracy", "tune_on": "LARS"}
    changes = {"cells": document["cells"], "spec": {"tune": tune}}
    text = " ".join(answers.tuned(load_sweep(edited(folder, tmp_path / "a", **changes))))
    assert "chosen by test_accuracy with seeds 3, 100, so the results are biased" in text
    assert "The other arms had 2 to 3 trials, so the effort was not the same." in text
    assert "Not tuned and use the choice made for LARS: + random-sign noise." in text
    assert "Seeds 3 were used for tuning and are reported too." in text
    for raw in document["cells"]:
        raw["trials"] = []
    text = " ".join(
        answers.tuned(load_sweep(edited(folder, tmp_path / "b", cells=document["cells"])))
    )
    assert text.startswith("No: this sweep tuned nothing.")


def test_the_other_questions_count_what_the_intervals_say(study: Any) -> None:
    """Red when: _beats_all() asks for any control instead of every one."""
    text = " ".join(answers.attack_or_images(study))
    assert "3 of 3 adversarial arms are above LARS at batch 300." in text
    assert "2 of 3 are above every control: + sequential attack; + ConAdv, look-ahead." in text
    equal = " ".join(answers.at_equal_cost(study))
    assert "2 of 3 adversarial arms are higher, 0 lower, 1 not distinguishable" in equal
    assert "nobody spent as much: the dearest such arm spent 67 % of it" in equal


def test_no_interval_is_no_verdict(folder: Path, tmp_path: Path) -> None:
    """Red when: a pair of single seeds is counted as not distinguishable, or left out of the count."""
    cells = json.loads((folder / "sweep.json").read_text())["cells"]
    for raw in cells:
        if raw["arm"] == "+ ConAdv, tau = 1":
            raw["runs"], raw["seeds"] = raw["runs"][:1], [0]
    study = load_sweep(edited(folder, tmp_path / "sweep", cells=cells))
    equal = " ".join(answers.at_equal_cost(study))
    assert (
        "2 of 3 adversarial arms are higher, 0 lower, 0 not distinguishable, 1 without an interval"
        in equal
    )
    text = " ".join(answers.attack_or_images(study))
    assert (
        "2 of 3 adversarial arms are above LARS at batch 300; no interval for 1 (one seed" in text
    )
    assert "for all 8 comparisons" in text


def test_nothing_above_is_not_corrected(folder: Path, tmp_path: Path) -> None:
    """Red when: _corrected() speaks of 0 differences."""
    study = load_sweep(
        edited(folder, tmp_path / "sweep", controls=[CONTROLS[1]], baseline="+ sequential attack")
    )
    flat = changed(study, cells=tuple(c for c in study.cells if c.arm != "+ ConAdv, look-ahead"))
    text = " ".join(answers.attack_or_images(flat))
    assert "0 of 1 adversarial arms are above" in text
    assert "Holm" not in text


def test_arms_that_do_not_attack_are_not_called_adversarial(folder: Path, tmp_path: Path) -> None:
    """Red when: the baseline's other rivals are called adversarial arms, or a control is asked for."""
    study = load_sweep(edited(folder, tmp_path / "sweep", controls=[]))
    plain = changed(study, cells=tuple(c for c in study.cells if c.arm in ("LARS", CONTROLS[0])))
    text = " ".join(answers.attack_or_images(plain) + answers.at_equal_cost(plain))
    assert text.startswith("No arm attacks. ")
    assert " of 1 arms are above LARS" in text
    assert "adversarial" not in text
    assert "No control" not in text
    apart = changed(plain, baseline=None, cells=tuple(c for c in plain.cells if c.arm != "LARS"))
    assert "adversarial" not in " ".join(
        answers.attack_or_images(apart) + answers.at_equal_cost(apart)
    )
    assert "adversarial arms are above" in " ".join(answers.attack_or_images(study))


def test_one_difference_is_not_counted(study: Any) -> None:
    """Red when: _corrected() counts one difference as several, or calls it kept without looking."""
    only = changed(
        study,
        controls=(),
        cells=tuple(c for c in study.at(300) if c.arm in ("LARS", "+ ConAdv, tau = 1")),
    )
    text = answers._corrected(only, differences(only, 300))
    assert text == [
        "The one such difference remains after Holm's correction for all 1 comparisons at this batch."
    ]
    assert differences(only, 300)[0].adjusted < 0.05


def test_an_edge_is_named_and_two_values_have_none(folder: Path, tmp_path: Path) -> None:
    """Red when: all settings of a cell are called at the edge, or one with two values is."""
    cells = json.loads((folder / "sweep.json").read_text())["cells"]
    for raw in cells:
        for trial, eps in zip(raw["trials"], (0.1, 0.2, 0.1), strict=True):
            trial["settings"]["attack.eps"] = eps
        raw["chosen"]["attack.eps"] = 0.2
    study = load_sweep(edited(folder, tmp_path / "sweep", cells=cells))
    base = cell(study, "LARS")
    assert (base.at_edge, base.only_edges) == (("optim.lr",), ("attack.eps",))
    assert cell(study, "LARS", 20).at_edge == ()
    rows = [[mark.text for mark in row] for row in tables.tuning(study).rows]
    assert {row[-1] for row in rows if row[:2] == ["300", "LARS"]} == {"lr at the edge"}
    assert {row[-1] for row in rows if row[:2] == ["20", "LARS"]} == {
        "inside (but two values of eps)"
    }
    assert (
        "With two values only, which is always an edge and counted as none: eps."
        in answers.tuned(study)
    )


def test_what_has_only_edges_is_not_said_to_be_inside(folder: Path, tmp_path: Path) -> None:
    """Red when: choices between two values are called "not at the edge", or counted among those that could be."""
    cells = json.loads((folder / "sweep.json").read_text())["cells"]
    for raw in cells:
        raw["trials"] = raw["trials"][:2]
    text = " ".join(answers.tuned(load_sweep(edited(folder, tmp_path / "sweep", cells=cells))))
    assert "at the edge" not in text
    assert text.count("With two values only, which is always an edge and counted as none: lr.") == 2


def test_an_edge_is_that_of_the_arm_it_was_tuned_on(folder: Path, tmp_path: Path) -> None:
    """Red when: a cell without trials is said to be inside."""
    cells = json.loads((folder / "sweep.json").read_text())["cells"]
    for raw in cells:
        if raw["arm"] == "+ random-sign noise":
            raw |= {"trials": [], "tuned_on": "LARS", "chosen": {"optim.lr": 4.0}}
    study = load_sweep(edited(folder, tmp_path / "sweep", cells=cells))
    assert cell(study, "+ random-sign noise").at_edge == ("optim.lr",)
    found = "Their choices at the edge: 3 of 16 (lr of + random-sign noise at batch 20, lr 4; "
    assert found in " ".join(answers.tuned(study))


def test_an_arm_that_diverged_has_no_mean_and_no_verdict(folder: Path, tmp_path: Path) -> None:
    """Red when: the seeds that did not diverge make a mean, an interval, or the rival at equal cost."""
    failed = [
        {"run": f"runs/{arm}-300-seed1", "error": "loss is nan in step 3", "diverged": True}
        for arm in (2, 5)
    ]
    broken = edited(folder, tmp_path / "sweep", failed=failed)
    for one in failed:
        (broken / one["run"] / "summary.json").unlink()
    study = load_sweep(broken)
    noise, ahead = cell(study, "+ random-sign noise"), cell(study, "+ ConAdv, look-ahead")
    assert (noise.diverged, noise.stat(), noise.gap, len(noise.values())) == (1, None, None, 3)
    rows = [[mark.text for mark in row] for row in tables.accuracy(study).rows]
    row = next(row for row in rows if row[:2] == ["300", "+ random-sign noise"])
    assert row[2:6] == ["3 of 4", "1 of 4 diverged", "–", "–"]
    pairs = {(c.cell.arm, c.reference.arm): c for c in differences(study, 300)}
    one = pairs["+ sequential attack", "+ random-sign noise"]
    assert (one.difference.verdict, one.adjusted) == ("no interval", None)
    assert one.text == "+ random-sign noise: 1 of 4 diverged"
    assert equal_cost(study, cell(study, "+ sequential attack")).best.arm == "LARS"
    marks = dict(answers.rows(study))[ahead.line]
    assert marks[0].text == "1 of 4 diverged"
    assert {mark.verdict for mark in marks} <= {"", "no interval"}
    assert "+ ConAdv, look-ahead: 1 of 4 diverged" in marks[-1].text
    assert "1 without an interval" in " ".join(answers.at_equal_cost(study))
    notes = " ".join(StudySummary(study, broken).notes)
    assert "+ random-sign noise at batch 300, 1 of 4 diverged; + ConAdv" in notes
    assert accuracy_figure(study) is not None
    (axes,) = accuracy_figure(changed(study, cells=tuple(study.at(300)))).axes  # type: ignore[union-attr]
    assert axes.get_yticklabels()[2].get_text() == "+ random-sign noise\n1 of 4 diverged"
    assert {len(line.get_xdata()) for line in axes.lines if list(line.get_ydata())[:1] == [2]} == {
        3
    }


def test_how_robust_accuracy_was_measured_is_said(study: Any, report: Any) -> None:
    """Red when: eps is that of the attack in training, steps and images change places, or one way speaks for all."""
    base = cell(study, "LARS")
    config = {
        **base.runs[0].config,
        "eval": {"robust_eps": 0.1, "robust_steps": 20, "robust_images": 250},
    }
    other = changed(base, runs=(changed(base.runs[0], config=config), *base.runs[1:]))
    mixed = changed(study, cells=(*(c for c in study.cells if c is not base), other))
    found = answers.robustness(study)
    assert found == "Robust accuracy: PGD with 10 steps, eps 4/255, on at most 1000 test images."
    assert (
        answers.robustness(mixed)
        == f"{found[:-1]}; PGD with 20 steps, eps 0.1, on at most 250 test images."
    )
    assert answers.analysed_robustness(study) == (
        "Robust accuracy: PGD with 10 steps, eps 0.01, on 500 test images."
    )
    assert (report.to_json()["robust"], report.to_json()["analysed_robust"]) == (
        found,
        answers.analysed_robustness(study),
    )


# Staleness and sharpness


def test_probe_averages_by_hand(study: Any) -> None:
    """Red when: the relative measure is not divided by the current weights', or phases are mixed."""
    probed = cell(study, "+ ConAdv, look-ahead", 100)
    cosine, increase, error = probes.MEASURES
    assert probes.predictors(probed) == ("current", "stale", "momentum", "noise")
    assert probes.taus(probed, "stale") == (1, 2, 4, 8)
    assert probes.average(probed, cosine, "stale", 4, "peak").mean == pytest.approx(0.6)
    ratio = probes.average(probed, increase, "momentum", 8, "decay")
    assert (ratio.mean, ratio.low, ratio.high) == (
        pytest.approx(0.6),
        pytest.approx(0.6),
        pytest.approx(0.6),
    )
    assert probes.average(probed, error, "momentum", 4, None).mean == pytest.approx(0.2)
    assert probes.average(probed, error, "current", 0, None) is None
    x, y = probes.course(probed, increase, "stale", 2)
    assert x == pytest.approx([step / 60 for step in range(0, 60, 5)])
    assert y == pytest.approx([0.8] * 6 + [0.9] * 6)
    names = [
        (name, round(start, 3), round(end, 3)) for name, start, end in probes.phase_spans(probed)
    ]
    assert names == [("warm-up", 0.0, 0.125), ("peak", 0.125, 0.458), ("decay", 0.458, 1.0)]


def test_sharpness_reads_what_was_measured(study: Any) -> None:
    """Red when: value() takes a part that was switched off for 0."""
    attacked = cell(study, "+ sequential attack")
    eigenvalue, keskar = sharpness.MEASURES[1], sharpness.MEASURES[4]
    assert sharpness.statistic(attacked, eigenvalue).mean == pytest.approx(2.65)
    assert sharpness.statistic(attacked, keskar) is None
    assert sharpness.statistic(cell(study, "+ ConAdv, tau = 1"), eigenvalue) is None
    assert [row[1].text for row in tables.sharp(study).rows] == ["LARS", "+ sequential attack"]


# Figures


def test_figures_show_the_data(study: Any, tmp_path: Path) -> None:
    """Red when: the means are fractions, or the x axis of the cost counts clean images or moves marks aside."""
    axes = accuracy_figure(study, tmp_path / "img" / "a.png").axes[0]  # type: ignore[union-attr]
    base = [cell(study, "LARS", x).stat().mean for x in study.points]
    drawn = next(line for line in axes.lines if len(line.get_xdata()) == 3)
    assert drawn.get_ydata() == pytest.approx([100 * mean for mean in base])
    assert (tmp_path / "img" / "a.png").read_bytes().startswith(b"\x89PNG")
    panels = cost_figure(study).axes  # type: ignore[union-attr]
    assert [panel.get_title(loc="left") for panel in panels] == [
        "batch 20",
        "batch 100",
        "batch 300",
    ]
    assert panels[2].get_xlabel() == "gradient images of the\nwhole training, thousands"
    marks = {float(line.get_xdata()[0]) for line in panels[2].lines if len(line.get_xdata()) == 1}
    assert sorted(marks) == pytest.approx(
        [views * IMAGES / 1e3 for views in (1, 2, 3)]
    )  # at the true cost, not beside it
    assert len(sharpness_figure(study).subfigs[0].axes) == 3  # type: ignore[union-attr]


def test_arms_at_one_batch_are_rows(study: Any) -> None:
    """Red when: names and means are in different orders, or the dotted line is not the baseline's mean."""
    at_100 = changed(study, cells=tuple(study.at(100)))
    (axes,) = accuracy_figure(at_100).axes  # type: ignore[union-attr]
    assert [tick.get_text().replace("\n", " ") for tick in axes.get_yticklabels()] == list(
        at_100.lines
    )
    assert axes.yaxis_inverted()
    for row, line in enumerate(at_100.lines):
        mean = 100 * cell(study, line, 100).stat().mean
        assert any(
            list(one.get_xdata()) == pytest.approx([mean])
            for one in axes.lines
            if list(one.get_ydata()) == [row]
        )
    dotted = next(line for line in axes.lines if line.get_linestyle() == ":")
    assert dotted.get_xdata()[0] == pytest.approx(100 * cell(study, "LARS", 100).stat().mean)


def test_the_staleness_table_by_hand(study: Any) -> None:
    """Red when: phases are mixed, or the share is not of the current weights' increase."""
    made = tables.staleness(study)
    assert made.head[3:6] == [
        "loss increase, warm-up",
        "loss increase, peak",
        "loss increase, decay",
    ]
    rows = [[mark.text for mark in row] for row in made.rows]
    row = next(row for row in rows if row[:3] == ["+ ConAdv, look-ahead", "2", "stale"])
    assert row[4:6] == ["80\u00a0%", "90\u00a0%"]
    row = next(row for row in rows if row[:3] == ["+ ConAdv, look-ahead", "4", "momentum"])
    assert row[7] == "20\u00a0%"
    assert not any(row[2] == "current" for row in rows)
    assert [row[1] for row in rows] == sorted(row[1] for row in rows)


@pytest.mark.parametrize(("least", "scale"), [(1.0, "linear"), (0.01, "log"), (0.0, "linear")])
def test_sharpness_of_different_sizes_is_drawn_on_a_log_axis(least: float, scale: str) -> None:
    """Red when: 0 is put on a log axis, or what is tens of times larger makes one dot of the rest."""
    axes = Figure().add_subplot()
    axes.plot([least, 1.0, 2.0], [0, 1, 2])
    sharpness._spread_out(axes)
    assert axes.get_xscale() == scale


def test_staleness_figures_have_a_panel_per_measure(study: Any) -> None:
    by_tau, course = staleness_figure(study), staleness_course_figure(study)
    assert by_tau is not None
    assert course is not None
    assert (len(by_tau.axes), len(course.axes)) == (9, 6)
    np.testing.assert_allclose(by_tau.axes[0].lines[0].get_ydata(), [0.9, 0.8, 0.6, 0.2])
    assert staleness_figure(study, line="LARS") is None


# The files


def test_the_page_is_escaped_and_complete(folder: Path, report: Any) -> None:
    """Red when: autoescape is off, or a section's condition is wrong."""
    page = (folder / "report.html").read_text()
    assert "Digits &lt;by&gt; batch" in page
    assert "<by>" not in page
    assert "loss is &lt;nan&gt; in step 3" in page
    for part in (
        "questions",
        "result",
        "differences",
        "cost",
        "tuning",
        "staleness",
        "sharpness",
        "images",
        "runs",
    ):
        assert f'<section id="{part}">' in page
    assert page.count("<svg") == 7
    assert "has a checkpoint, so there are no images" in page
    names = {path.name for path in (folder / "figures").iterdir()}
    assert names >= {"accuracy.png", "cost.png", "sharpness.png", "curves.png", "staleness-1.png"}
    assert "tune-" not in page  # tuning runs are no results


def test_markdown_tables_are_whole(folder: Path, report: Any) -> None:
    """Red when: a macro of study.md.j2 drops a line break."""
    text = (folder / "report.md").read_text()
    assert "Digits &lt;by&gt; batch" in text
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) >= 7
    for block in blocks:
        assert len(block) >= 3
        assert len({line.replace("\\|", "").count("|") for line in block}) == 1
    for line in text.splitlines():
        if line.startswith("!["):
            assert (folder / line.partition("](")[2].rstrip(")")).is_file()


def test_the_json_holds_the_numbers(folder: Path, report: Any) -> None:
    document = json.loads((folder / "summary.json").read_text())
    assert document == report.to_json()
    first = document["cells"][2]
    assert (first["arm"], first["settings"], first["at_edge"]) == (
        "LARS",
        {"global_batch_size": 300},
        ["optim.lr"],
    )
    values = first["test_accuracy"]["values"].values()
    assert first["test_accuracy"]["mean"] == pytest.approx(math.fsum(values) / 4)
    assert len(document["differences"]) == len(differences(report.study))


def test_the_terminal_says_the_same(report: Any) -> None:
    console = Console(width=150)
    with console.capture() as capture:
        show_study(report, console)
    text = " ".join(capture.get().split())
    assert " ".join(answers.tuned(report.study)) in text
    assert answers.rows(report.study)[0][1][1].text in text


def test_the_command_line_reports_a_sweep(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written: dict[str, Any] = {}

    def write(path: Path, out: Path, *, baseline: str | None) -> Any:
        written.update(path=path, out=out, baseline=baseline)
        return None

    monkeypatch.setattr("conadv.report.write_sweep_report", write)
    monkeypatch.setattr("conadv.report.show_study", lambda summary: None)
    assert main(["report", str(folder), "--baseline", "LARS"]) == 0
    assert written == {"path": folder, "out": folder / "report.html", "baseline": "LARS"}
    assert main(["report", str(folder), str(tmp_path)]) != 0
    assert "name it alone" in capsys.readouterr().err


def test_an_unknown_baseline_is_an_error(folder: Path) -> None:
    with pytest.raises(ConadvError, match="Did you mean 'LARS'"):
        load_sweep(folder, "LARX")
    assert load_sweep(folder, CONTROLS[0]).controls == CONTROLS[1:]


# Images


def test_images_come_from_a_checkpoint(tmp_path: Path) -> None:
    """Red when: magnify() does not centre at grey, or the attack is left out."""
    from conadv.training.loop import train

    config = replace(
        Config(),
        method="disadv",
        steps=2,
        global_batch_size=32,
        attack__eps=8 / 255,
        model__width=4,
        eval__train_images=10,
        eval__robust_images=0,
    )
    train(config, tmp_path / "runs" / "a", device="cpu")
    cells = [
        {"arm": "attack", "settings": {"global_batch_size": 32}, "runs": ["runs/a"], "seeds": [0]}
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"axis": "global_batch_size", "cells": cells}))
    shown = gallery(load_sweep(tmp_path), 4)
    assert shown.figure is not None
    assert "eps 8/255" in shown.text
    assert "magnified 15.9 times" in shown.text  # 0.5 / (8 / 255)
    pictures = [axes.images[0].get_array() for axes in shown.figure.axes]
    assert len(pictures) == 12
    clean, change, attacked = (np.stack(pictures[row * 4 : row * 4 + 4]) for row in range(3))
    assert np.abs(attacked - clean).max() == pytest.approx(8 / 255, rel=1e-4)
    np.testing.assert_allclose(change, 0.5 + (attacked - clean) / (16 / 255), atol=1e-4)
    picture = Picture("gallery", "<x>", shown.text, shown.figure, raster=True)
    assert picture.markup.startswith('<img alt="&lt;x&gt;" src="data:image/png;base64,')
    assert StudySummary(load_sweep(tmp_path), tmp_path).to_json()["baseline"] is None


def test_no_change_is_grey() -> None:
    same = np.full((1, 2, 2, 1), 0.3)
    assert magnify(same, same) == pytest.approx(np.full((1, 2, 2, 1), 0.5))
    assert factor(same, same) == 1.0


# The browser


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on PATH")
@pytest.mark.parametrize("width", [1280, 360])
def test_the_questions_fit_on_one_screen(folder: Path, report: Any, width: int) -> None:
    """Red when: style.css loses the columns of .answers (one screen) or ".scroll { overflow-x: auto }" (narrow)."""
    measured = measure(folder / "report.html", width=width)
    content, window = measured["page"]
    assert content <= window
    assert measured["rows"] == 3
    assert len(measured["figures"]) == 7
    if width == 1280:
        assert measured["bottom"] <= 720
