"""Records -> report. The runs are written by ``write_run``: the files of docs/record.md with made-up numbers."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats as scipy_stats

from conadv.config.files import dump_yaml
from conadv.config.resolve import resolve
from conadv.config.schema import Config, replace
from conadv.errors import ConadvError
from conadv.report import (
    arms_table,
    compare,
    figures,
    find_runs,
    load_run,
    settings,
    show,
    table,
    words,
    write_report,
)
from conadv.report.html import escape_markdown
from conadv.report.stats import paired_difference, stat

HEADER = {
    "time": "2026-03-04T05:06:07+00:00",
    "version": "0.1.0",
    "versions": {"python": "3.12.1", "torch": "2.9.0", "numpy": "2.1.0"},
    "machine": {
        "system": "Linux x86_64",
        "processor": "Example CPU",
        "cores": 2,
        "threads": 2,
        "device": "cpu",
    },
    "git": {"commit": "0123abc", "dirty": False},
    "parameter_groups": [],
}
MADE_BY_WEIGHTS = ("disadv", "conadv", "recycle")
SECONDS = {"data": 0.001, "gradient": 0.050, "attack": 0.020, "update": 0.004}


def make_config(method: str = "vanilla", seed: int = 0, **changes: Any) -> Config:
    values = {
        "method": method,
        "seed": seed,
        "global_batch_size": 100,
        "epochs": 12,
        "attack__eps": 4 / 255,
        **changes,
    }
    return resolve(replace(Config(), **values))


def step_lines(config: Config, steps: int, per_epoch: int) -> list[dict[str, Any]]:
    """Losses that fall, a learning rate that decays, and the weight versions that the method would leave."""
    rng = np.random.default_rng([config.seed, len(config.method)])
    made, attacks = config.method in MADE_BY_WEIGHTS, config.method in ("disadv", "conadv")
    views = ["clean"] + (["adv"] if config.method != "vanilla" else [])
    tau = {"disadv": 0, "recycle": 1, "conadv": config.staleness}.get(config.method, 0) or 0
    lines = []
    for step in range(steps):
        losses = {
            v: 2.3 * math.exp(-4 * step / steps) * (1 + 0.1 * rng.standard_normal()) + 0.02
            for v in views
        }
        version = step - tau if step >= tau else (step if config.method == "conadv" else None)
        phases = {
            k: v * (1 + 0.05 * rng.random()) for k, v in SECONDS.items() if k != "attack" or attacks
        }
        lines.append(
            {
                "type": "step",
                "step": step,
                "epoch": step // per_epoch,
                "lr": config.optim.lr * (1 - step / steps) ** 2,
                "loss": sum(losses.values()) / len(losses),
                "losses": losses,
                "grad_norm": 1.0,
                "weight_version": version if made else None,
                "staleness": step - version if made and version is not None else None,
                "phases": phases,
                "time": 0.08 * (step + 1),
            }
        )
        if (step + 1) % per_epoch == 0:
            grown = 0.95 - 0.6 * math.exp(-5 * (step + 1) / steps) + 0.005 * rng.standard_normal()
            done = {"step": step + 1, "epoch": (step + 1) // per_epoch}
            lines.append(
                {
                    "type": "eval",
                    **done,
                    "split": "test",
                    "loss": 0.2,
                    "accuracy": grown,
                    "images": 500,
                }
            )
    return lines


def write_run(
    path: Path, config: Config, accuracy: float | None = 0.95, per_epoch: int = 5, **summary: Any
) -> Path:
    """A finished run with the given test accuracy; ``accuracy=None`` leaves it unfinished, without summary.json."""
    steps = int((config.epochs or 12) * per_epoch)
    header = {
        "type": "header",
        **HEADER,
        "recipe": config.recipe,
        "seed": config.seed,
        "steps": steps,
    }
    lines = [
        {**header, "config": config.model_dump(mode="json")},
        *step_lines(config, steps, per_epoch),
    ]
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_yaml(config))
    (path / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if accuracy is not None:
        share = 0.02 / 0.075 if config.method in ("disadv", "conadv") else 0.0
        step_seconds = 0.075 if share else 0.055
        results = {
            "ranks": 1,
            "test_accuracy": accuracy,
            "robust_accuracy": 0.4,
            "train_accuracy": 0.99,
            "seconds": steps * step_seconds,
            "step_seconds_median": step_seconds,
            "attack_seconds_share": share,
        }
        (path / "summary.json").write_text(json.dumps({**results, **summary}))
    return path


def write_study(folder: Path, seeds: int = 3) -> Path:
    """Seven arms as a demo would make them, from a small batch to look-ahead."""
    arms = [
        (0.989, {"method": "vanilla", "global_batch_size": 20}),
        (0.979, {"method": "vanilla"}),
        (0.981, {"method": "multiview"}),
        (0.988, {"method": "noise"}),
        (0.994, {"method": "disadv"}),
        (0.987, {"method": "conadv"}),
        (0.993, {"method": "conadv", "lookahead": True}),
    ]
    for number, (accuracy, changes) in enumerate(arms):
        rng = np.random.default_rng(number)
        for seed in range(seeds):
            small = changes.get("global_batch_size") == 20
            config = make_config(seed=seed, epochs=60, **changes)
            value = round(accuracy + 0.0015 * rng.standard_normal(), 5)
            write_run(folder / f"{number}" / f"seed{seed}", config, value, 25 if small else 5)
    return folder


def load_study(folder: Path, **options: Any) -> Any:
    return compare([load_run(path) for path in find_runs([folder])], **options)


def cells(page: str) -> list[list[str]]:
    """The arms table of an HTML report as text."""
    body = re.search(r'<table class="arms">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    assert body is not None
    texts = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        for row in body[1].split("</tr>")[:-1]
    ]
    return [[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in row] for row in texts]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report over seven arms with three seeds; its folder."""
    folder = tmp_path_factory.mktemp("study")
    write_study(folder / "runs")
    write_report(
        [folder / "runs"], folder / "report.html", title="Seven arms", command="conadv demo"
    )
    return folder


