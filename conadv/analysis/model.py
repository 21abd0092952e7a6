"""Every analysis of one trained model, as the dictionary that analysis.json holds."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conadv import rng
from conadv.analysis.hessian import hessian, spectrum, trace
from conadv.analysis.objective import Objective, clean_objective
from conadv.analysis.options import Options
from conadv.analysis.sharpness import keskar_sharpness, sam_sharpness
from conadv.attacks.pgd import PGD
from conadv.attacks.space import PixelSpace
from conadv.config.schema import Config
from conadv.data.loader import Data
from conadv.training.evaluate import evaluate

Found = dict[str, Any]


def analyze(
    model: nn.Module,
    data: Data,
    space: PixelSpace,
    config: Config,
    options: Options,
    announce: Callable[[str], None] = lambda part: None,
) -> Found:
    """Hessian, sharpness and robust accuracy of the model's clean route.

    All on the same ``options.images`` training images (fewer where there are not so many), without
    augmentation; robust accuracy on test images. ``model`` stays as it is. ``announce`` hears the
    name of each part as it begins. Returns values for JSON, None for numbers that are not finite;
    docs/analysis.md explains the keys.

    Ranks: one process. Raises ConadvError where the loss is not finite.
    """
    dtype = getattr(torch, options.dtype)
    train = clean_objective(model, *images(data, "train", options.images), space, dtype=dtype)
    loss, accuracy = train.value(train.theta)
    found: Found = {"images": len(train.y_N), "loss": loss, "accuracy": accuracy}
    seconds = {}
    parts: dict[str, Callable[[], Found | None]] = {
        "hessian": lambda: _hessian(train, options),
        "sharpness": lambda: _sharpness(train, options),
        "robust": lambda: _robust(model, data, space, config, options),
    }
    for name, compute in parts.items():
        announce(name)
        begin = time.monotonic()
        found[name] = compute()
        seconds[name] = time.monotonic() - begin
    text = json.dumps({**found, "seconds": seconds})
    return dict(json.loads(text, parse_constant=lambda nan_or_infinity: None))


def images(data: Data, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images (uint8 N,C,H,W) and labels in evaluation's fixed permutation."""
    x, y = zip(*data.eval_batches(split, count, count), strict=True)
    return torch.cat(x), torch.cat(y)


def _hessian(train: Objective, options: Options) -> Found | None:
    if not options.eigenvalues and not options.probes:
        return None
    keys = ("eigenvalues", "residuals", "iterations", "trace", "trace_stderr", "probes")
    found: Found = dict.fromkeys(keys)
    operator, known = hessian(train), None
    if options.eigenvalues:
        start = rng.generator("cpu", options.seed, "analyze", "lanczos")
        found["iterations"] = min(options.iterations, operator.shape[0])
        known = spectrum(operator, options.eigenvalues, found["iterations"], start)
        found |= {"eigenvalues": known.eigenvalues, "residuals": known.residuals}
    if options.probes:
        draws = rng.generator("cpu", options.seed, "analyze", "trace")
        found["probes"] = options.probes
        found["trace"], found["trace_stderr"] = trace(operator, options.probes, draws, known)
    return found


def _sharpness(train: Objective, options: Options) -> Found:
    eps, steps, rho = options.keskar_eps, options.keskar_steps, options.rho
    return {
        "sam": {"rho": rho, "value": sam_sharpness(train, rho)},
        "keskar": {"eps": eps, "steps": steps, "value": keskar_sharpness(train, eps, steps)},
    }


def _robust(
    model: nn.Module, data: Data, space: PixelSpace, config: Config, options: Options
) -> Found | None:
    if not options.robust_images:
        return None
    eps, steps = config.eval.robust_eps, options.robust_steps
    assert eps is not None
    attack = PGD(eps, steps, None, config.attack.norm, False, 1.0, space)
    batches = data.eval_batches("test", options.robust_images, min(config.eval.batch_size, 125))
    # a copy: some modules write to their buffers in eval mode, too
    result = evaluate(copy.deepcopy(model), batches, space, attack=attack, seed=options.seed)
    return {"eps": eps, "steps": steps, "accuracy": result.accuracy, "images": result.images}
