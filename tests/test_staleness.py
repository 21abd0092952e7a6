"""The staleness probe and the look-ahead predictors that it compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from conadv import Batch, frozen_stats, route
from conadv.analysis.staleness import draw, table, text
from conadv.cli.program import main
from conadv.config.resolve import resolve
from conadv.config.schema import Config, replace
from conadv.engine.lookahead import LookAhead
from conadv.training.build import build
from conadv.training.checkpoint import load, load_newest
from conadv.training.loop import train
from conadv.training.probe import PREDICTORS, mean_cosine
from conadv.training.record import read_lines

from .helpers import no_norm_net, parameters
from .test_training import config, weights

CPU = torch.device("cpu")


# ---- predictors


def test_predictions_that_are_kept_apart_can_be_repeated() -> None:
    # Red when: `keep` shares the buffer: the second extrapolation then starts from the first.
    model = no_norm_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ahead = LookAhead(model, optimizer, None, "last-update", keep=True)
    before = parameters(model)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    for tau in (4, 1, 2):
        got = ahead.predict(0, tau)["0.weight"]
        assert torch.allclose(got, before["0.weight"] + 1 + tau)


# ---- the probe


def probed(**changes: Any) -> Config:
    """Six steps, probed before the steps 2 and 4."""
    probe = {"every_epochs": 2 / 3, "staleness": (1, 3), "images": 100}
    changes = {f"probe__{name}": value for name, value in probe.items()} | changes
    return config(eval__robust_images=0, eval__train_images=64, **changes)


def kept(out: Path, *kinds: str) -> list[dict[str, Any]]:
    drop = ("time", "phases", "seconds", "spans")
    lines = [line for line in read_lines(out / "record.jsonl") if line["type"] in kinds]
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "disadv", "optim__name": "sgd", "optim__lr": 0.05},
        {"method": "conadv", "staleness": 2, "lookahead": True},
        {"method": "recycle", "optim__name": "lamb", "optim__lr": 0.01},
    ],
    ids=lambda changes: changes.get("method", "vanilla"),
)
def test_the_probe_changes_no_bit_and_resumes_exactly(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    # Red when: the probe moves running statistics or random streams; truncate keeps probe lines
    # after the checkpoint; what waits for a coming probe, or what a predictor remembers, is not
    # saved.
    without, whole, cut = (tmp_path / name for name in ("without", "whole", "cut"))
    plain = replace(probed(**changes), probe=Config().probe)
    train(plain, without)
    train(probed(**changes), whole)
    assert kept(whole, "step", "eval") == kept(without, "step", "eval")
    a, b = weights(whole), weights(without)
    assert all(torch.equal(a[key], b[key]) for key in a)
    lines = kept(whole, "probe")
    probed_at = [(x["step"], x["tau"]) for x in lines if x["predictor"] in ("current", "stale")]
    assert probed_at == [(2, 0), (2, 1), (4, 0), (4, 1), (4, 3)]

    train(probed(**changes), cut)
    for late in (4, 5, 6):
        (cut / "checkpoints" / f"step_{late:08d}.pt").unlink()
    assert load_newest(cut / "checkpoints", CPU)["probe"]["waiting"].keys() == {4}
    train(probed(**changes), cut, resume=True)
    assert kept(cut, "probe") == lines


@pytest.fixture(scope="module")
def disadv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was probed."""
    out = tmp_path_factory.mktemp("disadv") / "run"
    train(probed(method="disadv", probe__images=64, probe__staleness=(1, 2)), out)
    return out


def test_what_a_probe_says(disadv: Path) -> None:
    # Red when: the probed weights are those of another step; errors are taken to theta_{t-tau}; the
    # clean loss is not taken off.
    lines = kept(disadv, "probe")
    assert {line["predictor"] for line in lines} == {"current", "noise", "stale", *PREDICTORS}
    for line in lines:
        assert (line["images"], line["eps"]) == (64, 0.2)
        when = ("warm-up", 2 / 3) if line["step"] == 2 else ("decay", 4 / 3)
        assert (line["phase"], line["epoch"]) == when
        assert (line["relative_error"] is None) == (line["tau"] == 0)
        assert line["predictor"] != "stale" or line["relative_error"] == 1.0
        assert -1 <= line["cosine"] <= 1
    by = {(line["step"], line["tau"], line["predictor"]): line for line in lines}
    assert by[2, 0, "current"]["cosine"] == 1
    assert abs(by[2, 0, "noise"]["cosine"]) < 0.1
    assert by[2, 0, "current"]["loss_increase"] > by[2, 0, "noise"]["loss_increase"]
    assert by[2, 1, "momentum"]["relative_error"] < 1
    theta = [load(disadv / "checkpoints" / f"step_{t:08d}.pt", CPU)["model"] for t in range(1, 5)]
    trained = dict(build(resolve(probed(method="disadv")), CPU).model.named_parameters())
    flat = [torch.cat([values[name].double().flatten() for name in trained]) for values in theta]
    for tau in (1, 2):  # theta_4 as seen from step 4 - tau; theta_1 is the first one here
        made_at, before = flat[3 - tau], flat[2 - tau]
        guess = made_at + tau * (made_at - before)
        want = (guess - flat[3]).norm() / (flat[3] - made_at).norm()
        assert by[4, tau, "last-update"]["relative_error"] == pytest.approx(want.item(), rel=1e-4)


