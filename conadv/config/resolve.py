"""Fill in every default and check every rule between settings, once, before anything is loaded.

:func:`resolve` needs a config alone. :func:`derive` adds what also depends on the data and on the
number of ranks. Below them everybody is handed numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from conadv.config.schema import LARGEST_LR, Config, OptimConfig, ProbeConfig, changed, replace
from conadv.errors import ConadvError
from conadv.methods import METHODS
from conadv.optim import OPTIMIZERS

METHOD_SETTINGS = tuple(dict.fromkeys(name for row in METHODS.values() for name in row.settings))
OPTIM_SETTINGS = tuple(dict.fromkeys(name for row in OPTIMIZERS.values() for name in row.defaults))
EXTRA_VIEW_SETTINGS = ("attack.share", "attack.route", "attack.statistics")
"""Settings of the attack that no recipe chooses, so that they must have an effect wherever they
stand."""


def resolve(config: Config) -> Config:
    """Every default filled in, every rule checked that needs no data. Raises ConadvError;
    idempotent.
    """
    for check in _CHECKS:
        check(config)
    config = _with_method_defaults(config)
    optim = OPTIMIZERS[config.optim.name].complete(config.optim.model_dump())
    config = replace(config, optim=replace(config.optim, **optim))
    config = _with_attack_defaults(config)
    if config.micro_batch_size is None:
        config = replace(config, micro_batch_size=config.global_batch_size)
    if config.micro_batch_size != "auto":
        accumulation(config)
    return config


def micro_batch(config: Config) -> int:
    """Clean images per forward pass. ConadvError where "auto" has not been settled: that needs the
    device.
    """
    if config.micro_batch_size == "auto":
        raise ConadvError(
            "micro_batch_size auto is found by trial on the device: `conadv train` does so, and "
            "conadv.planning.micro_batch.settle does. Give a number here."
        )
    return config.micro_batch_size or config.global_batch_size


def accumulation(config: Config, ranks: int = 1) -> int:
    """Micro-batches per rank and step: global batch = micro-batch x accumulation x ranks, or
    ConadvError.
    """
    micro = micro_batch(config)
    if config.global_batch_size % ranks:
        raise ConadvError(
            f"global_batch_size {config.global_batch_size} does not divide into {ranks} rank(s)."
        )
    count, rest = divmod(config.global_batch_size, micro * ranks)
    if rest or not count:
        raise ConadvError(
            f"global_batch_size {config.global_batch_size} is not micro_batch_size {micro} x "
            f"accumulation x {ranks} rank(s). Choose a micro-batch that divides "
            f"{config.global_batch_size // ranks}."
        )
    return count


def scaled_lr(optim: OptimConfig, global_batch_size: int) -> float:
    """The peak learning rate after the scaling rule (Goyal et al. 2017 linear; Krizhevsky 2014
    square root).
    """
    if optim.lr_scaling == "none":
        return optim.lr
    assert optim.lr_reference_batch is not None
    ratio = global_batch_size / optim.lr_reference_batch
    return optim.lr * (ratio if optim.lr_scaling == "linear" else math.sqrt(ratio))


def optimizer_settings(optim: OptimConfig) -> dict[str, Any]:
    """The settings of a resolved config that conadv.optim.make.build_optimizer takes."""
    return {name: getattr(optim, name) for name in OPTIMIZERS[optim.name].defaults}


@dataclass(frozen=True)
class Derived:
    """What follows from a resolved config, the number of training images and the number of
    learners.

    Sizes are images, durations steps. ``accumulation``: micro-batches per learner and step.
    ``*_every``: None for never. ``view_weights``: the weight of each view's loss. ``lr``: the peak,
    after scaling.
    """

    micro_batch_size: int
    accumulation: int
    steps_per_epoch: int
    steps: int
    warmup_steps: int
    lr: float
    view_weights: Mapping[str, float]
    evaluate_every: int | None
    checkpoint_every: int | None
    probe_every: int | None

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch

    def due(self, every: int | None, step: int) -> bool:
        """Whether ``step`` updates complete a whole number of periods."""
        return every is not None and step % every == 0


def derive(config: Config, train_images: int, learners: int = 1) -> Derived:
    """The numbers of a run. Raises ConadvError for durations that are too short for what is asked
    of them.
    """
    per_epoch = train_images // config.global_batch_size
    if per_epoch < 1:
        raise ConadvError(
            f"global_batch_size {config.global_batch_size} is larger than the training set of "
            f"{train_images} images. Choose a smaller batch."
        )
    steps = config.steps or round((config.epochs or 0) * per_epoch)
    if steps < 1:
        raise ConadvError(
            f"epochs = {config.epochs} is less than one step of {per_epoch} per epoch."
        )
    if config.staleness is not None and config.staleness >= steps:
        raise ConadvError(
            f"staleness {config.staleness} has no effect in {steps} steps: no batch is attacked so "
            "far ahead. Train longer, or choose a smaller staleness."
        )

    def period(epochs: float | None) -> int | None:
        return None if epochs is None else max(1, round(epochs * per_epoch))

    probe_every = period(config.probe.every_epochs)
    if probe_every is not None:
        _check_probe_fits(config.probe, probe_every, steps)
    return Derived(
        micro_batch_size=micro_batch(config),
        accumulation=accumulation(config, learners),
        steps_per_epoch=per_epoch,
        steps=steps,
        warmup_steps=round(config.schedule.warmup_epochs * per_epoch),
        lr=scaled_lr(config.optim, config.global_batch_size),
        view_weights={"aug": config.aug_weight or 1.0, "adv": config.adv_weight or 1.0},
        evaluate_every=period(config.eval.every_epochs),
        checkpoint_every=period(config.checkpoint.every_epochs),
        probe_every=probe_every,
    )


def _check_probe_fits(probe: ProbeConfig, every: int, steps: int) -> None:
    last = (steps - 1) // every * every
    if max(probe.staleness) > last:
        raise ConadvError(
            f"probe.staleness {max(probe.staleness)} has no effect: of {steps} steps, probed every "
            f"{every}, the last one measured is step {last}. Probe more often, train longer, or "
            "leave it out."
        )


# ---- rules between settings


def without_effect(name: str, owner: str, value: object) -> ConadvError:
    return ConadvError(
        f"{name} has no effect with {owner} {value!r}. Leave it out, or choose another {owner}."
    )


_NEEDS: tuple[tuple[str, str, Callable[[Config], object]], ...] = (
    *(
        (f"probe.{name}", "probe.every_epochs", lambda c: c.probe.every_epochs is not None)
        for name in ProbeConfig.model_fields
    ),
    ("aug_weight", "data.aug_view", lambda c: c.data.aug_view),
    (
        "data.subset_seed",
        "data.train_images or data.validation_images",
        lambda c: c.data.train_images or c.data.validation_images,
    ),
    ("optim.lr_scaling", "optim.lr_reference_batch", lambda c: c.optim.lr_reference_batch),
    ("optim.lr_reference_batch", "optim.lr_scaling", lambda c: c.optim.lr_scaling != "none"),
    # never chosen by the test set
    ("checkpoint.keep_best", "data.validation_images", lambda c: c.data.validation_images),
    ("checkpoint.keep_best", "eval.every_epochs", lambda c: c.eval.every_epochs),
    ("nonfinite_limit", "on_nonfinite skip", lambda c: c.on_nonfinite == "skip"),
)
"""A setting, what it needs to have an effect, and whether a config has that."""


def _check_needs(config: Config) -> None:
    for name, needed, has in _NEEDS:
        if changed(config, name) and not has(config):
            raise ConadvError(f"{name} has no effect without {needed}. Give it as well.")


def _check_duration(config: Config) -> None:
    if (config.epochs is None) == (config.steps is None):
        raise ConadvError("Give the duration once: epochs or steps, not both and not neither.")


def _check_method(config: Config) -> None:
    row = METHODS[config.method]
    known = {*row.settings, *(f"attack.{name}" for name in row.attack)}
    for name in (*METHOD_SETTINGS, *EXTRA_VIEW_SETTINGS):
        if name not in known and changed(config, name):
            raise without_effect(name, "method", config.method)
    if config.attack.route == "clean" and config.adv_route == "clean":
        raise ConadvError(
            "attack.route clean has no effect with adv_route clean: the attack goes there anyway."
        )


def _check_micro_batch(config: Config) -> None:
    auto = config.micro_batch_size == "auto"
    micro = config.global_batch_size if auto else micro_batch(config)
    share, data = config.attack.share, config.data
    images = share * micro
    if not round(images):
        raise ConadvError(
            f"attack.share {share:g} of {micro} images rounds to zero images; increase either."
        )
    if micro == 1 and (data.mixup or data.cutmix):
        raise ConadvError(
            "data.mixup and data.cutmix mix images of one micro-batch: micro_batch_size 1 has only "
            "one."
        )
    if config.mix != "replace" or "share" not in METHODS[config.method].attack:
        return
    if share == 1 and config.adv_route != "clean":
        raise ConadvError(
            "attack.share 1 with mix replace leaves no clean image to train the clean route of "
            "batch norm. Take a smaller share, such as 0.5, or adv_route clean."
        )
    if abs(images - round(images)) > 1e-6:
        raise ConadvError(
            f"attack.share {share:g} of a micro-batch of {micro} images is not a whole number: "
            "with mix replace a step has to have as many images as its batch. Change one of them."
        )


def _check_loss(config: Config) -> None:
    if config.loss == "cross-entropy":
        return
    for given, option in (
        (config.class_weights, "class_weights"),
        (config.attack.targeted, "attack.targeted"),
    ):
        if given:
            raise ConadvError(f"{option} needs loss cross-entropy, not {config.loss}.")


def _check_eps(config: Config) -> None:
    if config.attack.norm != "linf":
        return
    attack, robust = config.attack, config.eval.robust_eps
    sizes = {"attack.eps": attack.eps, "attack.step_size": attack.step_size}
    for name, eps in {**sizes, "eval.robust_eps": robust}.items():
        if eps is not None and eps >= 1:
            raise ConadvError(
                f"{name} = {eps:g} is the whole pixel range or more: eps is in [0, 1] pixel units. "
                f"Did you mean {eps:g}/255?"
            )


def _check_optimizer(config: Config) -> None:
    optim = config.optim
    for name in OPTIM_SETTINGS:
        if getattr(optim, name) is not None and name not in OPTIMIZERS[optim.name].defaults:
            raise without_effect(f"optim.{name}", "optimizer", optim.name)
    if scaled_lr(optim, config.global_batch_size) > LARGEST_LR:
        raise ConadvError(f"optim.lr {optim.lr:g} exceeds {LARGEST_LR:g} after optim.lr_scaling.")
    if optim.nesterov and optim.momentum == 0:
        raise ConadvError("optim.nesterov needs optim.momentum above 0.")


_CHECKS = (
    _check_needs,
    _check_duration,
    _check_method,
    _check_micro_batch,
    _check_loss,
    _check_eps,
    _check_optimizer,
)

# ---- defaults that belong to a choice


def _with_method_defaults(config: Config) -> Config:
    defaults = dict(METHODS[config.method].settings)
    if config.data.aug_view is not None:
        defaults["aug_weight"] = 1.0
    unset = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    resolved: Config = replace(config, **unset)
    return resolved


def _with_attack_defaults(config: Config) -> Config:
    attack = config.attack
    changes: dict[str, Any] = {}
    if attack.step_size is None and attack.eps > 0:
        spread = 2.5 * attack.eps / attack.num_steps
        changes["attack__step_size"] = spread if attack.num_steps > 1 else attack.eps
    if attack.name is None:
        one_step = attack.num_steps == 1 and not attack.random_start
        plain = one_step and attack.step_size in (None, attack.eps)
        changes["attack__name"] = "fgsm" if plain else "pgd"
    if config.eval.robust_eps is None:
        changes["eval__robust_eps"] = attack.eps
    resolved: Config = replace(config, **changes)
    return resolved
