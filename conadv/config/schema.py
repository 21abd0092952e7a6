"""The configuration of a run: one owner per value, resolved and checked before anything is loaded.

``None`` means "the default that belongs to the choice beside it"; :func:`resolve` fills it in, so that a saved
``config.yaml`` has no ``None`` left that a newer version could read differently. Nothing here imports torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from tyro.constructors import PrimitiveConstructorSpec

from conadv.data import AUGMENTATIONS, SOURCES
from conadv.errors import ConadvError, printable, unknown
from conadv.methods import METHODS
from conadv.optim import OPTIMIZERS
from conadv.safe_io import read_yaml

if TYPE_CHECKING:
    MethodName = str
    SourceName = str
    AugmentName = str
else:
    MethodName = Literal[tuple(METHODS)]
    SourceName = Literal[tuple(SOURCES)]
    AugmentName = Literal[AUGMENTATIONS]
OptimizerName = Literal["lars", "lamb", "sgd", "adamw"]
PredictorName = Literal["momentum", "last-update"]
"""How look-ahead predicts weights, see conadv.engine.lookahead."""


def home(path: Path) -> Path:
    """``path`` with a leading ``~`` or ``~name`` as that user's folder. ConadvError where there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConadvError(
            f"{printable(path)[:200]}: {error}. Write the folder out, or ./~name for one here."
        ) from error


def parse_fraction(value: object) -> object:
    """``"4/255"`` -> 0.0157; anything else is left to the field's own check."""
    return read_fraction(value) if isinstance(value, str) else value


def read_fraction(text: str) -> float:
    """The value of a number or of a fraction of two, such as "0.5/255". Raises ValueError."""
    try:
        if len(text) > 60 or re.search(
            r"e[+-]?\d{4}", text, re.IGNORECASE
        ):  # 1e999999999 would be written out first
            raise ValueError
        above, slash, below = text.replace(" ", "").partition("/")
        if slash and "e" in text.lower():
            raise ValueError
        return float(Fraction(above) / Fraction(below) if slash else Fraction(above))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"{text[:60]!r} is not a number or a fraction such as 4/255") from error


_FRACTION = PrimitiveConstructorSpec(
    nargs=1,
    metavar="FLOAT|A/B",
    instance_from_str=lambda args: parse_fraction(args[0]),
    is_instance=lambda value: isinstance(value, (int, float)),
    str_from_instance=lambda value: [f"{value:.6g}"],
)
FractionFloat = Annotated[float, BeforeValidator(parse_fraction), _FRACTION]


LONGEST = 1e9
"""Epochs: more could not be counted in steps."""
LARGEST, LARGEST_LR = 1e6, 1e30
"""Beyond them, and beyond the product of the two, numbers of float32 overflow."""
MOST = 10**9
"""Of anything that is counted: the product of two counts still fits into the 64 bits of a tensor's sizes."""
WIDEST = 2**16
"""Channels: the largest convolution of the small-image networks still has a size in 64 bits."""
LARGEST_SEED = 2**63 - 1
MOST_ARGS, LONGEST_ARG = 100, 1000
Count = Annotated[int, Field(le=MOST)]
"""A whole number of images, steps or epochs; the field beside it says from where on."""


def _off_or_drawn(value: float) -> float:
    if 0 < value < SMALLEST_ALPHA:
        raise ValueError(f"{value:g} is neither 0 (off) nor {SMALLEST_ALPHA:g} or more")
    return value


SMALLEST_ALPHA = 1e-3
"""Of a Beta distribution; in float32 the draws of smaller ones are not numbers."""
Alpha = Annotated[float, AfterValidator(_off_or_drawn)]


