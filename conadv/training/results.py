"""What a trained model is worth: accuracy on every split and under attack, precise batch-norm
statistics.
"""

from __future__ import annotations

from conadv.attacks.pgd import PGD
from conadv.nn.split_batchnorm import CLEAN, routes_of
from conadv.training.build import Run
from conadv.training.evaluate import Result, evaluate
from conadv.training.precise_bn import recalibrate
from conadv.types import Attack


def measure(run: Run) -> dict[str, Result | None]:
    """Train, validation and test results of the model as it is, and the test result under PGD
    ("robust").

    None for what is switched off: validation without held-out images, PGD with eval.robust_images
    0.
    Ranks: collective; all get the same results, those of the model with rank 0's running
    statistics.
    """
    options, held_out = run.config.eval, run.data.source.validation is not None
    assert options.robust_eps is not None
    pgd = PGD(
        options.robust_eps,
        options.robust_steps,
        norm=run.config.attack.norm,
        random_start=1.0,
        space=run.space,
    )
    robust = options.robust_images
    return {
        "train": evaluate_split(run, "train", options.train_images),
        "validation": evaluate_split(run, "validation") if held_out else None,
        "test": evaluate_split(run, "test"),
        "robust": evaluate_split(run, "test", robust, pgd) if robust else None,
    }


def evaluate_split(
    run: Run, split: str, limit: int | None = None, attack: Attack | None = None
) -> Result:
    """The result on at most ``limit`` images of a split. Ranks: collective."""
    config, comm = run.config, run.comm
    comm.at("evaluation", run.step.version)
    # each rank has tracked the statistics of its own images
    comm.broadcast(run.model.buffers())
    if run.ema is not None:
        comm.broadcast(run.ema.module.buffers())
    return evaluate(
        run.evaluated,
        run.data.eval_batches(split, limit, config.eval.batch_size),
        run.space,
        attack=attack,
        seed=config.seed,
        precision=config.precision,
        channels_last=config.channels_last,
        comm=comm,
    )


def recalibrate_model(run: Run) -> None:
    """Precise statistics for the model that is evaluated, on its clean route and on that of the
    extra images.

    The images are training images as evaluation sees its own, without augmentation: always the same
    whole micro-batches for any number of ranks. The extra images of a method are made of them at
    the final weights.
    Ranks: collective.
    """
    config, comm = run.config, run.comm
    assert config.eval.precise_bn_images is not None
    count = min(config.eval.precise_bn_images, run.data.train_size)
    size = min(run.derived.micro_batch_size, count)
    routes: dict[str, Attack | None] = {CLEAN: None}
    if "adv" in routes_of(run.evaluated):
        routes["adv"] = getattr(run.step.method, "attack", getattr(run.step.method, "noise", None))
    for name, attack in routes.items():
        comm.at(f"recalibration of the {name} route", run.step.version)
        recalibrate(
            run.evaluated,
            run.data.eval_batches("train", count // size * size, size),
            run.space,
            route=name,
            attack=attack,
            seed=config.seed,
            precision=config.precision,
            channels_last=config.channels_last,
            comm=comm,
        )