# Loading


def test_a_run_is_read_as_columns(tmp_path: Path) -> None:
    """Red when: columns() fills missing values with 0 instead of NaN (recycle has no version in step 0)."""
    run = load_run(write_run(tmp_path / "run", make_config("recycle", seed=3), per_epoch=5))
    assert run.label == "run"
    assert (run.seed, run.steps_done, run.finished, run.ranks) == (3, 60, True, 1)
    assert sorted(run.nested("losses")) == ["adv", "clean"]
    assert sorted(run.nested("phases")) == ["data", "gradient", "update"]
    assert np.isnan(run.steps["weight_version"][0])
    np.testing.assert_array_equal(run.steps["weight_version"][1:], np.arange(59))
    np.testing.assert_array_equal(run.evals["step"], np.arange(5, 61, 5))


def test_a_killed_run_is_unfinished_and_keeps_what_is_known(tmp_path: Path) -> None:
    """Red when: status() counts the planned steps, or the cut line raises."""
    path = write_run(tmp_path / "run", make_config(), None)
    lines = (path / "record.jsonl").read_text().splitlines(keepends=True)
    (path / "record.jsonl").write_text("".join(lines[:20]) + lines[20][:30])
    write_run(tmp_path / "other", make_config(seed=1), 0.9)
    comparison = load_study(tmp_path)
    arm = comparison.arms[0]
    assert (table.seeds(arm), arm.metrics["test_accuracy"].n) == ("1 of 2", 1)
    summary = write_report([tmp_path], tmp_path / "report.html").to_json()
    status = next(run["status"] for run in summary["runs"] if run["path"] == "run")
    accuracy = [json.loads(line)["accuracy"] for line in lines[:20] if '"type": "eval"' in line][-1]
    assert (
        status == f"unfinished: 16 of 60 steps, {100 * accuracy:.2f} % test accuracy after step 15"
    )
    assert summary["arms"][0]["unfinished_seeds"] == [0]


