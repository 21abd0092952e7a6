"""Concurrent adversarial learning (ConAdv) for large-batch training in PyTorch.

The names below are the public interface. They are imported on first use, so that ``import conadv``
and ``conadv --help`` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_WHERE = {
    "FGSM": "attacks.fgsm",
    "PGD": "attacks.pgd",
    "PixelSpace": "attacks.space",
    "RandomSigns": "attacks.noise",
    "Batch": "types",
    "MicroBatch": "types",
    "StepRecord": "types",
    "ConadvError": "errors",
    "Comm": "distributed.comm",
    "make_teams": "distributed.teams",
    "Inline": "engine.executors",
    "Ranks": "engine.attack_ranks.executor",
    "Stream": "engine.executors",
    "NonFiniteError": "engine.guard",
    "Numerics": "engine.numerics",
    "TrainStep": "engine.step",
    "Concurrent": "methods.concurrent",
    "MultiView": "methods.controls",
    "Noise": "methods.controls",
    "Recycle": "methods.recycle",
    "SAM": "methods.sam",
    "Sequential": "methods.sequential",
    "Vanilla": "methods.vanilla",
    "LAMB": "optim.lamb",
    "LARS": "optim.lars",
    "parameter_groups": "optim.groups",
    "WarmupDecay": "optim.schedules",
    "EMA": "nn.ema",
    "evaluate": "training.evaluate",
    "frozen_stats": "nn.split_batchnorm",
    "recalibrate": "training.precise_bn",
    "route": "nn.split_batchnorm",
    "split_batchnorm": "nn.split_batchnorm",
    "strip": "nn.split_batchnorm",
    "WindowedLoader": "data.windows",
    "windows": "data.windows",
}

__all__ = ["__version__", *_WHERE]

if TYPE_CHECKING:
    from conadv.attacks.fgsm import FGSM as FGSM
    from conadv.attacks.noise import RandomSigns as RandomSigns
    from conadv.attacks.pgd import PGD as PGD
    from conadv.attacks.space import PixelSpace as PixelSpace
    from conadv.data.windows import WindowedLoader as WindowedLoader
    from conadv.data.windows import windows as windows
    from conadv.distributed.comm import Comm as Comm
    from conadv.distributed.teams import make_teams as make_teams
    from conadv.engine.attack_ranks.executor import Ranks as Ranks
    from conadv.engine.executors import Inline as Inline
    from conadv.engine.executors import Stream as Stream
    from conadv.engine.guard import NonFiniteError as NonFiniteError
    from conadv.engine.numerics import Numerics as Numerics
    from conadv.engine.step import TrainStep as TrainStep
    from conadv.errors import ConadvError as ConadvError
    from conadv.methods.concurrent import Concurrent as Concurrent
    from conadv.methods.controls import MultiView as MultiView
    from conadv.methods.controls import Noise as Noise
    from conadv.methods.recycle import Recycle as Recycle
    from conadv.methods.sam import SAM as SAM
    from conadv.methods.sequential import Sequential as Sequential
    from conadv.methods.vanilla import Vanilla as Vanilla
    from conadv.nn.ema import EMA as EMA
    from conadv.nn.split_batchnorm import frozen_stats as frozen_stats
    from conadv.nn.split_batchnorm import route as route
    from conadv.nn.split_batchnorm import split_batchnorm as split_batchnorm
    from conadv.nn.split_batchnorm import strip as strip
    from conadv.optim.groups import parameter_groups as parameter_groups
    from conadv.optim.lamb import LAMB as LAMB
    from conadv.optim.lars import LARS as LARS
    from conadv.optim.schedules import WarmupDecay as WarmupDecay
    from conadv.training.evaluate import evaluate as evaluate
    from conadv.training.precise_bn import recalibrate as recalibrate
    from conadv.types import Batch as Batch
    from conadv.types import MicroBatch as MicroBatch
    from conadv.types import StepRecord as StepRecord


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'conadv' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
