"""A made-up sweep folder in the form that `conadv sweep` leaves: sweep.json and run directories with known numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .test_report import make_config, write_run

BATCHES = (20, 100, 300)
CONTROLS = ("+ second clean view", "+ random-sign noise")
# arm -> (settings, views plus attack gradients, mean test accuracy at each batch)
ARMS: dict[str, tuple[dict[str, Any], int, dict[int, float]]] = {
    "LARS": ({}, 1, {20: 0.984, 100: 0.980, 300: 0.970}),
    "+ second clean view": ({"method": "multiview"}, 2, {20: 0.985, 100: 0.982, 300: 0.968}),
    "+ random-sign noise": ({"method": "noise"}, 2, {20: 0.985, 100: 0.984, 300: 0.977}),
    "+ sequential attack": ({"method": "disadv"}, 3, {20: 0.986, 100: 0.988, 300: 0.986}),
    "+ ConAdv, tau = 1": ({"method": "conadv"}, 3, {20: 0.986, 100: 0.985, 300: 0.977}),
    "+ ConAdv, look-ahead": (
        {"method": "conadv", "lookahead": True},
        3,
        {20: 0.986, 100: 0.988, 300: 0.985},
    ),
    "small batch, SGD": ({"optim__name": "sgd"}, 1, {20: 0.987}),
}
TRIED = (1.0, 2.0, 4.0)
VALIDATION = (0.95, 0.97, 0.96)
IMAGES = 6000  # per training: 12 epochs of 500


def write_sweep(folder: Path, seeds: int = 4, spread: float = 0.0015, probes: bool = True) -> Path:
    """Seven arms, three batches; the baseline's learning rate is at the edge of its grid at the largest batch.

    At 100 the look-ahead arm has probe lines, and two arms have an analysis of their largest batch.
    """
    cells = [
        _cell(folder, arm, batch, seeds, spread, probes)
        for arm, (_, _, accuracies) in ARMS.items()
        for batch in accuracies
    ]
    spec = {
        "title": "Digits <by> batch",
        "tune": {
            "seeds": [100],
            "settings": {"optim.lr": list(TRIED)},
            "by": "validation_accuracy",
        },
        "confirm": {"seeds": list(range(seeds))},
    }
    document = {
        "version": "0.1.0",
        "name": "digits",
        "spec": spec,
        "spec_path": "digits.yaml",
        "baseline": "LARS",
        "controls": list(CONTROLS),
        "axis": "global_batch_size",
        "cells": cells,
        "failed": [{"run": "runs/lars-7", "error": "loss is <nan> in step 3"}],
    }
    (folder / "sweep.json").write_text(json.dumps(document))
    return folder


def _cell(
    folder: Path, arm: str, batch: int, seeds: int, spread: float, probes: bool
) -> dict[str, Any]:
    index = list(ARMS).index(arm)
    edge = (arm, batch) == ("LARS", 300)
    validation = (0.95, 0.96, 0.97) if edge else VALIDATION
    chosen = TRIED[validation.index(max(validation))]
    runs = [f"runs/{index}-{batch}-seed{seed}" for seed in range(seeds)]
    for seed, run in enumerate(runs):
        _run(folder / run, arm, batch, seed, chosen, spread)
    if probes and arm == "+ ConAdv, look-ahead" and batch == 100:
        for seed, run in enumerate(runs):
            _add_probes(folder / run, seed)
    if batch == 300 and index in (0, 3):
        for seed, run in enumerate(runs):
            (folder / run / "analysis.json").write_text(
                json.dumps(analysis(10.0 / (index + 1) + 0.1 * seed))
            )
    trials = [
        {
            "settings": {"optim.lr": lr},
            "runs": [f"runs/tune-{index}-{batch}-{lr}"],
            "validation": [v],
            "mean": v,
        }
        for lr, v in zip(TRIED, validation, strict=True)
    ]
    return {
        "arm": arm,
        "settings": {"global_batch_size": batch},
        "trials": trials,
        "chosen": {"optim.lr": chosen},
        "at_edge": edge,
        "runs": runs,
        "seeds": list(range(seeds)),
    }


def _run(path: Path, arm: str, batch: int, seed: int, lr: float, spread: float) -> None:
    settings, images, accuracies = ARMS[arm]
    config = make_config(
        seed=seed, global_batch_size=batch, optim__lr=lr, data__validation_images=150, **settings
    )
    noise = np.random.default_rng([list(ARMS).index(arm), batch, seed]).standard_normal()
    seconds = 10.0 * images
    write_run(
        path,
        config,
        round(accuracies[batch] + spread * noise, 6),
        test_loss=0.1,
        validation_accuracy=0.97,
        seconds=seconds,
        step_seconds_median=0.05 * images,
        clean_images_per_second=IMAGES / seconds,
        gradient_images_per_second=images * IMAGES / seconds,
    )


def _add_probes(run: Path, seed: int) -> None:
    """Every tenth step: the longer ago, the worse; look-ahead halves the loss; noise is nearly nothing."""
    record = run / "record.jsonl"
    lines = [line for step in range(0, 60, 5) for line in probe_lines(step, seed)]
    record.write_text(record.read_text() + "".join(json.dumps(line) + "\n" for line in lines))


def probe_lines(step: int, seed: int = 0) -> list[dict[str, Any]]:
    phase = "warm-up" if step < 10 else "peak" if step < 30 else "decay"
    scale = 0.5 + 0.1 * seed + step / 100
    common = {
        "type": "probe",
        "step": step,
        "epoch": step / 5,
        "phase": phase,
        "lr": 1.0,
        "clean_loss": 0.5,
    }

    def line(predictor: str, tau: int, kept: float, error: float | None) -> dict[str, Any]:
        values = {
            "cosine": kept,
            "loss_increase": kept * scale,
            "relative_error": error,
            "images": 64,
            "eps": 0.01,
        }
        return {**common, "predictor": predictor, "tau": tau, **values}

    found = [line("current", 0, 1.0, None), line("noise", 0, 0.05, None)]
    for tau in (1, 2, 4, 8):
        found += [
            line("stale", tau, 1 - (0.05 if phase == "decay" else 0.1) * tau, 1.0),
            line("momentum", tau, 1 - 0.05 * tau, 0.1 * tau**0.5),
        ]
    return found


def analysis(eigenvalue: float) -> dict[str, Any]:
    """An analysis.json whose keskar part was switched off."""
    alphas = [-1.0, -0.5, 0.0, 0.5, 1.0]
    losses = [0.1 + eigenvalue * alpha**2 / 10 for alpha in alphas]
    return {
        "version": "0.1.0",
        "step": 60,
        "split": "train",
        "images": 500,
        "loss": 0.02,
        "accuracy": 1.0,
        "hessian": {
            "eigenvalues": [eigenvalue, eigenvalue / 2],
            "residuals": [0.0, 0.0],
            "trace": 5 * eigenvalue,
        },
        "sharpness": {"sam": {"rho": 0.05, "value": eigenvalue / 50}, "keskar": None},
        "landscape_1d": {
            "alphas": alphas,
            "train_loss": losses,
            "test_loss": [loss + 0.05 for loss in losses],
        },
        "landscape_2d": None,
        "robust": {"eps": 0.01, "steps": 10, "accuracy": 0.6, "images": 500},
    }
