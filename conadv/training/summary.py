"""summary.json: what a finished run comes to, from its record and its last evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from conadv import __version__
from conadv.training.build import Run
from conadv.training.evaluate import Result
from conadv.training.record import finite


def summarize(
    run: Run, results: Mapping[str, Result | None], lines: list[dict[str, Any]]
) -> dict[str, Any]:
    """The fields that docs/record.md lists."""
    accuracy = {name: result and result.accuracy for name, result in results.items()}
    loss = {name: result and finite(result.loss) for name, result in results.items()}
    steps = [line for line in lines if line["type"] == "step"]
    failed = {line.get("attack_rank") for line in lines if line["type"] == "attack_loss"}
    return {
        **_settings(run),
        **{f"{split}_loss": loss[split] for split in ("train", "validation", "test")},
        **{f"{split}_accuracy": value for split, value in accuracy.items()},
        "robust_eps": None if accuracy["robust"] is None else run.config.eval.robust_eps,
        **_costs(steps, run),
        "attack_ranks_lost": len(failed),
        "bad_images": sum(line["type"] == "bad_image" for line in lines),
        "version": __version__,
    }


def _settings(run: Run) -> dict[str, Any]:
    config, derived = run.config, run.derived
    names = ("recipe", "method", "staleness", "lookahead", "global_batch_size", "seed")
    # a second set of batch norm does not make the network larger
    sizes = [p.numel() for name, p in run.model.named_parameters() if ".routes." not in name]
    return {
        **{name: getattr(config, name) for name in names},
        "optimizer": config.optim.name,
        "lr": derived.lr,
        "eps": config.attack.eps,
        "augment": config.data.augment,
        "aug_view": config.data.aug_view,
        "micro_batch_size": derived.micro_batch_size,
        "batchnorm_batch_size": derived.micro_batch_size,
        "accumulation": derived.accumulation,
        "ranks": run.comm.ranks,
        "attack_ranks": len(run.teams.attackers),
        "executor": run.choice.name,
        "steps": derived.steps,
        "epochs": derived.epochs,
        "model": config.model.name,
        "parameters": sum(sizes),
    }


def _costs(steps: list[dict[str, Any]], run: Run) -> dict[str, Any]:
    """Times from the record's phases. The first step (allocation, warm caches) is left out of the
    median.
    """
    totals = [line.get("seconds", sum(line["phases"].values())) for line in steps]
    seconds = sum(totals)
    attack = sum(line["phases"].get("attack", 0.0) for line in steps)
    batch, micro = run.config.global_batch_size, run.derived.micro_batch_size
    gradients = sum(run.step.method.gradient_images(line["losses"], micro) for line in steps)
    return {
        "seconds": seconds,
        "step_seconds_median": median(totals[1:] or totals),
        "clean_images_per_second": batch * len(steps) / seconds,
        "gradient_images_per_second": batch * gradients / seconds,
        "gradient_images_per_clean_image": gradients / len(steps),
        "attack_seconds_share": attack / seconds,
        "late_batches": sum(line.get("late", False) for line in steps),
    }