def test_the_error_that_ended_a_run_is_shown(tmp_path: Path) -> None:
    """Red when: _last_error() takes any error line, so that a resumed run still counts as stopped."""
    path = write_run(tmp_path / "run", make_config(), None)
    record, error = path / "record.jsonl", {"type": "error", "step": 60, "message": "loss is nan"}
    record.write_text(record.read_text() + json.dumps(error) + "\n")
    status = write_report([path], tmp_path / "report.html").to_json()["runs"][0]["status"]
    assert status.endswith("stopped by: loss is nan")
    record.write_text(record.read_text() + json.dumps({"type": "resume", "step": 60}) + "\n")
    run = load_run(path)
    assert (run.stopped_by, run.resumed_at) == (None, (60,))


@pytest.mark.parametrize("keep", [0, 1])
def test_a_run_killed_before_its_first_step_is_reported(tmp_path: Path, keep: int) -> None:
    path = write_run(tmp_path / "run", make_config(), None)
    lines = (path / "record.jsonl").read_text().splitlines(keepends=True)
    (path / "record.jsonl").write_text("".join(lines[:keep]))
    write_report([path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "unfinished: 0" in page
    assert "<svg" not in page


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", make_config())
    (path / "summary.json").write_text('{"test_accuracy": 0.9')
    (path / "config.yaml").unlink()
    run = load_run(path)
    assert not run.finished
    assert run.config["method"] == "vanilla"  # from the header
    assert run.problems == ("summary.json is unreadable", "config.yaml is missing or unreadable")
    assert any("could not be read in full" in note for note in words.notes(compare([run])))


@pytest.mark.parametrize(
    "record", ["", '{"type": "step"}\n', '{"step": 1}\n', "[1, 2]\n", "no json\nat all\n"]
)
def test_a_foreign_folder_is_an_error_that_names_it(tmp_path: Path, record: str) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "record.jsonl").write_text(record)
    with pytest.raises(ConadvError, match="foreign"):
        load_run(tmp_path / "foreign")


def test_folders_without_runs_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(ConadvError, match=wrong.name):
            find_runs([wrong])
    with pytest.raises(ConadvError, match="empty"):
        load_run(tmp_path / "empty")
    with pytest.raises(ConadvError, match="no run"):
        compare([])


def test_runs_are_found_at_any_depth_and_once(tmp_path: Path) -> None:
    """Red when: found is a list without the look-up by resolved path."""
    deep = write_run(tmp_path / "a" / "b" / "c", make_config())
    flat = write_run(tmp_path / "d", make_config(seed=1))
    write_run(flat / "checkpoints" / "inner", make_config(seed=2))  # below a run: not searched
    assert find_runs([tmp_path, deep, tmp_path / "a"]) == [deep, flat]


# Statistics


def test_statistics_by_hand() -> None:
    """Red when: stat() uses pstdev (divisor n)."""
    found = stat({0: 0.90, 1: 0.92, 2: 0.97})
    assert found is not None
    assert (found.n, found.min, found.max, found.median) == (3, 0.90, 0.97, 0.92)
    assert found.mean == pytest.approx(0.93)
    assert found.std == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))
    single = stat({4: 0.5})
    assert single is not None
    assert single.std is None
    assert stat({}) is None


def test_paired_interval_by_hand_and_by_scipy() -> None:
    """Red when: the interval is unpaired, uses n instead of n - 1 degrees of freedom, or 0.95 for 0.975."""
    arm, base = {0: 0.98, 1: 0.97, 2: 0.99, 9: 0.1}, {0: 0.97, 1: 0.965, 2: 0.975, 7: 0.9}
    found = paired_difference(arm, base)
    assert found is not None
    assert (found.seeds, found.n, found.verdict) == ((0, 1, 2), 3, "not distinguishable")
    half = (
        4.302653 * 0.005 / math.sqrt(3)
    )  # t(0.975, 2) from a printed table; differences 0.010, 0.005, 0.015
    assert found.mean == pytest.approx(0.010)
    assert (found.low, found.high) == (pytest.approx(0.010 - half), pytest.approx(0.010 + half))
    test = scipy_stats.ttest_rel([0.98, 0.97, 0.99], [0.97, 0.965, 0.975]).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(test.low), pytest.approx(test.high))


