"""Concurrent adversarial learning (ConAdv) for large-batch training in PyTorch.

The names below are the public interface. They are imported on first use, so that ``import conadv`` and
``conadv --help`` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

_WHERE = {
    "FGSM": "attacks",
    "AttackPlan": "attacks",
    "PGD": "attacks",
    "PixelSpace": "attacks",
    "RandomSigns": "attacks",
    "Batch": "types",
    "MicroBatch": "types",
    "StepRecord": "types",
    "ConadvError": "errors",
    "Comm": "engine",
    "Inline": "engine",
    "Ranks": "engine",
    "Stream": "engine",
    "NonFiniteError": "engine",
    "TrainStep": "engine",
    "Concurrent": "methods.concurrent",
    "MultiView": "methods.controls",
    "Noise": "methods.controls",
    "Recycle": "methods.recycle",
    "SAM": "methods.sam",
    "Sequential": "methods.sequential",
    "Vanilla": "methods.vanilla",
    "LAMB": "optim",
    "LARS": "optim",
    "parameter_groups": "optim",
    "WarmupDecay": "schedules",
    "EMA": "ema",
    "evaluate": "evaluation",
    "frozen_stats": "norm",
    "recalibrate": "precise_bn",
    "route": "norm",
    "split_batchnorm": "norm",
    "strip": "norm",
    "WindowedLoader": "data",
    "windows": "data",
}

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from .attacks import FGSM as FGSM
    from .attacks import PGD as PGD
    from .attacks import AttackPlan as AttackPlan
    from .attacks import PixelSpace as PixelSpace
    from .attacks import RandomSigns as RandomSigns
    from .data import WindowedLoader as WindowedLoader
    from .data import windows as windows
    from .ema import EMA as EMA
    from .engine import Comm as Comm
    from .engine import Inline as Inline
    from .engine import NonFiniteError as NonFiniteError
    from .engine import Ranks as Ranks
    from .engine import Stream as Stream
    from .engine import TrainStep as TrainStep
    from .errors import ConadvError as ConadvError
    from .evaluation import evaluate as evaluate
    from .methods.concurrent import Concurrent as Concurrent
    from .methods.controls import MultiView as MultiView
    from .methods.controls import Noise as Noise
    from .methods.recycle import Recycle as Recycle
    from .methods.sam import SAM as SAM
    from .methods.sequential import Sequential as Sequential
    from .methods.vanilla import Vanilla as Vanilla
    from .norm import frozen_stats as frozen_stats
    from .norm import route as route
    from .norm import split_batchnorm as split_batchnorm
    from .norm import strip as strip
    from .optim import LAMB as LAMB
    from .optim import LARS as LARS
    from .optim import parameter_groups as parameter_groups
    from .precise_bn import recalibrate as recalibrate
    from .schedules import WarmupDecay as WarmupDecay
    from .types import Batch as Batch
    from .types import MicroBatch as MicroBatch
    from .types import StepRecord as StepRecord


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'conadv' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
