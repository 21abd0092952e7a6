"""Split batch norm on other people's networks: benchmarks/zoo.py's check, on a few of each kind.

The script checks all networks of results/models/zoo.json.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import list_models

from conadv import ConadvError
from conadv.nn.split_batchnorm import SplitBatchNorm, split_batchnorm

from .test_two_hosts import load

zoo = load("zoo")
ROWS = json.loads(zoo.RESULTS.read_text())["rows"]
CASES = {case.name: case for case in zoo.cases()}


def quickest(count: int) -> list[dict[str, Any]]:
    """The networks of each library and each set of batch-norm classes that take least time."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in sorted(ROWS, key=lambda row: float(row["seconds"])):
        found.setdefault((row["name"].partition(":")[0], *row["kinds"]), []).append(row)
    return [row for rows in found.values() for row in rows[:count]]


@pytest.mark.parametrize("row", quickest(3), ids=lambda row: row["name"])
def test_routes_strip_and_strict_load(row: dict[str, Any]) -> None:
    # Red when: _copy_plain shares the clean route's tensors, strip leaves a route, or a layer class
    # is rebuilt anew.
    if row["name"].startswith("timm:"):
        pytest.importorskip("timm", reason="timm is not installed")
    torch.set_num_threads(1)
    found = zoo.check(CASES[row["name"]])
    assert (found.batch_norms, list(found.kinds)) == (row["batch_norms"], row["kinds"])


def test_the_table_is_complete_and_in_the_docs() -> None:
    # Red when: a torchvision network has no row, a row has a problem, or the page was not drawn
    # from zoo.json.
    names = {f"torchvision:{name}" for name in list_models(module=torchvision.models)}
    assert names == {row["name"] for row in ROWS if row["name"].startswith("torchvision:")}
    assert not [row["name"] for row in ROWS if row["problem"]]
    assert zoo.table(ROWS) in zoo.PAGE.read_text()


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    # The check itself, on a split that keeps one set of parameters for both routes.
    def shared(model: nn.Module, *names: str) -> nn.Module:
        split_batchnorm(model, *names)
        for layer in model.modules():
            if isinstance(layer, SplitBatchNorm):
                layer.routes["adv"].weight = layer.weight
        return model

    case = CASES["torchvision:mobilenet_v3_small"]
    monkeypatch.setattr(zoo, "split_batchnorm", shared)
    with pytest.raises(AssertionError, match="must not reach the clean one"):
        zoo.check(case)
    monkeypatch.setattr(zoo, "split_batchnorm", lambda model, *names: model)
    with pytest.raises(ConadvError, match="no route 'adv'"):
        zoo.check(case)