def test_verdicts() -> None:
    """Red when: verdict compares the mean with 0 instead of the ends of the interval."""
    base = {0: 0.90, 1: 0.91, 2: 0.92}
    shifts = {
        "higher": (0.020, 0.021, 0.022),
        "lower": (-0.02, -0.021, -0.022),
        "not distinguishable": (0.03, 0, -0.01),
    }
    for verdict, shift in shifts.items():
        found = paired_difference({seed: base[seed] + shift[seed] for seed in base}, base)
        assert found is not None
        assert found.verdict == verdict
        assert verdict in words.finding(found, "the baseline")


def test_one_pair_has_no_interval_and_none_no_difference() -> None:
    found = paired_difference({0: 0.95, 1: 0.9}, {1: 0.88})
    assert found is not None
    assert (found.n, found.low, found.high, found.verdict) == (1, None, None, "no interval")
    assert table.difference(found) == "+2.00 (1 pair)"
    assert "one common seed" in words.finding(found, "b")
    assert paired_difference({0: 0.95}, {1: 0.88}) is None


def test_equal_differences_are_no_certainty() -> None:
    # Red when: an interval without width counts as higher.
    found = paired_difference({0: 0.95, 1: 0.90, 2: 0.85}, {0: 0.90, 1: 0.85, 2: 0.80})
    assert found is not None
    exact = dataclasses.replace(found, low=found.mean, high=found.mean)
    assert exact.verdict == "not distinguishable"
    assert "all 3 seeds differ by the same +5.00 points" in words.finding(exact, "b")


def test_a_single_seed_shows_no_spread(tmp_path: Path) -> None:
    write_run(tmp_path / "a", make_config(), 0.9)
    write_run(tmp_path / "b", make_config("noise"), 0.91)
    write_report([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert [row[2] for row in cells(page)] == ["90.00", "91.00"]
    assert "One seed only, so no spread is known" in page
    assert "±" not in "".join(cell for row in cells(page) for cell in row)


# Arms


def test_arms_differ_by_more_than_the_seed_and_are_called_after_it(tmp_path: Path) -> None:
    """Red when: effective() keeps "seed", or labels() drops the batch."""
    comparison = load_study(write_study(tmp_path / "runs", seeds=2))
    assert [arm.label for arm in comparison.arms] == [
        "vanilla, batch 20",
        "vanilla, batch 100",
        "multiview, batch 100",
        "noise, batch 100",
        "disadv, batch 100",
        "conadv tau=1, batch 100",
        "conadv tau=1 + look-ahead, batch 100",
    ]
    assert [[run.seed for run in arm.runs] for arm in comparison.arms] == [[0, 1]] * 7
    assert comparison.baseline.label == "vanilla, batch 100"
    assert comparison.differing == ("method", "lookahead", "global_batch_size")
    assert comparison.common["staleness"] == 1  # of all arms that have one


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"optim__lr": 2.0}, "vanilla, lr 2"),
        ({"optim__name": "lamb"}, "vanilla, LAMB"),
        ({"optim__name": "lamb", "optim__weight_decay": 0.1}, "vanilla, LAMB, weight_decay 0.1"),
        ({"data__aug_view": "randaugment"}, "vanilla, aug view randaugment"),
        ({"micro_batch_size": 50}, "vanilla, micro-batch 50"),
        ({"eval__robust_steps": 20}, "vanilla, robust_steps 20"),
        ({"epochs": None, "steps": 7}, "vanilla, 7 steps"),
        ({"method": "noise", "attack__eps": 8 / 255}, "noise"),
    ],
)
def test_labels(changes: dict[str, Any], label: str) -> None:
    configs = make_config(), make_config(**changes)
    arms = [settings.effective(config.model_dump(mode="json")) for config in configs]
    assert settings.labels(arms)[1] == label


