"""Run directories and a sweep's folder in the form of docs/record.md and docs/sweep.md, made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from conadv.config.files import dump_yaml
from conadv.config.resolve import resolve
from conadv.config.schema import Config, replace

HEADER = {
    "time": "2026-03-04T05:06:07+00:00",
    "version": "0.1.0",
    "versions": {"python": "3.12.1", "torch": "2.9.0"},
    "machine": {"processor": "Example CPU", "cores": 2, "device": "cpu"},
    "git": {"commit": "0123abc", "dirty": False},
}
VIEWS = {"vanilla": 1, "noise": 2, "multiview": 2, "disadv": 3, "conadv": 3, "recycle": 2}
SECONDS = {"data": 0.001, "gradient": 0.050, "attack": 0.020, "update": 0.004}


def make_config(method: str = "vanilla", seed: int = 0, **changes: Any) -> Config:
    values = {"global_batch_size": 100, "epochs": 12, "attack__eps": 4 / 255, **changes}
    return resolve(replace(Config(), method=method, seed=seed, **values))


def step_lines(config: Config, steps: int, per_epoch: int) -> list[dict[str, Any]]:
    """Losses that fall, a rate that decays, the weight versions that the method would leave."""
    rng = np.random.default_rng([config.seed, len(config.method)])
    tau = {"disadv": 0, "recycle": 1, "conadv": config.staleness}.get(config.method)
    views = ("clean",) if config.method == "vanilla" else ("clean", "adv")
    lines = []
    for step in range(steps):
        fall = 2.3 * math.exp(-4 * step / steps) + 0.02
        losses = {view: fall * (1 + 0.1 * rng.standard_normal()) for view in views}
        none = tau is None or (tau > step and config.method == "recycle")
        line = {"type": "step", "step": step, "epoch": step // per_epoch, "losses": losses}
        line |= {"weight_version": None if none else max(step - (tau or 0), 0), "phases": SECONDS}
        line |= {"lr": config.optim.lr * (1 - step / steps), "time": 0.1 * step}
        lines.append({**line, "loss": losses["clean"]})
        if (step + 1) % per_epoch == 0:
            line = {"type": "eval", "step": step + 1, "epoch": (step + 1) // per_epoch}
            line |= {"split": "test", "loss": 0.2, "images": 500}
            lines.append({**line, "accuracy": 0.95 - 0.6 * fall / 2.4})
    return lines


def write_run(
    path: Path, config: Config, accuracy: float | None = 0.95, per_epoch: int = 5, **summary: Any
) -> Path:
    """A finished run with the given test accuracy; None leaves it unfinished."""
    steps = int((config.epochs or 12) * per_epoch)
    header = {"type": "header", **HEADER, "seed": config.seed, "steps": steps}
    lines = [{**header, "config": config.model_dump(mode="json")}]
    lines += step_lines(config, steps, per_epoch)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(dump_yaml(config))
    (path / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {"ranks": 1, "seed": config.seed, "steps": steps, "seconds": 10.0, "test_loss": 0.1}
    results |= {"test_accuracy": accuracy, "robust_accuracy": 0.4, "train_accuracy": 0.99}
    views, batch = VIEWS[config.method], config.global_batch_size
    results |= {"global_batch_size": batch, "gradient_images_per_clean_image": float(views)}
    results |= {"step_seconds_median": 0.05 * views, "attack_seconds_share": 0.25 * (views == 3)}
    if accuracy is not None:
        (path / "summary.json").write_text(json.dumps({**results, **summary}))
    return path


# arm -> (settings, mean test accuracy at each batch)
BATCHES = (20, 100, 300)
CONTROLS = ["+ second clean view", "+ random-sign noise"]
ARMS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "LARS": ({}, (0.984, 0.980, 0.970)),
    "+ second clean view": ({"method": "multiview"}, (0.985, 0.982, 0.968)),
    "+ random-sign noise": ({"method": "noise"}, (0.985, 0.984, 0.977)),
    "+ sequential attack": ({"method": "disadv"}, (0.986, 0.988, 0.986)),
    "+ ConAdv": ({"method": "conadv", "lookahead": True}, (0.986, 0.988, 0.985)),
    "small batch, SGD": ({"optim__name": "sgd"}, (0.987,)),
}
TRIED = (1.0, 2.0, 4.0)


def write_sweep(folder: Path, seeds: int = 4, probes: bool = True) -> Path:
    """Six arms at up to three batches; the baseline's rate is at its edge at the largest batch.

    At 100 ConAdv has probe lines; LARS and the sequential attack are analysed at 300.
    """
    cells = [
        _cell(folder, arm, number, seeds)
        for arm, (_, accuracies) in ARMS.items()
        for number in range(len(accuracies))
    ]
    for seed in range(seeds):
        if probes:
            record = folder / f"runs/4-100-seed{seed}/record.jsonl"
            lines = [line for step in range(0, 60, 5) for line in probe_lines(step, seed)]
            record.write_text(record.read_text() + "".join(json.dumps(x) + "\n" for x in lines))
        for arm, value in ((0, 10.0), (3, 2.5)):
            path = folder / f"runs/{arm}-300-seed{seed}/analysis.json"
            path.write_text(json.dumps(analysis(value + 0.1 * seed)))
    tune = {"seeds": [100], "settings": {"optim.lr": TRIED}}
    arms = {name: {"settings": settings} for name, (settings, _) in ARMS.items()}
    document = {
        "version": "0.1.0",
        "name": "digits",
        "spec_path": "digits.yaml",
        "cells": cells,
        "baseline": "LARS",
        "controls": CONTROLS,
        "axis": "global_batch_size",
        "spec": {"title": "Digits <by> batch", "tune": tune, "base": {}, "arms": arms},
        "failed": [{"run": "runs/lars-7", "error": "loss is <nan> in step 3"}],
    }
    (folder / "sweep.json").write_text(json.dumps(document))
    return folder


def _cell(folder: Path, arm: str, number: int, seeds: int) -> dict[str, Any]:
    index, batch = list(ARMS).index(arm), BATCHES[number]
    settings, accuracies = ARMS[arm]
    validation = (0.95, 0.96, 0.97) if (arm, batch) == ("LARS", 300) else (0.95, 0.97, 0.96)
    chosen = TRIED[validation.index(0.97)]
    noise = 0.0015 * np.random.default_rng([index, batch]).standard_normal(seeds)
    runs = [f"runs/{index}-{batch}-seed{seed}" for seed in range(seeds)]
    for seed, run in enumerate(runs):
        config = make_config(seed=seed, global_batch_size=batch, optim__lr=chosen, **settings)
        write_run(folder / run, config, round(accuracies[number] + noise[seed], 6))
    trials = [
        {"settings": {"optim.lr": lr}, "runs": [], "validation": [v], "mean": v}
        for lr, v in zip(TRIED, validation, strict=True)
    ]
    cell = {"arm": arm, "settings": {"global_batch_size": batch}, "trials": trials, "runs": runs}
    return {**cell, "chosen": {"optim.lr": chosen}, "seeds": [*range(seeds)]}


def probe_lines(step: int, seed: int = 0) -> list[dict[str, Any]]:
    """The longer ago, the worse; look-ahead halves the loss; noise is nearly nothing."""
    phase = "warm-up" if step < 10 else "peak" if step < 30 else "decay"
    scale = 0.5 + 0.1 * seed + step / 100

    def line(predictor: str, tau: int, kept: float, error: float | None) -> dict[str, Any]:
        values = {"cosine": kept, "loss_increase": kept * scale, "relative_error": error}
        common = {"type": "probe", "step": step, "epoch": step / 5, "phase": phase, "lr": 1.0}
        return {**common, **values, "tau": tau, "predictor": predictor, "images": 64, "eps": 0.01}

    found = [line("current", 0, 1.0, None)]
    for tau in (1, 2, 4, 8):
        stale = 1 - (0.05 if phase == "decay" else 0.1) * tau
        found += [line("stale", tau, stale, 1.0), line("momentum", tau, 1 - 0.05 * tau, 0.1 * tau)]
    return [*found, line("noise", 0, 0.05, None)]


def analysis(eigenvalue: float) -> dict[str, Any]:
    """An analysis.json whose keskar part was switched off."""
    sharpness = {"sam": {"rho": 0.05, "value": eigenvalue / 50}, "keskar": None}
    return {
        "version": "0.1.0",
        "step": 60,
        "split": "train",
        "images": 500,
        "loss": 0.02,
        "accuracy": 1.0,
        "sharpness": sharpness,
        "hessian": {"eigenvalues": [eigenvalue, 1.0], "trace": 5 * eigenvalue},
        "robust": {"eps": 0.01, "steps": 10, "accuracy": 0.6, "images": 500},
    }
