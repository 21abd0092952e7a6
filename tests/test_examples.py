"""The examples run and do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> object:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loop_learns() -> None:
    # Red when: gradient() does not fill .grad (update() then refuses).
    torch.set_num_threads(1)
    assert load("own_loop").main(epochs=3) > 0.85  # type: ignore[attr-defined]


def test_own_loop_adds_five_lines() -> None:
    lines = (EXAMPLES / "own_loop.py").read_text().splitlines()
    marked = [line for line in lines if any(f"# {n}" in line for n in range(1, 6))]
    assert len(marked) == 5