def test_settings_without_effect_do_not_split_an_arm() -> None:
    """Red when: effective() keeps attack.* for methods without an attack."""
    a, b = (
        make_config("multiview", attack__eps=eps, seed=eps_seed)
        for eps, eps_seed in ((0.1, 0), (0.2, 1))
    )
    a, b = (replace(config, eval__robust_eps=0.1) for config in (a, b))
    assert settings.effective(a.model_dump(mode="json")) == settings.effective(
        b.model_dump(mode="json")
    )
    c = replace(make_config("noise", attack__eps=0.1), eval__robust_eps=0.1)
    d = replace(make_config("noise", attack__eps=0.2), eval__robust_eps=0.1)
    assert settings.effective(c.model_dump(mode="json")) != settings.effective(
        d.model_dump(mode="json")
    )


def test_the_seed_of_the_subset_is_0_where_a_record_has_none() -> None:
    """Red when: an older record or a setting without effect makes an arm of its own, or null is taken for nothing."""
    config = make_config("vanilla", data__train_images=100)
    old = config.model_dump(mode="json")
    del old["data"]["subset_seed"]
    assert settings.effective(old) == settings.effective(config.model_dump(mode="json"))
    each = replace(config, data__subset_seed=None).model_dump(mode="json")
    names = settings.labels([settings.effective(old), settings.effective(each)])
    assert names == ["vanilla, subset 0", "vanilla, subset of each seed"]
    whole = make_config("vanilla").model_dump(mode="json")
    assert settings.effective(whole)["data.subset_seed"] is None


def test_given_names_and_baseline(tmp_path: Path) -> None:
    names = {}
    for seed in range(2):
        names[str(write_run(tmp_path / f"a{seed}", make_config(seed=seed), 0.9))] = "large batch"
        names[str(write_run(tmp_path / f"b{seed}", make_config("noise", seed=seed), 0.95))] = (
            "with noise"
        )
    comparison = load_study(tmp_path, names=names, baseline="with noise")
    assert [arm.label for arm in comparison.arms] == ["large batch", "with noise"]
    assert comparison.arms[0].difference.mean == pytest.approx(-0.05)
    with pytest.raises(ConadvError, match="Did you mean 'with noise'"):
        load_study(tmp_path, names=names, baseline="with nois")
    with pytest.raises(ConadvError, match="not among the runs"):
        load_study(tmp_path, names={str(tmp_path / "c"): "x"})


def test_a_name_over_different_settings_is_said(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / f"{n}", make_config(seed=n, global_batch_size=20 * n)) for n in (1, 2)
    ]
    notes = words.notes(load_study(tmp_path, names=dict.fromkeys(map(str, paths), "mixed")))
    assert "mixed mixes runs with different settings: global_batch_size." in notes


def test_a_repeated_seed_is_used_once(tmp_path: Path) -> None:
    """Red when: _arm() sorts by start only, so that the later unfinished run wins."""
    write_run(tmp_path / "a", make_config(), 0.90)
    write_run(tmp_path / "b", make_config(), 0.91)
    record = tmp_path / "b" / "record.jsonl"
    record.write_text(record.read_text().replace("2026-03-04", "2026-03-05"))
    unfinished = write_run(tmp_path / "c", make_config(), None) / "record.jsonl"
    unfinished.write_text(unfinished.read_text().replace("2026-03-04", "2026-03-06"))
    comparison = load_study(tmp_path)
    assert [run.label for run in comparison.arms[0].runs] == ["b"]
    assert comparison.arms[0].metrics["test_accuracy"].values == {0: 0.91}
    assert any(
        "repeat the settings and seed" in note and "2" in note for note in words.notes(comparison)
    )


