"""Split batch norm on other people's networks: benchmarks/zoo.py's check, on every case at the size that fits here.

Networks that took less than QUICK seconds when results/models/zoo.json was made run forward and backward by both
routes; the others are built without values, split, stripped and loaded back, which looks at names and shapes alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import list_models

from conadv import ConadvError
from conadv.nn.split_batchnorm import SplitBatchNorm, split_batchnorm

from .test_two_hosts import load

ROOT = Path(__file__).resolve().parent.parent
QUICK = 1.0  # seconds of the processor
zoo = load("zoo")
RESULT = json.loads(zoo.RESULTS.read_text())
ROWS = {row["name"]: row for row in RESULT["rows"]}
CASES = {case.name: case for case in zoo.cases()}
HEAVY_TO_BUILD = 5.0  # seconds from which a timm network is left to the script: its own initialisation cannot be skipped


def is_quick(name: str) -> bool:
    return bool(ROWS[name]["seconds"] < QUICK)


def is_tested(name: str) -> bool:
    return name.startswith("torchvision:") or bool(ROWS[name]["seconds"] < HEAVY_TO_BUILD)


@pytest.mark.parametrize("name", [name for name in CASES if is_tested(name)])
def test_routes_strip_and_strict_load(name: str) -> None:
    # Red when: _copy_plain shares the clean route's tensors, strip leaves a route, or a layer class is rebuilt anew.
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason="timm is not installed")
    torch.set_num_threads(1)
    row = zoo.check(CASES[name], forward=is_quick(name))
    assert (row.batch_norms, list(row.kinds)) == (ROWS[name]["batch_norms"], ROWS[name]["kinds"])


def test_the_table_is_complete_and_in_the_docs() -> None:
    # Red when: a torchvision network has no row, a row has a problem, or the page was not drawn from zoo.json.
    names = {f"torchvision:{name}" for name in list_models(module=torchvision.models)}
    assert names == {name for name in ROWS if name.startswith("torchvision:")}
    assert not [row["name"] for row in ROWS.values() if row["problem"] or not row["forward"]]
    assert zoo.table(RESULT["rows"]) in zoo.PAGE.read_text()


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    # The check itself, on a split that keeps one set of parameters for both routes.
    def shared(model: nn.Module, *names: str) -> nn.Module:
        split_batchnorm(model, *names)
        for layer in model.modules():
            if isinstance(layer, SplitBatchNorm):
                layer.routes["adv"].weight = layer.weight
        return model

    case = CASES["torchvision:resnet18"]
    zoo.check(case)
    monkeypatch.setattr(zoo, "split_batchnorm", shared)
    with pytest.raises(AssertionError, match="must not reach the clean one"):
        zoo.check(case)
    monkeypatch.setattr(zoo, "split_batchnorm", lambda model, *names: model)
    with pytest.raises(ConadvError, match="no route 'adv'"):
        zoo.check(case)