def test_the_attack_of_the_probe_is_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: the probe's route is "clean", its mode eval, or its attack another one; weights of
    # theta_t give another answer than theta_t itself.
    parts = build(resolve(probed(method="disadv", attack__num_steps=2)), CPU)
    engine, probe = parts.step, parts.probe
    assert probe is not None
    for _ in range(2):
        engine(next(parts.data.train_batches(engine.version, 6)))
    (micro,) = probe._micro
    assert len(micro.y_N) == 64  # the micro-batch: a whole one fits into 100
    x, y_N = engine.images(micro, "clean"), micro.y_N
    found = probe._measure(2)[0]
    gradients, (moved,) = probe._attacked(2, None)
    with route(parts.model, "adv"), frozen_stats(parts.model), torch.no_grad():
        clean, after = (F.cross_entropy(parts.model(images), y_N).item() for images in (x, moved))
    assert found["clean_loss"] == pytest.approx(clean, rel=1e-5)
    assert found["loss_increase"] == pytest.approx(after - clean, rel=1e-5)
    now = {name: p.detach().clone() for name, p in engine.trainable().items()}
    again, (moved_again,) = probe._attacked(2, now)
    assert mean_cosine(again, gradients) == pytest.approx(1)
    assert torch.equal(moved_again, moved)
    monkeypatch.setattr("conadv.rng.derive", lambda *_: 1)  # the same draws for all
    want = engine.attack_batch(engine.method.attack, Batch(2, (micro,))).images
    assert torch.equal(probe._attacked(2, None)[1][0], want[0])


def test_mean_cosine() -> None:
    # Red when: a floor of 1e-8 stands under the lengths; images without a gradient count as 0.
    a = torch.tensor([[1.0, 0.0], [1e-12, 1e-12], [0.0, 0.0]])
    b = torch.tensor([[1.0, 1.0], [1e-12, 1e-12], [1.0, 0.0]])
    assert mean_cosine([a[:1], a[1:]], [b]) == pytest.approx((2**-0.5 + 1) / 2)
    assert mean_cosine([a[2:]], [b[2:]]) is None


# ---- its analysis


def line(
    step: int, phase: str, tau: int, name: str, increase: float, **more: Any
) -> dict[str, Any]:
    where = {"type": "probe", "step": step, "phase": phase, "tau": tau, "predictor": name}
    return {**where, "loss_increase": increase, "cosine": 0.5, "relative_error": None, **more}


def test_table_by_hand() -> None:
    # Red when: "kept" is a mean of ratios; it divides by probes that have no such tau; phases are
    # mixed; a probe that was cut off before its noise counts.
    lines = [
        {"type": "step", "step": 0},
        *(line(1, "peak", 0, "current", 4.0), line(1, "peak", 0, "noise", 1.0)),
        *(line(2, "peak", 0, "current", 2.0), line(2, "peak", 0, "noise", 1.0)),
        line(2, "peak", 1, "stale", 1.0, cosine=0.2),
        line(2, "peak", 1, "momentum", 1.5, relative_error=0.5),
        *(line(3, "peak", 0, "current", 6.0), line(3, "peak", 0, "noise", 3.0)),
        line(3, "peak", 1, "stale", 5.0, cosine=0.4),
        line(3, "peak", 1, "momentum", 7.0, cosine=None),
        *(line(4, "decay", 0, "current", 0.0), line(4, "decay", 0, "noise", 0.0)),
        line(4, "decay", 1, "stale", 0.0),
        line(5, "decay", 0, "current", 9.0),
    ]
    rows = table(lines).set_index(["phase", "tau", "predictor"])
    peak = [("peak", 0, "current"), ("peak", 0, "noise"), ("peak", 1, "stale")]
    assert list(rows.index)[:4] == [*peak, ("peak", 1, "momentum")]
    assert rows.loc[("peak", 0, "current"), "loss_increase"] == 4.0
    stale, ahead = rows.loc[("peak", 1, "stale")], rows.loc[("peak", 1, "momentum")]
    assert (stale.probes, stale.loss_increase) == (2, 3.0)
    assert (stale.kept, stale.kept_over_noise) == (6 / 8, 2 / 4)
    assert stale.cosine == pytest.approx(0.3)
    assert (ahead.cosine, ahead.relative_error) == (0.5, 0.5)
    nothing = rows.loc[("decay", 1, "stale")]
    assert (nothing.probes, nothing[["kept", "relative_error"]].isna().all()) == (1, True)
    assert text(table(lines)).splitlines()[-1].split()[:4] == ["decay", "1", "stale", "1"]
    assert table(lines[:2]).empty


def test_the_command_prints_the_table_and_draws_it(
    disadv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: a predictor has no line in the figure; a run without probe lines gives an empty
    # picture.
    assert main(["staleness", str(disadv)]) == 0
    assert "last-update" in capsys.readouterr().out
    assert (disadv / "staleness.png").read_bytes()[:4] == b"\x89PNG"
    figure = draw(table(read_lines(disadv / "record.jsonl")), "title")
    names = {found.get_label() for found in figure.axes[0].get_lines()}
    assert {"stale", *PREDICTORS, "random signs"} <= names
    assert len(figure.axes) == 6  # warm-up and decay
    lines = (disadv / "record.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "record.jsonl").write_text("".join(x for x in lines if '"probe"' not in x))
    assert main(["staleness", str(tmp_path)]) == 2
    assert "--probe.every-epochs" in capsys.readouterr().err
    assert main(["staleness"]) == 2
