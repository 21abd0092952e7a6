"""Inputs of the right form with values that are not: changes to plain values that an input's bytes choose.

Bytes that are changed at random seldom pass the first check (a checksum, JSON's grammar), so nothing behind it is
tried. Here the bytes say which places of a value become what, and the result is whole again.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    None,
    -1,
    0,
    "x",
    [],
    {},
    float("inf"),
    float("nan"),
    10**400,
    True,
    1.5,
    2**63,
    1e300,
    ["x"],
)
DROP, DOUBLE = object(), object()


class Bytes:
    """Numbers from bytes; 0 when they have run out."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def below(self, count: int) -> int:
        taken, self._data = self._data[:3], self._data[3:]
        return int.from_bytes(taken, "little") % count


def changed(value: Any, source: Bytes, more: tuple[Any, ...] = ()) -> Any:
    """A copy of lists, objects and plain values (others stay as they are) with one to three changes.

    A place becomes one of ODD or of ``more``, goes, or, if it is a list, is doubled.
    """
    found = _copied(value)
    for _ in range(1 + source.below(3)):
        places = list(_places(found))
        if not places:
            break
        holder, key = places[source.below(len(places))]
        options = (DROP, DOUBLE, *ODD, *more)
        _put(holder, key, options[source.below(len(options))])
    return found


def _put(holder: Any, key: Any, what: Any) -> None:
    if what is DROP:
        del holder[key]
    elif what is not DOUBLE:
        holder[key] = copy.copy(what)
    elif isinstance(holder[key], list):
        holder[key] = 2 * holder[key]


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, (list, tuple)) else value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of everything within ``value``."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def text(value: Any) -> str:
    """As a file: a list is one of lines."""
    return (
        "".join(json.dumps(line) + "\n" for line in value)
        if isinstance(value, list)
        else json.dumps(value)
    )


def seeds(count: int) -> list[bytes]:
    """``count`` inputs whose first byte goes from 0 to ``count`` - 1, and in which each change is drawn."""
    draw = random.Random(count)
    return [bytes([first]) + draw.randbytes(30) for first in range(count)]


PHASES = {"data": 0.1, "gradient": 0.2}
SPANS = [["data", 0.0, 0.1], ["gradient", 0.1, 0.3]]


def record() -> list[dict[str, Any]]:
    """A line of each type, as docs/record.md has them."""
    step = {
        "epoch": 0.1,
        "lr": 1.0,
        "loss": 2.0,
        "losses": {"clean": 2.0},
        "grad_norm": 1.0,
        "phases": PHASES,
    }
    step |= {"seconds": 0.3, "spans": SPANS, "skipped": None, "late": False}
    lines: list[dict[str, Any]] = [
        {
            "type": "header",
            "steps": 3,
            "config": {"method": "vanilla", "seed": 0},
            "ranks": 1,
            "time": "2026-01-01",
        }
    ]
    lines[0] |= {
        "versions": {"torch": "2"},
        "machine": {"cores": 2},
        "git": {"commit": "a", "dirty": False},
    }
    for i in range(3):
        own = {"weight_version": max(0, i - 1), "staleness": min(i, 1)}
        lines.append({"type": "step", "step": i, **step, **own, "time": float(i)})
    evals = {
        "type": "eval",
        "step": 3,
        "epoch": 1.0,
        "loss": 1.0,
        "accuracy": 0.5,
        "images": 9,
        "time": 3.0,
    }
    lines += [{**evals, "split": split} for split in ("test", "train", "robust")]
    lines += [{"type": "timeline", "rank": 1, "role": "attack", "step": 0, "spans": SPANS}]
    lines += [{"type": "attack_loss", "step": 1, "rank": 0, "attack_rank": 1, "reason": "x"}]
    lines += [{"type": "bad_image", "step": 1, "path": "train/a/b.png", "reason": "x"}, *_probes()]
    lines += [{"type": "stop", "step": 2, "signal": "SIGTERM", "time": 2.0}]
    lines += [
        {"type": "resume", "step": 1, "ranks": 1, "execution": {}, "damaged": [], "time": 2.0}
    ]
    return [*lines, {"type": "error", "step": 3, "message": "x"}]


def _probes() -> list[dict[str, Any]]:
    common = {
        "type": "probe",
        "step": 1,
        "epoch": 0.1,
        "phase": "peak",
        "lr": 1.0,
        "clean_loss": 1.0,
    }
    common |= {"images": 8, "eps": 0.1, "cosine": 0.9, "loss_increase": 0.3, "relative_error": None}
    points = (("current", 0), ("noise", 0), ("stale", 1), ("stale", 2), ("momentum", 1))
    return [{**common, "predictor": name, "tau": tau} for name, tau in points]


def summary() -> dict[str, Any]:
    """What a report and a sweep read of a summary.json."""
    shares = dict.fromkeys(
        ("test_accuracy", "train_accuracy", "validation_accuracy", "robust_accuracy"), 0.5
    )
    rates = dict.fromkeys(("clean_images_per_second", "gradient_images_per_second"), 100.0)
    return {
        **shares,
        **rates,
        "ranks": 1,
        "seconds": 1.0,
        "step_seconds_median": 0.3,
        "attack_seconds_share": 0.1,
    }


def sweep() -> dict[str, Any]:
    """Two arms at one point with a run each."""
    trial = {
        "settings": {"optim.lr": 1.0},
        "runs": ["runs/a"],
        "validation": [0.5],
        "validation_loss": [1.0],
    }
    cell = {
        "settings": {"global_batch_size": 8},
        "trials": [{**trial, "mean": 0.5}],
        "tuned_on": "A",
    }
    cell |= {"chosen": {"optim.lr": 1.0}, "at_edge": ["optim.lr"], "seeds": [0]}
    spec = {
        "title": "t",
        "tune": {"seeds": [9], "by": "validation_accuracy", "tune_on": None},
        "confirm": {"seeds": [0]},
    }
    return {
        "version": "0",
        "name": "s",
        "spec": spec,
        "spec_path": "s.yaml",
        "baseline": "A",
        "controls": ["B"],
        "axis": "global_batch_size",
        "cells": [{"arm": name, **cell, "runs": [f"runs/{name.lower()}"]} for name in "AB"],
        "failed": [{"run": "runs/c", "error": "x", "diverged": False}],
    }


def analysis() -> dict[str, Any]:
    """An analysis.json with every part that is read."""
    line = {
        "alphas": [-1.0, 0.0, 1.0],
        "train_loss": [2.0, 1.0, 2.0],
        "test_loss": [2.0, None, 2.0],
    }
    return {
        "version": "0",
        "step": 3,
        "options": {"images": 8},
        "split": "train",
        "loss": 1.0,
        "accuracy": 0.5,
        "hessian": {"eigenvalues": [2.0, 1.0], "trace": 3.0, "trace_stderr": 0.1},
        "sharpness": {"sam": {"rho": 0.05, "value": 0.1}, "keskar": {"value": 1.0}},
        "robust": {"accuracy": 0.5},
        "landscape_1d": line,
        "landscape_2d": None,
    }
