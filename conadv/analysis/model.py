"""Every analysis of one trained model, as the dictionary that analysis.json holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from conadv import rng
from conadv.analysis.hessian import lanczos, trace
from conadv.analysis.landscape import filter_normalised, grid, line, plane
from conadv.analysis.objective import GRADIENT, HVP, Objective, Tick, Value, clean_objective
from conadv.analysis.options import Options
from conadv.analysis.sharpness import keskar_sharpness, sam_sharpness
from conadv.analysis.watch import Watch
from conadv.attacks.pgd import PGD
from conadv.data.loader import Data
from conadv.training.evaluate import evaluate
from conadv.training.trainer import Parts

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def analyze(parts: Parts, options: Options, watch: Watch | None = None) -> dict[str, Any]:
    """Hessian, sharpness, landscape and robust accuracy of the clean route of ``parts.model``, left as it is.

    All on the same ``options.images`` training images (fewer where there are not so many), the first of a fixed
    permutation, without augmentation; the landscape also on as many test images, robust accuracy on test images only.
    Returns plain values for JSON: numbers that are not finite are None. See docs/analysis.md for every key.

    Ranks: one process. Raises ConadvError for options that contradict each other.
    """
    watch = watch or Watch()
    todo = work(parts.data, options)
    watch.begin(sum(todo.values()))
    with watch.timed("loss", todo["loss"]):
        train = _objective(parts, options, "train", watch.tick)
        value = train.value(train.theta)
    found: dict[str, Any] = {"loss": value.loss, "accuracy": value.accuracy}
    with watch.timed("hessian", todo["hessian"]):
        found["hessian"] = _hessian(train, options)
    with watch.timed("sharpness", todo["sharpness"]):
        found["sharpness"] = _sharpness(train, options)
    with watch.timed("landscape", todo["landscape"]):
        found["landscape_1d"], found["landscape_2d"] = _landscape(parts, train, options)
    with watch.timed("robust", todo["robust"]):
        found["robust"] = _robust(parts, options, watch.tick)
    return _finite({"images": train.images, **found, "seconds": dict(watch.seconds)})  # type: ignore[no-any-return]


def _objective(parts: Parts, options: Options, split: str, tick: Tick) -> Objective:
    x, y = images(parts.data, split, options.images)
    return clean_objective(parts.model, x, y, parts.space, dtype=_DTYPES[options.dtype], tick=tick)


def images(data: Data, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images (uint8 N,C,H,W) and labels of a split in evaluation's fixed permutation."""
    batches = list(data.eval_batches(split, count, count))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def work(data: Data, options: Options) -> dict[str, float]:
    """How much each part has to do at most, in forward passes of one image."""
    train, test = min(options.images, data.train_size), min(options.images, data.test_size)
    points = 0 if options.landscape == "none" else options.grid
    plane_points = points**2 if options.landscape == "2d" else 0
    robust = min(options.robust_images, data.test_size) * (1 + GRADIENT * options.robust_steps)
    hessian = (options.iterations if options.eigenvalues else 0) + options.probes
    return {
        "loss": 2 * train,
        "hessian": HVP * hessian * train,
        "sharpness": (options.keskar_steps + 2) * GRADIENT * train,
        "landscape": points * (train + test) + plane_points * train,
        "robust": robust,
    }


def _hessian(train: Objective, options: Options) -> dict[str, Any] | None:
    theta, known = train.theta, None
    if not options.eigenvalues and not options.probes:
        return None

    def product(vector: Tensor) -> Tensor:
        return train.hvp(theta, vector)

    found: dict[str, Any] = dict.fromkeys(
        ("eigenvalues", "residuals", "iterations", "trace", "trace_stderr", "probes")
    )
    if options.eigenvalues:
        start = rng.generator("cpu", options.seed, "analyze", "lanczos")
        known = lanczos(product, theta, options.eigenvalues, options.iterations, start)
        found |= {
            "eigenvalues": known.eigenvalues,
            "residuals": known.residuals,
            "iterations": known.iterations,
        }
    if options.probes:
        draws = rng.generator("cpu", options.seed, "analyze", "trace")
        estimate = trace(product, theta, options.probes, draws, known)
        found |= {
            "trace": estimate.value,
            "trace_stderr": estimate.stderr,
            "probes": estimate.probes,
        }
    return found


def _sharpness(train: Objective, options: Options) -> dict[str, Any]:
    eps, steps = options.keskar_eps, options.keskar_steps
    return {
        "sam": {"rho": options.rho, "value": sam_sharpness(train, options.rho)},
        "keskar": {"eps": eps, "steps": steps, "value": keskar_sharpness(train, eps, steps)},
    }


def _landscape(
    parts: Parts, train: Objective, options: Options
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    if options.landscape == "none":
        return None, None
    test = train.on(*images(parts.data, "test", options.images))
    first, second = (
        filter_normalised(train, rng.generator("cpu", options.seed, "analyze", "direction", axis))
        for axis in (0, 1)
    )
    alphas = grid(options.grid)
    along = line(train, test, first, alphas)
    one = {"alphas": along.alphas, **_curves("train", along.train), **_curves("test", along.test)}
    return one, asdict(plane(train, first, second, alphas)) if options.landscape == "2d" else None


def _curves(split: str, values: list[Value]) -> dict[str, list[float]]:
    return {
        f"{split}_loss": [v.loss for v in values],
        f"{split}_accuracy": [v.accuracy for v in values],
    }


def _robust(parts: Parts, options: Options, tick: Tick) -> dict[str, Any] | None:
    if not options.robust_images:
        return None
    config, steps = parts.config, options.robust_steps
    eps = config.eval.robust_eps
    assert eps is not None
    attack = PGD(eps, steps, None, config.attack.norm, False, 1.0, parts.space)
    batches = parts.data.eval_batches(
        "test", options.robust_images, min(config.eval.batch_size, 125)
    )
    result = evaluate(
        parts.model, _ticking(batches, steps, tick), parts.space, attack=attack, seed=options.seed
    )
    return {"eps": eps, "steps": steps, "accuracy": result.accuracy, "images": result.images}


def _ticking(
    batches: Iterable[tuple[Tensor, Tensor]], steps: int, tick: Tick
) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in batches:
        yield x, y
        tick((1 + GRADIENT * steps) * len(y))


def _finite(value: Any) -> Any:
    """The same with None for every number that JSON has no name for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