class Section(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where the images come from and what happens to them before the model."""

    source: SourceName = "digits"
    dir: Annotated[Path | None, tyro.conf.arg(aliases=["--data"])] = None
    """Image folder DIR/{train,test}/<class>/*; parquet files of huggingface; for a download, where it is kept."""
    download: Annotated[bool, tyro.conf.arg(aliases=["--download"])] = False
    """Let torchvision download the data set into dir."""
    image_size: int | None = Field(None, ge=4, le=1024)
    """Height and width in pixels that the model sees; None keeps the size of in-memory images."""
    train_images: Count | None = Field(None, ge=2)
    """Train on this many images, the same share of every class, chosen by subset_seed; None takes all."""
    validation_images: Count | None = Field(None, ge=1)
    """Hold so many of these out of training, the same share of every class, to choose settings by; None holds none."""
    subset_seed: int | None = Field(0, ge=0, le=LARGEST_SEED)
    """Chooses train_images and validation_images. None takes the run's seed: every seed then has images of its own."""
    augment: Annotated[AugmentName, tyro.conf.arg(aliases=["--augment"])] = "none"
    """Augmentation of the clean view."""
    aug_view: Annotated[AugmentName | None, tyro.conf.arg(aliases=["--aug-view"])] = None
    """Augmentation of a third view with its own route; None has no third view."""
    mixup: Annotated[Alpha, tyro.conf.arg(aliases=["--mixup"])] = Field(0.0, ge=0, le=LARGEST)
    """Mix every training image with another of its micro-batch, by a share from Beta(mixup, mixup); 0 does not."""
    cutmix: Annotated[Alpha, tyro.conf.arg(aliases=["--cutmix"])] = Field(0.0, ge=0, le=LARGEST)
    """Paste a box of another image, of a share from Beta(cutmix, cutmix); with mixup each micro-batch draws which."""
    on_bad_image: Annotated[Literal["error", "skip"], tyro.conf.arg(aliases=["--on-bad-image"])] = (
        "error"
    )
    """An image file that cannot be read stops the run, or another image of its class takes its place (listed)."""
    num_workers: int = Field(0, ge=0, le=256)
    """Loader processes; 0 loads in the training process (best for images held in memory)."""
    mean: tuple[float, ...] = (0.5,)
    """Mean of each channel in [0, 1] pixels; one value serves all channels."""
    std: tuple[float, ...] = (0.5,)
    """Standard deviation of each channel in [0, 1] pixels."""


class ModelConfig(Section):
    """The network."""

    name: Annotated[str, tyro.conf.arg(aliases=["--model"])] = "resnet8"
    """resnet{8,14,20,32,44,56} for small images (He et al. 2016, section 4.2), any torchvision classifier,
    timm:NAME, or module:function, your own code (docs/models.md)."""
    width: int | None = Field(None, ge=1, le=WIDEST)
    """Channels of the first stage of the small-image networks (16 in the paper)."""
    args: tuple[Annotated[str, Field(max_length=LONGEST_ARG)], ...] = Field(
        (), max_length=MOST_ARGS
    )
    """More arguments of the network's constructor as NAME=VALUE, such as drop_rate=0.1 img_size=64."""


class OptimConfig(Section):
    """The optimizer. None takes the default of the optimizer named, see conadv.optim.OPTIMIZERS."""

    name: Annotated[OptimizerName, tyro.conf.arg(aliases=["--optimizer"])] = "lars"
    lr: Annotated[float, tyro.conf.arg(aliases=["--lr"])] = Field(1.0, gt=0, le=LARGEST_LR)
    """Peak learning rate (before lr_scaling)."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiply lr by (global_batch_size / lr_reference_batch) or its square root."""
    lr_reference_batch: Count | None = Field(None, ge=1)
    """The global batch that lr was chosen for; needed by lr_scaling."""
    momentum: float | None = Field(None, ge=0, lt=1)
    nesterov: bool | None = None
    weight_decay: float | None = Field(None, ge=0, le=LARGEST)
    variant: Literal["tf", "timm", "nus", "larc", "no-wd-ratio"] | None = None
    """Which LARS formula, see conadv.optim.lars.LARS."""
    trust_coefficient: float | None = Field(None, gt=0, le=LARGEST)
    """eta of LARS."""
    betas: tuple[float, float] | None = None
    eps: float | None = Field(None, ge=0, le=LARGEST)
    """Added to LARS's denominator, or to LAMB's and AdamW's root."""
    clip_norm: float | None = Field(None, gt=0, le=LARGEST_LR)
    """Scale the whole gradient down to this Euclidean norm before the update; None does not clip."""


class ScheduleConfig(Section):
    """Learning rate over steps: linear warm-up, then decay to end_lr."""

    warmup_epochs: float = Field(0.0, ge=0, le=LONGEST)
    decay: Literal["polynomial", "cosine", "constant"] = "polynomial"
    power: float = Field(2.0, gt=0, le=LARGEST)
    """Exponent of the polynomial decay."""
    end_lr: float = Field(0.0, ge=0, le=LARGEST_LR)


class AttackConfig(Section):
    """Adversarial images for training (eps is also the magnitude of the noise control)."""

    eps: Annotated[FractionFloat, tyro.conf.arg(aliases=["--eps"])] = Field(
        4 / 255, ge=0, le=LARGEST
    )
    """Size of the perturbation in [0, 1] pixel units, such as 4/255."""
    norm: Literal["linf", "l2"] = "linf"
    num_steps: Count = Field(1, ge=1)
    """Gradient steps: 1 is FGSM, more is PGD."""
    step_size: FractionFloat | None = Field(None, gt=0, le=LARGEST)
    """In pixel units; None is eps for one step and 2.5 eps / num_steps for more."""
    targeted: bool = False
    """Towards a random other class instead of away from the true one."""
    random_start: float = Field(0.0, ge=0, le=1)
    """Probability that an image starts from a random point of the eps ball."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of every micro-batch that gets an adversarial copy; its view weighs as much less."""
    route: Literal["adv", "clean"] = "adv"
    """Batch-norm route of the attack's gradient."""
    statistics: Literal["batch", "running"] = "batch"
    """What batch norm normalises by in the attack."""


class EvalConfig(Section):
    """Evaluation: clean route, running statistics, no augmentation."""

    every_epochs: float | None = Field(None, gt=0, le=LONGEST)
    """Evaluate on the test set this often; None only at the end."""
    batch_size: Count = Field(500, ge=1)
    """Images per forward pass."""
    robust_eps: FractionFloat | None = Field(None, ge=0, le=LARGEST)
    """eps of the PGD attack behind robust_accuracy; None is attack.eps."""
    robust_steps: Count = Field(10, ge=1)
    robust_images: Count = Field(1000, ge=0)
    """How many test images robust_accuracy uses; 0 leaves it out."""
    train_images: Count = Field(5000, ge=1)
    """How many training images train_loss and train_accuracy use at most."""
    precise_bn_images: Annotated[Count | None, tyro.conf.arg(aliases=["--precise-bn"])] = Field(
        None, ge=2
    )
    """After the last step compute batch norm's running statistics anew over so many training images."""


class EmaConfig(Section):
    """An exponential moving average of the weights, which is then what is evaluated and exported."""

    decay: float | None = Field(None, gt=0, lt=1)
    """Share of the old average in the new one, such as 0.999; smaller in the first steps. None keeps no average."""


class CheckpointConfig(Section):
    """Checkpoints for --resume."""

    every_epochs: float | None = Field(None, gt=0, le=LONGEST)
    """Save this often; None only at the end."""
    keep: Count = Field(2, ge=1)
    """How many of the newest checkpoints stay."""
    keep_best: bool = False
    """Also keep the checkpoint with the best accuracy on data.validation_images, measured every eval.every_epochs."""
    background: bool = False
    """Write while training goes on, from a copy of the state in the CPU's memory."""


class ProbeConfig(Section):
    """The staleness probe: what stale and predicted weights are worth to the attack (docs/staleness.md)."""

    every_epochs: float | None = Field(None, gt=0, le=LONGEST)
    """Measure this often; None never."""
    staleness: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field((1, 2, 4, 8), min_length=1)
    """The values of tau that are measured."""
    images: Count = Field(256, ge=1)
    """How many training images are used, always the same ones."""
    predictors: tuple[PredictorName, ...] = ("momentum", "last-update")
    """The look-ahead predictors that are measured beside stale weights."""


class Config(Section):
    """Everything that decides what a run computes."""

    recipe: tyro.conf.Suppress[str] = "custom"
    method: MethodName = "vanilla"
    """vanilla | sam | multiview, noise (controls) | disadv (sequential attack) | conadv (concurrent) | recycle."""
    staleness: int | None = Field(None, ge=0, le=1024)
    """tau: the adversarial batch of step t is made at the weights of step t - tau (conadv only; default 1)."""
    lookahead: bool = False
    """Attack at predicted weights instead of stale ones (conadv only)."""
    pending_dtype: Literal["float32", "float16", "bfloat16", "uint8"] | None = None
    """How adversarial images wait between steps (conadv and recycle; default float32)."""
    adv_weight: float | None = Field(None, gt=0, le=LARGEST)
    """Weight of the extra view's loss beside the clean view's 1 (default 1; the mean is taken)."""
    adv_route: Literal["own", "statistics", "clean"] = "own"
    """Batch norm of the extra view: all its own, statistics of its own alone, or the clean route."""
    sam_rho: float | None = Field(None, gt=0, le=LARGEST)
    """How far uphill SAM takes its gradient, a length in weight space (sam only; default 0.05)."""
    aug_weight: float | None = Field(None, gt=0, le=LARGEST)
    """Weight of the aug view's loss (default 1)."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    global_batch_size: Count = Field(128, ge=1)
    """Clean images per update, over all micro-batches and ranks."""
    micro_batch_size: Annotated[Count, Field(ge=1)] | Literal["auto"] | None = None
    """Clean images per forward pass: what batch norm sees in each route. None is the global batch; auto the largest
    that fits on this device, by trial, which config.yaml then names."""
    epochs: float | None = Field(None, gt=0, le=LONGEST)
    """Passes over the training set (give epochs or steps)."""
    steps: Count | None = Field(None, ge=1)
    """Updates (give epochs or steps)."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 are autocast's; fp16 scales the loss and leaves out a step whose gradient overflows."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is infinite or NaN: end the run before the update, or leave the update out."""
    nonfinite_limit: Count = Field(10, ge=1)
    """With skip: so many steps in a row without an update end the run."""
    channels_last: bool = False
    """Memory format of images and convolutions."""
    compile: bool = False
    """Compile the network by torch.compile, one graph per route; evaluation runs without."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    attack: AttackConfig = AttackConfig()
    eval: EvalConfig = EvalConfig()
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    probe: ProbeConfig = ProbeConfig()


def replace(section: Any, **changes: Any) -> Any:
    """A checked copy with the given fields changed; a dotted path is written with double underscores."""
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        head, _, rest = key.partition("__")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            flat[head] = value
    flat |= {head: replace(getattr(section, head), **fields) for head, fields in nested.items()}
    return type(section).model_validate(
        {**{k: getattr(section, k) for k in type(section).model_fields}, **flat}
    )


def resolve(config: Config) -> Config:
    """Fill in every default and check every rule that needs no data. Raises ConadvError; idempotent."""
    _check_duration(config)
    _check_method(config)
    _check_eps(config)
    _check_probe(config.probe)
    _check_optimizer(config.optim, config.global_batch_size)
    _check_subset(config.data)
    _check_keep_best(config)
    _check_nonfinite(config)
    config = replace(config, **_method_defaults(config))
    config = replace(config, optim=_optimizer_defaults(config.optim))
    config = _attack_defaults(config)
    if config.micro_batch_size is None:
        config = replace(config, micro_batch_size=config.global_batch_size)
    if config.micro_batch_size == 1 and (config.data.mixup or config.data.cutmix):
        raise ConadvError(
            "data.mixup and data.cutmix mix images of one micro-batch: micro_batch_size 1 has no other."
        )
    if config.micro_batch_size != "auto":
        accumulation(config)
    return config


def micro_batch(config: Config) -> int:
    """Clean images per forward pass. ConadvError where "auto" has not been settled yet: that needs the device."""
    if config.micro_batch_size == "auto":
        raise ConadvError(
            "micro_batch_size auto is settled on the device before a run. `conadv train` does it; elsewhere "
            "call conadv.planning.micro_batch.settle(config, comm), or give a number."
        )
    return config.micro_batch_size or config.global_batch_size


def accumulation(config: Config, ranks: int = 1) -> int:
    """Micro-batches per rank and step: global batch = micro batch x accumulation x ranks, or ConadvError."""
    micro = micro_batch(config)
    if config.global_batch_size % ranks:
        raise ConadvError(
            f"global_batch_size {config.global_batch_size} does not divide into {ranks} rank(s)."
        )
    count, rest = divmod(config.global_batch_size, micro * ranks)
    if rest or not count:
        raise ConadvError(
            f"global_batch_size {config.global_batch_size} is not micro_batch_size {micro} x accumulation x {ranks} "
            f"rank(s). Choose a micro-batch that divides {config.global_batch_size // ranks}."
        )
    return count


def scaled_lr(optim: OptimConfig, global_batch_size: int) -> float:
    """The peak learning rate after the scaling rule (Goyal et al. 2017 linear; Krizhevsky 2014 square root)."""
    if optim.lr_scaling == "none":
        return optim.lr
    assert optim.lr_reference_batch is not None
    ratio = global_batch_size / optim.lr_reference_batch
    return optim.lr * (ratio if optim.lr_scaling == "linear" else math.sqrt(ratio))


def _check_duration(config: Config) -> None:
    if (config.epochs is None) == (config.steps is None):
        raise ConadvError("Give the duration once: epochs or steps, not both and not neither.")


def _without_effect(name: str, owner: str, value: object) -> ConadvError:
    return ConadvError(
        f"{name} has no effect with {owner} {value!r}. Leave it out, or choose another {owner}."
    )


_METHOD_FIELDS = (  # unset: the default
    *("staleness", "lookahead", "pending_dtype", "adv_weight", "adv_route"),
    "sam_rho",
)


def _check_method(config: Config) -> None:
    for name in _METHOD_FIELDS:
        if (
            getattr(config, name) != Config.model_fields[name].default
            and name not in METHODS[config.method].settings
        ):
            raise _without_effect(name, "method", config.method)
    if config.data.aug_view is None and config.aug_weight is not None:
        raise ConadvError(
            "aug_weight has no effect without a third view. Give data.aug_view as well."
        )
    if config.lookahead and config.staleness == 0:
        raise ConadvError(
            "lookahead has no effect with staleness 0: the weights are current. Use staleness 1 or more."
        )
    attack = config.attack
    _check_attack_plan(config)
    plain = attack.num_steps == 1 and not attack.targeted and not attack.random_start
    if config.method == "recycle" and not (plain and attack.step_size in (None, attack.eps)):
        raise ConadvError(
            "recycle reuses one gradient that is computed anyway: attack.num_steps must be 1, attack.step_size eps, "
            "attack.targeted false and attack.random_start 0. Use method disadv or conadv for other attacks."
        )


def _check_probe(probe: ProbeConfig) -> None:
    changed = [
        name
        for name, field in ProbeConfig.model_fields.items()
        if getattr(probe, name) != field.default
    ]
    if probe.every_epochs is None and changed:
        raise ConadvError(
            f"probe.{changed[0]} has no effect without probe.every_epochs. Give it as well."
        )
    for name in ("staleness", "predictors"):
        values = getattr(probe, name)
        if len(set(values)) < len(values):
            raise ConadvError(f"probe.{name} {list(values)} names one twice.")


_PLAN_FIELDS = ("share", "route", "statistics")


def _check_attack_plan(config: Config) -> None:
    """The plan is never a recipe's own choice, so that all of it must have an effect."""
    attack = config.attack
    for name in _PLAN_FIELDS:
        changed = getattr(attack, name) != AttackConfig.model_fields[name].default
        if changed and name not in METHODS[config.method].attack:
            raise _without_effect(f"attack.{name}", "method", config.method)
    if attack.route == "clean" and config.adv_route == "clean":
        raise ConadvError(
            "attack.route clean has no effect with adv_route clean: the attack goes there anyway."
        )
    micro = config.global_batch_size if config.micro_batch_size == "auto" else micro_batch(config)
    if not round(attack.share * micro):
        raise ConadvError(
            f"attack.share {attack.share:g} of a micro-batch of {micro} rounds to zero images; increase either."
        )


def _check_eps(config: Config) -> None:
    for name, eps, norm in (
        ("attack.eps", config.attack.eps, config.attack.norm),
        ("attack.step_size", config.attack.step_size, config.attack.norm),
        ("eval.robust_eps", config.eval.robust_eps, config.attack.norm),
    ):
        if eps is not None and norm == "linf" and eps >= 1:
            raise ConadvError(
                f"{name} = {eps:g} is the whole pixel range or more: eps is in [0, 1] pixel units. "
                f"Did you mean {eps:g}/255?"
            )


_OPTIM_FIELDS = (
    "momentum",
    "nesterov",
    "weight_decay",
    "variant",
    "trust_coefficient",
    "betas",
    "eps",
)


def _check_optimizer(optim: OptimConfig, global_batch_size: int) -> None:
    for name in _OPTIM_FIELDS:
        if getattr(optim, name) is not None and name not in OPTIMIZERS[optim.name].defaults:
            raise _without_effect(f"optim.{name}", "optimizer", optim.name)
    if (optim.lr_scaling == "none") != (optim.lr_reference_batch is None):
        raise ConadvError(
            "optim.lr_scaling and optim.lr_reference_batch belong together: give both or neither."
        )
    if scaled_lr(optim, global_batch_size) > LARGEST_LR:
        raise ConadvError(
            f"optim.lr {optim.lr:g} is more than {LARGEST_LR:g} after optim.lr_scaling."
        )
    if optim.nesterov and optim.momentum == 0:
        raise ConadvError(
            "optim.nesterov needs momentum: give optim.momentum above 0, or leave nesterov out."
        )
    if optim.betas is not None and not all(0 <= beta < 1 for beta in optim.betas):
        raise ConadvError(f"optim.betas {optim.betas} must be in [0, 1).")


def _check_nonfinite(config: Config) -> None:
    if (
        config.on_nonfinite == "stop"
        and config.nonfinite_limit != Config.model_fields["nonfinite_limit"].default
    ):
        raise _without_effect("nonfinite_limit", "on_nonfinite", "stop")


def _check_subset(data: DataConfig) -> None:
    if data.subset_seed != 0 and data.train_images is None and data.validation_images is None:
        raise ConadvError(
            "data.subset_seed has no effect without data.train_images or data.validation_images. Leave it out."
        )


def _check_keep_best(config: Config) -> None:
    if not config.checkpoint.keep_best:
        return
    if config.data.validation_images is None:
        raise ConadvError(
            "checkpoint.keep_best chooses by images that are held out of training, never by the test set. "
            "Give data.validation_images."
        )
    if config.eval.every_epochs is None:
        raise ConadvError(
            "checkpoint.keep_best has nothing to choose from without eval.every_epochs. Give it."
        )


def _method_defaults(config: Config) -> dict[str, Any]:
    changes: dict[str, Any] = {
        name: value
        for name, value in METHODS[config.method].settings.items()
        if getattr(config, name) is None
    }
    if config.data.aug_view is not None:
        changes["aug_weight"] = 1.0 if config.aug_weight is None else config.aug_weight
    return changes


def _optimizer_defaults(optim: OptimConfig) -> OptimConfig:
    values = OPTIMIZERS[optim.name].complete(optim.model_dump())
    resolved: OptimConfig = replace(optim, **values)
    return resolved


def optimizer_settings(optim: OptimConfig) -> dict[str, Any]:
    """The settings of a resolved config that conadv.optim.make.build_optimizer takes."""
    return {name: getattr(optim, name) for name in OPTIMIZERS[optim.name].defaults}


def _attack_defaults(config: Config) -> Config:
    attack = config.attack
    step_size = attack.step_size
    if step_size is None and attack.eps > 0:
        step_size = attack.eps if attack.num_steps == 1 else 2.5 * attack.eps / attack.num_steps
    robust_eps = attack.eps if config.eval.robust_eps is None else config.eval.robust_eps
    resolved: Config = replace(config, attack__step_size=step_size, eval__robust_eps=robust_eps)
    return resolved


def override(base: Config, edited: Config, given: Collection[str]) -> Config:
    """What a user's options on top of ``base`` (a recipe or a saved config) mean, before :func:`resolve`.

    ``edited`` is base with the options, ``given`` the dotted names of the settings that the user gave. Those stand as
    they are, and a given setting without effect is a ConadvError. Settings of the base that belong to a choice which
    the user replaced (another method, optimizer or model, steps for epochs, eps for step_size) fall back to their
    defaults.
    """
    if "steps" in given and "epochs" not in given:
        edited = replace(edited, epochs=None)
    if "epochs" in given and "steps" not in given:
        edited = replace(edited, steps=None)
    if edited.method != base.method:
        edited = _back_to_default(edited, _METHOD_FIELDS, given)
        edited = _back_to_default(edited, [f"attack.{name}" for name in _PLAN_FIELDS], given)
    if edited.optim.name != base.optim.name:
        if "optim.lr" not in given:
            raise ConadvError(
                f"The learning rate {base.optim.lr:g} belongs to {base.optim.name}. "
                f"Give --lr for --optimizer {edited.optim.name}."
            )
        edited = _back_to_default(edited, [f"optim.{name}" for name in _OPTIM_FIELDS], given)
    if edited.model.name != base.model.name:
        edited = _back_to_default(edited, ["model.width", "model.args"], given)
    if (
        base.micro_batch_size == base.global_batch_size
    ):  # it was the global batch, not a choice of its own
        edited = _back_to_default(edited, ["micro_batch_size"], given)
    if {"attack.eps", "attack.num_steps"} & set(given):
        edited = _back_to_default(edited, ["attack.step_size"], given)
    _check_attack_has_effect(edited, given)
    return edited


def _back_to_default(edited: Config, names: Collection[str], given: Collection[str]) -> Config:
    defaults = flatten(Config().model_dump())
    changes = {name.replace(".", "__"): defaults[name] for name in names if name not in given}
    changed: Config = replace(edited, **changes)
    return changed


def _check_attack_has_effect(edited: Config, given: Collection[str]) -> None:
    used = METHODS[edited.method].attack
    if edited.probe.every_epochs is not None:
        return  # the probe attacks, whatever the method does
    for name in given:
        if name.startswith("attack.") and name.removeprefix("attack.") not in used:
            raise _without_effect(name, "method", edited.method)


def dump_yaml(config: Config) -> str:
    """The config as YAML text that :func:`load_yaml` reads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def load_yaml(path: Path) -> Config:
    """Read a saved config; an unknown key or a bad value is a ConadvError that names it."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConadvError(f"The config {printable(path)} is not a mapping of settings.")
    return parse(values, str(path))


_REMOVED = {
    "predictor": "momentum",
    "sam_every": (None, 1),
    "attack.every": 1,
    "attack.resolution": 1.0,
    "attack.eps_schedule": "constant",
    "attack.until": 1.0,
}
"""Settings of version 0.1 that are gone, with the values at which they had no effect."""


def _without_removed(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of a run of version 0.1 without those that are gone. ConadvError where one had an effect."""
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for name, harmless in _REMOVED.items():
        head, _, rest = name.rpartition(".")
        section = values.get(head) if head else values
        if isinstance(section, dict) and rest in section:
            value = section.pop(rest)
            if value not in (harmless if isinstance(harmless, tuple) else (harmless,)):
                raise ConadvError(
                    f"{where}: {name} = {printable(value)[:80]} is no longer there. Version 0.1 has it."
                )
    probe = values.get("probe")
    if isinstance(probe, dict) and probe.get("every_epochs", 0) is None:
        probe.pop("predictors", None)  # without effect, and 0.1's default names one that is gone
    return values


def parse(values: dict[str, Any], where: str) -> Config:
    """A Config from plain values, with errors that a user can act on."""
    values = _without_removed(values, where)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise explain(error, where) from error


def explain(error: ValidationError, where: str) -> ConadvError:
    """The first of pydantic's errors as one line, with the nearest name for an unknown key."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        names = list(flatten(Config().model_dump()))
        return ConadvError(f"{where}: {unknown('setting', path, names)}")
    given = repr(first.get("input"))
    given = given if len(given) <= 80 else f"{given[:80]}..."
    return ConadvError(f"{where}: {printable(path)[:200]} = {given}: {first['msg'][:500]}.")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dictionary with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def differences(a: Config, b: Config) -> list[str]:
    """``name: a -> b`` for every setting that differs."""
    left, right = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    return [f"{name}: {left[name]} -> {right[name]}" for name in left if left[name] != right[name]]