def test_staleness_is_compared_with_the_configured_one(tmp_path: Path) -> None:
    """Red when: _staleness() reads the recorded staleness instead of step - weight_version, or forgets tau."""
    path = write_run(tmp_path / "a", make_config("conadv", staleness=2))
    arm = load_study(tmp_path).arms[0]
    assert (arm.staleness.configured, arm.staleness.measured, arm.staleness.unexpected) == (
        2,
        {0: 2, 2: 58},
        0,
    )
    text = (path / "record.jsonl").read_text()
    (path / "record.jsonl").write_text(
        text.replace('"weight_version": 30,', '"weight_version": 31,')
    )
    comparison = load_study(tmp_path)
    assert comparison.arms[0].staleness.unexpected == 1
    assert any("in 1 of 60 steps" in note for note in words.notes(comparison))


def test_different_machines_versions_and_code_are_noted(tmp_path: Path) -> None:
    write_run(tmp_path / "a", make_config())
    record = write_run(tmp_path / "b", make_config("noise")) / "record.jsonl"
    text = (
        record.read_text()
        .replace("Example CPU", "Other CPU")
        .replace('"dirty": false', '"dirty": true')
    )
    record.write_text(text.replace('"version": "0.1.0"', '"version": "0.2.0"'))
    notes = " ".join(words.notes(load_study(tmp_path)))
    for piece in ("different machines", "different versions", "uncommitted changes"):
        assert piece in notes


# The files


def test_table_and_summary_hold_the_same_numbers(study: Path) -> None:
    """Red when: percent() shows the median, or the summary is built from other runs than the table."""
    summary = json.loads((study / "summary.json").read_text())
    shown = cells((study / "report.html").read_text())
    markdown = (study / "report.md").read_text()
    assert len(shown) == len(summary["arms"]) == 7
    base = next(arm for arm in summary["arms"] if arm["label"] == summary["baseline"])
    for row, arm in zip(shown, summary["arms"], strict=True):
        values = [
            json.loads((study / run["path"] / "summary.json").read_text())
            for run in summary["runs"]
        ]
        own = [
            v["test_accuracy"]
            for v, run in zip(values, summary["runs"], strict=True)
            if run["arm"] == arm["label"]
        ]
        accuracy = arm["test_accuracy"]
        assert accuracy["mean"] == pytest.approx(statistics.fmean(own))
        assert row[0] == arm["label"]
        assert row[1] == str(accuracy["n"]) == "3"
        assert row[2] == f"{100 * accuracy['mean']:.2f} ± {100 * accuracy['std']:.2f}"
        if arm is not base:
            numbers = [float(n.replace("−", "-")) for n in re.findall(r"[+−][\d.]+", row[3])]
            difference = [100 * arm["difference"][key] for key in ("mean", "low", "high")]
            assert numbers == pytest.approx(difference, abs=0.00501)
        ratio = arm["step_seconds"]["median"] / base["step_seconds"]["median"]
        assert row[6].endswith(f"({ratio:.2f}×)")
        assert row[8] == f"{100 * arm['attack_share']['median']:.1f}"
        assert all(escape_markdown(cell) in markdown for cell in row)


def test_html_is_self_contained(study: Path) -> None:
    """Red when: to_svg() keeps the metadata and document type that matplotlib writes."""
    page = (study / "report.html").read_text()
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http" not in without_namespaces
    assert not re.search(r"<(script|link|img|iframe|object)\b|@import|url\((?!#)", page)
    assert page.count("<svg") == 5


def test_figures_share_a_page_without_clashing_ids(study: Path) -> None:
    """Two figures may define the same shape under one id, never different ones."""
    defined: dict[str, str] = {}
    for tag in re.findall(
        r"<(?:path|clipPath|pattern)\b[^>]*\bid=[^>]*>", (study / "report.html").read_text()
    ):
        name = re.search(r'id="([^"]*)"', tag)
        assert name is not None
        assert defined.setdefault(name[1], tag) == tag


EVIL = '<script>alert("1")</script> $\\frac$ --> | [x](y) & _a_ \n*b*'


