"""Run directories and sweeps -> arms -> numbers, tables, figures and pages."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from conadv.cli.program import main
from conadv.errors import ConadvError
from conadv.report import Report, tables, write_report, write_sweep_report
from conadv.report.accuracy_figure import draw_accuracy, draw_cost
from conadv.report.comparison import Arm, Comparison, compare, read_sweep
from conadv.report.load import find_runs, load_run
from conadv.report.page import escape, notes_on
from conadv.report.stats import holm, paired_difference
from conadv.report.training_curves_figure import draw_curves

from .report_records import ARMS, CONTROLS, make_config, write_run, write_sweep

STALENESS = "staleness: share of steps"
EVIL = '<script>alert("1")</script> $\\frac$ --> | [x](y) & _a_ \n*b*'


def load(folder: Path, **options: Any) -> Comparison:
    return compare([load_run(path) for path in find_runs([folder])], **options)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def report(sweep: Path) -> Report:
    return write_sweep_report(sweep, command="conadv sweep digits.yaml")


@pytest.fixture
def study(report: Report) -> Comparison:
    return report.comparison


def edited(sweep: Path, to: Path, **changes: Any) -> Path:
    """A copy of the sweep with other top-level values in sweep.json."""
    shutil.copytree(sweep, to)
    document = json.loads((to / "sweep.json").read_text())
    (to / "sweep.json").write_text(json.dumps({**document, **changes}))
    return to


def arm(comparison: Comparison, name: str, x: float | None = 300) -> Arm:
    return next(found for found in comparison.at(x) if found.name == name)


def row(frame: pd.DataFrame, *values: str) -> dict[str, str]:
    """The row whose first cells are ``values``."""
    return next(dict(r) for _, r in frame.iterrows() if tuple(r[: len(values)]) == values)


# Reading runs


def test_a_run_is_read_as_columns(tmp_path: Path) -> None:
    # Red when: _columns fills missing values with 0 (recycle has no version in step 0).
    run = load_run(write_run(tmp_path / "run", make_config("recycle", seed=3)))
    assert (run.seed, len(run.steps), run.status) == (3, 60, "finished")
    assert {"losses.clean", "losses.adv", "phases.gradient"} <= set(run.steps)
    assert np.isnan(run.steps["weight_version"][0])
    np.testing.assert_array_equal(run.steps["weight_version"][1:], np.arange(59))
    np.testing.assert_array_equal(run.evals["step"], np.arange(5, 61, 5))


@pytest.mark.parametrize("keep", [0, 1, 20])
def test_a_killed_run_is_unfinished_and_reported_as_far_as_it_came(
    tmp_path: Path, keep: int
) -> None:
    # Red when: the line that was cut off raises, or an unfinished run counts.
    path = write_run(tmp_path / "run", make_config(), None)
    lines = (path / "record.jsonl").read_text().splitlines(keepends=True)
    (path / "record.jsonl").write_text("".join(lines[:keep]) + lines[keep][:30])
    write_run(tmp_path / "other", make_config(seed=1), 0.9)
    report = write_report([tmp_path], tmp_path / "report.html")
    (found,) = report.comparison.arms
    assert (found.planned, list(found.values())) == (2, [0.9])
    steps = {0: "0 of ?", 1: "0 of 60", 20: "16 of 60"}[keep]
    assert f"unfinished: {steps} steps" in (tmp_path / "report.html").read_text()
    assert report.notes[0] == "Runs that are not finished and not counted: 1."


def test_a_run_without_config_or_with_half_a_summary_is_read(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", make_config())
    (path / "summary.json").write_text('{"test_accuracy": 0.9')
    (path / "config.yaml").unlink()
    run = load_run(path)
    assert (run.summary, run.config["method"]) == (None, "vanilla")


def test_runs_of_version_01_are_reported(tmp_path: Path) -> None:
    folder = Path(__file__).parent / "data" / "v01"
    report = write_report([folder], tmp_path / "report.html")
    assert {found.method for found in report.comparison.arms} == {"vanilla", "conadv"}


@pytest.mark.parametrize(
    "record", ["", '{"type": "step"}\n', "[1, 2]\n", "no json\nat all\n", None]
)
def test_folders_that_are_not_runs_are_errors_that_name_them(
    tmp_path: Path, record: str | None
) -> None:
    (tmp_path / "odd").mkdir()
    if record is not None:
        (tmp_path / "odd" / "record.jsonl").write_text(record)
    for read in (lambda: load_run(tmp_path / "odd"), lambda: load(tmp_path / "odd")):
        with pytest.raises(ConadvError, match="odd"):
            read()


def test_runs_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    # Red when: a run is looked up by its path as given, or what lies in a run is searched.
    deep = write_run(tmp_path / "a" / "b" / "c", make_config())
    flat = write_run(tmp_path / "d", make_config(seed=1))
    write_run(flat / "checkpoints" / "inner", make_config(seed=2))
    assert find_runs([tmp_path, deep, tmp_path / "a"]) == [deep, flat]


# Arms


def test_arms_are_named_after_what_sets_them_apart(tmp_path: Path) -> None:
    # Red when: the seed makes an arm, the batch is not named, or a method is told apart by
    # settings that it does not use.
    configs = [
        {"global_batch_size": 20},
        {"attack__eps": 0.3},
        {"method": "noise"},
        {"method": "conadv"},
        {"method": "conadv", "lookahead": True},
    ]
    for number, changes in enumerate(configs):
        for seed in range(2):
            write_run(tmp_path / f"{number}-{seed}", make_config(**{"seed": seed, **changes}))
    comparison = load(tmp_path)
    names = ["vanilla, batch 20", "vanilla, batch 100", "noise, batch 100"]
    names += ["conadv tau=1, batch 100", "conadv tau=1 + look-ahead, batch 100"]
    assert [(found.name, found.planned) for found in comparison.arms] == [(n, 2) for n in names]
    assert [found.name for found in comparison.arms if found.role == "baseline"] == names[1:2]


def test_given_names_and_baseline(tmp_path: Path) -> None:
    names = {}
    for seed in range(2):
        for method, accuracy in (("vanilla", 0.9), ("noise", 0.95)):
            run = write_run(tmp_path / f"{method}{seed}", make_config(method, seed), accuracy)
            names[str(run)] = f"my {method}"
    ((_, _, found, _),) = load(tmp_path, names=names, baseline="my noise").contrasts()
    assert found.mean == pytest.approx(-0.05)
    with pytest.raises(ConadvError, match="Did you mean 'my noise'"):
        load(tmp_path, names=names, baseline="my nois")


def test_the_latest_finished_run_of_a_seed_is_used(tmp_path: Path) -> None:
    # Red when: runs are sorted by start alone, so that the later unfinished run wins.
    for day, (name, accuracy) in enumerate({"a": 0.90, "b": 0.91, "c": None}.items(), 4):
        record = write_run(tmp_path / name, make_config(), accuracy) / "record.jsonl"
        record.write_text(record.read_text().replace("2026-03-04", f"2026-03-{day:02}"))
    (found,) = load(tmp_path).arms
    assert [run.path.name for run in found.runs] == ["b"]
    assert found.repeats == 2


def test_what_makes_runs_hard_to_compare_is_noted(tmp_path: Path) -> None:
    write_run(tmp_path / "a", make_config())
    record = write_run(tmp_path / "b", make_config("noise", eval__robust_steps=3)) / "record.jsonl"
    text = record.read_text().replace("Example CPU", "Other CPU").replace("false", "true")
    record.write_text(text.replace('"version": "0.1.0"', '"version": "0.2.0"'))
    notes = " ".join(notes_on(load(tmp_path)))
    for piece in ("single seed", "3 steps, eps", "machines", "versions", "uncommitted"):
        assert piece in notes


# Reading sweeps


def test_a_sweep_is_read_as_arms(study: Comparison) -> None:
    assert (study.title, study.points) == ("Digits <by> batch", [20, 100, 300])
    assert list(study.latest) == list(ARMS)
    roles = "baseline control control tested tested"
    assert [one.role for one in study.at(300)] == roles.split()
    assert [run.seed for run in arm(study, "LARS").runs] == [0, 1, 2, 3]
    assert [one.attacks for one in study.at(300)] == [False, False, False, True, True]


def test_what_has_not_run_yet_is_counted(sweep: Path, tmp_path: Path) -> None:
    partial = edited(sweep, tmp_path / "sweep")
    for seed in (2, 3):
        shutil.rmtree(partial / "runs" / f"0-300-seed{seed}")
    shutil.rmtree(partial / "runs" / "5-20-seed0")
    (partial / "runs" / "1-20-seed0" / "summary.json").unlink()
    study = read_sweep(partial)
    assert row(tables.accuracy(study), "300", "LARS")["seeds"] == "2 of 4"
    assert notes_on(study)[0] == "Runs that are not finished and not counted: 4."


def test_arms_with_more_axes_are_compared_where_they_agree(sweep: Path, tmp_path: Path) -> None:
    # Red when: comparable() wants equal grids, so that the baseline, without an eps axis, is not
    # found.
    cells = json.loads((sweep / "sweep.json").read_text())["cells"]
    for raw in cells:
        if raw["arm"] == "+ sequential attack":
            raw["settings"]["attack.eps"] = 4 / 255
    study = read_sweep(edited(sweep, tmp_path / "sweep", cells=cells))
    found = [b.name for a, b, *_ in study.contrasts() if a.name == "+ sequential attack, eps 4/255"]
    assert found == ["LARS", *CONTROLS] * 3


def test_another_baseline_may_be_named(sweep: Path) -> None:
    with pytest.raises(ConadvError, match="Did you mean 'LARS'"):
        read_sweep(sweep, "LARX")
    roles = {one.name: one.role for one in read_sweep(sweep, CONTROLS[0]).arms}
    assert [roles[n] for n in (*CONTROLS, "LARS")] == ["baseline", "control", "tested"]


def test_an_arm_that_diverged_has_no_mean_and_no_verdict(sweep: Path, tmp_path: Path) -> None:
    # Red when: the seeds that did not diverge make a mean, an interval, or the rival at equal cost.
    failed = [{"run": "runs/2-300-seed1", "error": "loss is nan", "diverged": True}]
    broken = edited(sweep, tmp_path / "sweep", failed=failed)
    (broken / failed[0]["run"] / "summary.json").unlink()
    study, noise = read_sweep(broken), "+ random-sign noise"
    assert math.isnan(arm(study, noise).mean())
    found = row(tables.accuracy(study), "300", noise)
    assert found["test accuracy, %"] == "1 of 4 diverged"
    assert found["against the baseline"] == f"{noise}: 1 of 4 diverged"
    contrasts = {(a.name, b.name): (d, p) for a, b, d, p in study.contrasts() if a.x == 300}
    difference, adjusted = contrasts["+ sequential attack", noise]
    assert (difference.low, difference.p, adjusted) == (None, None, None)
    assert study.equal_cost(arm(study, "+ sequential attack")) is arm(study, "LARS")
    assert "Where a run diverged" in " ".join(notes_on(study))


# Statistics


def test_a_paired_interval_by_hand_and_by_scipy() -> None:
    # Red when: the test is unpaired or one-sided, has n degrees of freedom, or 0.95 for 0.975.
    own = pd.Series({0: 0.98, 1: 0.97, 2: 0.99, 9: 0.1})
    base = pd.Series({0: 0.97, 1: 0.965, 2: 0.975, 7: 0.9})
    found = paired_difference(own, base)
    assert found is not None
    half = 4.302653 * 0.005 / math.sqrt(3)  # t(0.975, 2) from a printed table
    assert found[:4] == pytest.approx((3, 0.010, 0.010 - half, 0.010 + half))
    test = scipy_stats.ttest_rel([0.98, 0.97, 0.99], [0.97, 0.965, 0.975])
    interval = test.confidence_interval(0.95)
    assert found[2:] == pytest.approx((interval.low, interval.high, test.pvalue), rel=1e-12)


@pytest.mark.parametrize(
    ("shift", "signs"),
    [
        ((0.020, 0.021, 0.022), (1, 1)),
        ((-0.02, -0.021, -0.022), (-1, -1)),
        ((0.03, 0, -0.01), (-1, 1)),
        ((0.25, 0.25, 0.25), (1, 1)),
        ((0.02,), None),
    ],
)
def test_intervals(shift: tuple[float, ...], signs: tuple[int, int] | None) -> None:
    # Red when: one pair has an interval, or an interval of no width is evidence.
    found = paired_difference(pd.Series([0.5 + x for x in shift]), pd.Series([0.5] * len(shift)))
    assert found is not None
    assert (found.low and (np.sign(found.low), np.sign(found.high))) == signs
    assert (found.p is None) == (len(set(shift)) == 1)
    assert paired_difference(pd.Series({0: 0.9}), pd.Series({1: 0.9})) is None


def test_holm_by_hand() -> None:
    # Red when: every p is multiplied by m (Bonferroni), or adjusted p may fall.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_contrasts_are_corrected_within_a_batch(study: Comparison) -> None:
    # Red when: Holm's family is all batches, or controls are compared with one another.
    found = [one for one in study.contrasts() if one[0].x == 300]
    assert len(found) == 4 + 2 * 2
    p = [difference.p for *_, difference, _ in found]
    assert [adjusted for *_, adjusted in found] == pytest.approx(holm(p))  # type: ignore[arg-type]
    pairs = [("+ ConAdv", "LARS"), ("+ sequential attack", "+ ConAdv")]
    named = [(a.name, b.name) for a, b, *_ in study.contrasts(pairs) if a.x == 300]
    assert sorted(named) == sorted(pairs)


def test_the_rival_at_equal_cost_is_the_best_that_costs_no_more(study: Comparison) -> None:
    # Red when: it is the dearest, another attack, or one that costs more.
    attack = arm(study, "+ ConAdv")
    assert attack.medians.gradient_images == pytest.approx(3 * 60 * 300)
    assert study.equal_cost(attack) is arm(study, "+ random-sign noise")
    assert study.equal_cost(arm(study, "LARS")) is None


# Tables


def test_the_accuracy_table_holds_the_numbers(study: Comparison) -> None:
    # Red when: the spread is that of the population, or a column shows another metric.
    values = list(arm(study, "+ ConAdv").values())
    found = row(tables.accuracy(study), "300", "+ ConAdv")
    spread = f"{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f}"
    assert found["test accuracy, %"] == spread
    assert (found["robust accuracy, %"], found["cost"]) == ("40.00 ± 0.00", "3")
    test = scipy_stats.ttest_rel(values, list(arm(study, "LARS").values()))
    ends = [test.confidence_interval().low, test.confidence_interval().high]
    mean = np.mean(values) - arm(study, "LARS").mean()
    assert found["against the baseline"] == "{:+.2f} [{:+.2f}, {:+.2f}]".format(
        *(100 * x for x in (mean, *ends))
    )


@pytest.mark.parametrize(
    ("make", "place", "cells"),
    [
        (tables.costs, ("300", "+ ConAdv"), {"of the whole training": "54,000"}),
        (tables.costs, ("300", "+ ConAdv"), {"times the baseline's": "3.00"}),
        (tables.tuning, ("300", "LARS"), {"chosen": "lr 4", "choice is": "lr at the edge"}),
        (tables.tuning, ("300", "+ ConAdv"), {"chosen": "lr 2", "choice is": "inside"}),
        (tables.sharpness, ("300", "+ sequential attack"), {"Hessian trace": "13.2 ± 0.645"}),
        (tables.staleness, ("300", "+ ConAdv"), {STALENESS: "0: 1.7 %, 1: 98.3 %"}),
        (tables.runs, ("300", "LARS", "0"), {"status": "finished", "folder": "0-300-seed0"}),
        (tables.settings, ("method",), {"LARS": "vanilla", "+ ConAdv": "conadv"}),
        (tables.probes, ("100", "+ ConAdv", "2", "stale"), {"loss increase, %, decay": "90"}),
        (tables.probes, ("100", "+ ConAdv", "8", "momentum"), {"prediction error, %, peak": "80"}),
    ],
)  # fmt: skip
def test_tables_by_hand(
    study: Comparison,
    make: Callable[[Comparison], pd.DataFrame],
    place: tuple[str, ...],
    cells: dict[str, str],
) -> None:
    # Red when: costs count clean images; an edge is asked of another arm; phases or taus are mixed.
    assert cells.items() <= row(make(study), *place).items()


def test_a_choice_is_judged_by_the_grid_of_the_arm_it_was_tuned_on(
    sweep: Path, tmp_path: Path
) -> None:
    cells = json.loads((sweep / "sweep.json").read_text())["cells"]
    for raw in cells:
        if raw["arm"] == "+ random-sign noise":
            raw |= {"trials": [], "tuned_on": "LARS", "chosen": {"optim.lr": 4.0}}
        if raw["arm"] == "+ ConAdv":
            raw["trials"] = raw["trials"][:2]
    study = read_sweep(edited(sweep, tmp_path / "s", cells=cells))
    assert arm(study, "+ random-sign noise", 20).edge == "lr at the edge"
    assert arm(study, "+ ConAdv", 20).edge == "two values of lr"


def test_measured_staleness_is_of_the_weight_version(tmp_path: Path) -> None:
    # Red when: the configured staleness is shown as measured.
    path = write_run(tmp_path / "a", make_config("conadv", staleness=2)) / "record.jsonl"
    path.write_text(path.read_text().replace('"weight_version": 30,', '"weight_version": 31,'))
    found = row(tables.staleness(load(tmp_path)), "conadv tau=2")
    assert found[STALENESS] == "0: 1.7 %, 1: 3.3 %, 2: 95.0 %"


def test_differences_without_an_interval_say_why() -> None:
    def one(*values: float) -> Arm:
        return Arm("a", pd.DataFrame({"test_accuracy": values}), "vanilla")

    assert tables.points(one(0.75), one(0.5)) == "+25.00 (1 pair)"
    assert tables.points(one(0.75, 1.0), one(0.5, 0.75)) == "+25.00 (all pairs alike)"
    assert tables.points(one(), one(0.5)) == "–"


# Figures


def test_the_accuracy_figure_shows_every_seed_and_the_mean(study: Comparison) -> None:
    # Red when: dots are fractions, names and rows are in different orders, or the line is not the
    # baseline's mean.
    axes = draw_accuracy(study).axes[2]  # type: ignore[union-attr]
    assert axes.get_title() == "batch 300"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(ARMS)[:5]
    drawn = {line.get_ydata()[0]: list(line.get_xdata()) for line in axes.lines[::-1]}
    assert drawn[4] == pytest.approx(list(100 * arm(study, "+ ConAdv").values()))
    dotted = next(line for line in axes.lines if line.get_linestyle() == ":")
    assert dotted.get_xdata()[0] == pytest.approx(100 * arm(study, "LARS").mean())


def test_the_cost_figure_places_marks_at_their_cost(study: Comparison) -> None:
    # Red when: costs are of clean images, arms without one are drawn, or marks of one cost have one
    # size.
    panels = draw_cost(study).axes  # type: ignore[union-attr]
    assert [panel.get_title() for panel in panels[:3]] == ["batch 20", "batch 100", "batch 300"]
    lines = [line for line in panels[2].lines if line.get_marker() == "o"]
    marks = [(x, line.get_markersize()) for line in lines for x in line.get_xdata()]
    assert [x for x, _ in marks] == pytest.approx([18000 * n for n in (1, 2, 2, 3, 3)])
    assert [size for _, size in marks] == [10, 10, 8.5, 10, 8.5]


def test_curves_are_means_over_stretches_of_steps_and_seeds(tmp_path: Path) -> None:
    # Red when: the band is mean plus minus std, seeds are concatenated, or an evaluation of
    # another split is drawn.
    for seed in range(2):
        run = write_run(tmp_path / f"{seed}", make_config(seed=seed), per_epoch=50)
        text = (run / "record.jsonl").read_text()
        line = json.loads(text.splitlines()[-1]) | {"split": "train", "accuracy": 5.0}
        (run / "record.jsonl").write_text(text + json.dumps(line) + "\n")
    comparison = load(tmp_path)
    accuracy, loss = draw_curves(comparison).axes[:2]  # type: ignore[union-attr]
    assert loss.get_title() == "training loss, clean view"
    steps = [run.steps["losses.clean"].to_numpy() for run in comparison.arms[0].runs]
    losses = np.array([each.reshape(100, 6).mean(1) for each in steps])
    np.testing.assert_allclose(loss.lines[0].get_xdata(), np.arange(1, 101))
    np.testing.assert_allclose(loss.lines[0].get_ydata(), losses.mean(0))
    band = loss.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((losses.min(), losses.max()))
    assert len(accuracy.lines[0].get_xdata()) == 12
    assert max(accuracy.lines[0].get_ydata()) < 100


# The files


def test_the_page_has_every_section_and_no_tuning_run(sweep: Path, report: Report) -> None:
    page, names = (sweep / "report.html").read_text(), [one.title for one in report.sections]
    assert names == [
        *("Accuracy", "Differences", "Cost", "Tuning", "Training", "Measured staleness"),
        *("Staleness", "Sharpness", "Settings", "Runs", "Made with"),
    ]
    said = ["Digits &lt;by&gt; batch", "loss is &lt;nan&gt; in step 3", "conadv sweep digits.yaml"]
    assert all(words in page for words in (*said, *(f"<h2>{name}</h2>" for name in names)))
    pictures = {path.stem for path in (sweep / "figures").iterdir()}
    assert pictures == {"accuracy", "cost", "training", "sharpness"}


def test_markdown_tables_are_whole_and_their_pictures_there(sweep: Path, report: Report) -> None:
    text = (sweep / "report.md").read_text()
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == sum(len(section.tables) for section in report.sections)
    assert all(len({line.replace("\\|", "").count("|") for line in block}) == 1 for block in blocks)
    pictures = re.findall(r"^!\[.*\]\((.*)\)$", text, re.M)
    assert len(pictures) == 4
    assert all((sweep / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_the_summary_holds_the_numbers_as_strict_json(sweep: Path, report: Report) -> None:
    # Red when: NaN is written, or results are not by seed.
    document = json.loads((sweep / "summary.json").read_text(), parse_constant=pytest.fail)
    assert document == json.loads(json.dumps(report.to_json()))
    first = next(one for one in document["arms"] if (one["name"], one["x"]) == ("LARS", 300))
    assert (first["role"], first["edge"], first["planned"]) == ("baseline", "lr at the edge", 4)
    values = dict(arm(report.comparison, "LARS").values())
    assert first["results"]["test_accuracy"] == {
        str(seed): pytest.approx(v) for seed, v in values.items()
    }
    assert len(document["differences"]) == len(list(report.comparison.contrasts()))
    assert document["tables"]["Accuracy"]["rows"] == report.summary.to_numpy().tolist()


def test_what_a_run_says_is_no_markup(tmp_path: Path) -> None:
    # Red when: autoescape is off, or escape leaves "<" or "|".
    path = write_run(tmp_path / "run", make_config(), 0.9)
    other = write_run(tmp_path / "other", make_config("disadv", model__name=EVIL), 0.9)
    out = tmp_path / "report.html"
    write_report([path, other], out, names={str(path): EVIL}, title=EVIL, command=EVIL)
    page, markdown = out.read_text(), out.with_suffix(".md").read_text()
    assert "<script" not in page + markdown
    assert "http" not in page.replace("http://www.w3.org/", "")
    assert escape("a_b _c_ <|>\n*") == "a_b \\_c\\_ &lt;\\|&gt; \\*"


def test_a_report_never_overwrites_a_run(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", make_config())
    before = (path / "summary.json").read_text()
    (tmp_path / "file").write_text("")
    for out, message in (
        (path / "report.html", "in a run"),
        (tmp_path / "report", ".html"),
        (tmp_path / "file" / "report.html", "Cannot write"),
    ):
        with pytest.raises(ConadvError, match=message):
            write_report([path], out)
    assert (path / "summary.json").read_text() == before


def test_the_command_line_reports_runs_and_a_sweep(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "report.html"
    cells = json.loads((sweep / "sweep.json").read_text())["cells"]
    small = edited(sweep, tmp_path / "small", cells=[cells[3], cells[12]])
    assert main(["report", str(small), "--out", str(out), "--baseline", CONTROLS[0]]) == 0
    assert "+ ConAdv" in capsys.readouterr().out
    runs = [
        write_run(tmp_path / "run[red]", make_config("noise", model__name="[red]x[/red]")),
        write_run(tmp_path / "run", make_config()),
    ]
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    assert "[red]x[/red]" in capsys.readouterr().out
    assert main(["report", str(sweep), str(tmp_path)]) == 2
    assert "name it alone" in capsys.readouterr().err


def test_the_report_needs_no_torch() -> None:
    code = "import sys, conadv.report; print({'torch', 'matplotlib.pyplot'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