def test_names_and_recipes_are_escaped(tmp_path: Path) -> None:
    """Red when: autoescape=False in render_html, or escape_markdown leaves "<"."""
    path = write_run(tmp_path / "run", replace(make_config(), recipe=EVIL), 0.9)
    other = write_run(tmp_path / "other", make_config("disadv", model__name=EVIL), 0.9)
    out = tmp_path / "report.html"
    summary = write_report([path, other], out, names={str(path): EVIL}, title=EVIL, command=EVIL)
    page, markdown = out.read_text(), out.with_suffix(".md").read_text()
    assert "<script" not in page
    assert "<script" not in markdown
    assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;" in page
    tables = [line for line in markdown.splitlines() if line.startswith("|") and "script" in line]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {
        6,
        10,
        4,
    }  # runs, arms, settings
    assert summary.to_json()["arms"][0]["label"] == EVIL


def test_a_report_never_overwrites_a_run(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", make_config())
    before = (path / "summary.json").read_text()
    with pytest.raises(ConadvError, match="is a run"):
        write_report([path], path / "report.html")
    with pytest.raises(ConadvError, match=r"must end in \.html"):
        write_report([path], tmp_path / "report")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConadvError, match="Cannot write"):
        write_report([path], tmp_path / "file" / "report.html")
    assert (path / "summary.json").read_text() == before


def test_summary_is_strict_json_with_relative_paths(tmp_path: Path) -> None:
    """Red when: _finite() is left out (the record's NaN would not be JSON)."""
    write_run(tmp_path / "runs" / "a", make_config(), float("nan"))
    write_report([tmp_path / "runs"], tmp_path / "out" / "report.html")
    text = (tmp_path / "out" / "summary.json").read_text()
    summary = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert summary["runs"][0]["path"] == "../runs/a"
    assert summary["arms"][0]["test_accuracy"] is None
    assert str(tmp_path) not in text + (tmp_path / "out" / "report.html").read_text()


def test_the_page_says_what_was_compared(study: Path) -> None:
    page = html.unescape((study / "report.html").read_text())
    lead = "7 ways (arms) of training resnet8 on digits are compared: 60 epochs, global batches from 20 to 100"
    for piece in (
        lead,
        "Seven arms",
        "conadv demo",
        "Example CPU",
        "torch 2.9.0",
        "runs/6/seed2",
        "higher than vanilla",
    ):
        assert piece in page


# Figures and terminal


def test_every_figure_has_one_colour_per_arm(study: Path) -> None:
    comparison = load_study(study / "runs")
    found = figures.looks(comparison)
    assert len({(look.colour, look.marker, look.line) for look in found}) == 7
    dots, bars = figures.accuracy_dots(comparison), figures.step_times(comparison)
    assert dots is not None
    assert bars is not None
    for figure in (dots, bars):
        colours = [line.get_color() for line in figure.axes[0].lines if line.get_marker() == "o"]
        assert colours == [look.colour for look in found]
        labels = [label.get_text().replace("\n", " ") for label in figure.axes[0].get_yticklabels()]
        assert labels == [arm.label for arm in comparison.arms]


def test_accuracy_figure_shows_every_seed_and_the_mean(study: Path) -> None:
    """Red when: the dots are fractions, or the tick is the median."""
    comparison = load_study(study / "runs")
    figure = figures.accuracy_dots(comparison)
    assert figure is not None
    dots, mean = figure.axes[0].lines[0], figure.axes[0].lines[1]
    value = comparison.arms[0].metrics["test_accuracy"]
    np.testing.assert_allclose(dots.get_xdata(), [100 * v for v in value.values.values()])
    np.testing.assert_allclose(mean.get_xdata(), 100 * value.mean)


def test_step_bars_add_up_to_the_table(study: Path) -> None:
    """Red when: _phase_seconds() leaves out one phase or does not scale to the median step."""
    comparison = load_study(study / "runs")
    figure = figures.step_times(comparison)
    assert figure is not None
    ends = [0.0] * 7
    for bars in figure.axes[0].containers:
        ends = [end + bar.get_width() for end, bar in zip(ends, bars, strict=True)]
    np.testing.assert_allclose(ends, [1e3 * arm.median("step_seconds") for arm in comparison.arms])


def test_curves_average_over_seeds(tmp_path: Path) -> None:
    """Red when: the band is mean plus minus std, or the x axis stays in steps."""
    runs = [load_run(write_run(tmp_path / f"{s}", make_config(seed=s))) for s in range(3)]
    figure = figures.curves(compare(runs))
    assert figure is not None
    axes = figure.axes[1]
    assert axes.get_title(loc="left") == "training loss, clean view"
    losses = np.array([run.nested("losses")["clean"] for run in runs])
    np.testing.assert_allclose(axes.lines[0].get_xdata(), np.arange(1, 61) / 5)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), losses.mean(axis=0))
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (pytest.approx(losses.min()), pytest.approx(losses.max()))


def test_long_records_are_averaged_down(tmp_path: Path) -> None:
    """Red when: the last, shorter stretch is divided by the full length."""
    run = load_run(
        write_run(tmp_path / "a", make_config(), per_epoch=85)
    )  # 1020 steps, stretches of 6
    figure = figures.curves(compare([run]))
    assert figure is not None
    line = figure.axes[1].lines[0]
    clean = run.nested("losses")["clean"]
    np.testing.assert_allclose(line.get_ydata(), clean.reshape(-1, 6).mean(axis=1))
    short = load_run(
        write_run(tmp_path / "b", make_config(epochs=11.98), per_epoch=85)
    )  # 1018 steps
    tail = figures.curves(compare([short])).axes[1].lines[0].get_ydata()[-1]
    assert tail == pytest.approx(short.nested("losses")["clean"][1014:].mean())


def test_accuracy_curve_shows_every_test_evaluation(tmp_path: Path) -> None:
    """Red when: evaluations of another split are drawn too."""
    path = write_run(tmp_path / "a", make_config(), 0.987)
    lines = (path / "record.jsonl").read_text().splitlines(keepends=True)
    other = json.dumps({**json.loads(lines[-1]), "split": "train", "accuracy": 1.0}) + "\n"
    (path / "record.jsonl").write_text("".join([*lines, other]))
    figure = figures.curves(compare([load_run(path)]))
    assert figure is not None
    line = figure.axes[0].lines[0]
    assert (len(line.get_xdata()), line.get_xdata()[-1]) == (12, 12.0)
    assert line.get_ydata()[-1] == pytest.approx(100 * json.loads(lines[-1])["accuracy"])


def test_equal_schedules_are_one_line(study: Path) -> None:
    comparison = load_study(study / "runs")
    figure = figures.lr_schedule(comparison)
    assert figure is not None
    assert [line.get_label() for line in figure.axes[0].lines] == ["all arms"]


def test_png_is_a_picture(study: Path) -> None:
    figure = figures.staleness(load_study(study / "runs"))
    assert figure is not None
    assert figures.to_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [80, 110, 160])
def test_terminal_table_fits(study: Path, width: int) -> None:
    """Red when: _NEEDS_WIDTH is empty (the arm's name is squeezed out of 80 columns)."""
    comparison = load_study(study / "runs")
    console = Console(width=width)
    with console.capture() as capture:
        console.print(arms_table(comparison, width=width))
    text = capture.get()
    assert "look-ahead" in text
    assert "…" not in text
    assert all(row.cells[2] in text and row.cells[3] in text for row in table.rows(comparison))


def test_labels_are_no_markup_in_the_terminal(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", make_config())
    comparison = compare([load_run(path)], {str(path): "[red]x[/red]"})
    console = Console(width=160)
    with console.capture() as capture:
        console.print(arms_table(comparison))
    assert "[red]x[/red]" in capture.get()


def test_show_says_table_findings_and_notes(study: Path) -> None:
    summary = write_report([study / "runs"], study / "again" / "report.html")
    console = Console(width=100)
    with console.capture() as capture:
        show(summary, console)
    text = " ".join(capture.get().split())
    for sentence in (*words.findings(summary.comparison), *words.notes(summary.comparison)):
        assert sentence in text
    assert "98.9" in text


def test_the_report_needs_no_torch() -> None:
    code = "import sys, conadv.report; print('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
