"""The settings of a run: one owner per value. Nothing here imports torch.

``None`` means "the default that belongs to the choice beside it".
:func:`conadv.config.resolve.resolve` fills it in, so that a saved ``config.yaml`` leaves nothing
for a newer version to read differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from conadv.attacks import ATTACKS
from conadv.config.fractions import FractionFloat
from conadv.data import AUGMENTATIONS, SOURCES
from conadv.methods import METHODS
from conadv.optim import OPTIMIZERS

if TYPE_CHECKING:  # the tables say which names there are; a type checker sees text
    AttackName = str
    AugmentName = str
    MethodName = str
    OptimizerName = str
    SourceName = str
else:
    AttackName, MethodName = Literal[tuple(ATTACKS)], Literal[tuple(METHODS)]
    OptimizerName, SourceName = Literal[tuple(OPTIMIZERS)], Literal[tuple(SOURCES)]
    AugmentName = Literal[AUGMENTATIONS]

# Bounds, so that a typo or a hostile file ends in a message and not in an overflow or in all of the
# memory.
LONGEST = 1e9  # epochs: more cannot be counted in steps
LARGEST, LARGEST_LR = 1e6, 1e30  # float32 holds numbers up to their product
MOST = 10**9  # the product of two counts fits into the 64 bits of a tensor's sizes
WIDEST = 2**16  # channels: the small networks' largest convolution still has a size in 64 bits
LARGEST_SEED = 2**63 - 1
SMALLEST_ALPHA = 1e-3  # below it float32 draws from a Beta distribution are not numbers
Count = Annotated[int, Field(le=MOST)]
_Beta = Annotated[float, Field(ge=0, lt=1)]


def _off_or_drawn(value: float) -> float:
    if 0 < value < SMALLEST_ALPHA:
        raise ValueError(f"{value:g} is neither 0 (off) nor {SMALLEST_ALPHA:g} or more")
    return value


Alpha = Annotated[float, AfterValidator(_off_or_drawn)]


def alias(name: str) -> Any:
    """A short name of an option, beside its dotted one."""
    return tyro.conf.arg(aliases=[name])


class Section(BaseModel):
    """Frozen, and an unknown key is an error. Docstrings of fields are their descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(Section):
    """Where the images come from and what happens to them before the model."""

    source: SourceName = "digits"
    dir: Annotated[Path | None, alias("--data")] = None
    """Image folder DIR/{train,test}/<class>/*; parquet files of huggingface; for a download, where
    it is kept."""
    download: Annotated[bool, alias("--download")] = False
    """Let torchvision download the data set into dir."""
    image_size: int | None = Field(None, ge=4, le=1024)
    """Height and width in pixels that the model sees; None keeps the size of in-memory images."""
    train_images: Count | None = Field(None, ge=2)
    """Train on this many images, the same share of every class, chosen by subset_seed; None takes
    all."""
    validation_images: Count | None = Field(None, ge=1)
    """Hold so many of these out of training, the same share of every class, to choose settings by;
    None holds none."""
    subset_seed: int | None = Field(0, ge=0, le=LARGEST_SEED)
    """Chooses train_images and validation_images. None takes the run's seed: every seed then has
    images of its own."""
    augment: Annotated[AugmentName, alias("--augment")] = "none"
    """Augmentation of the clean view."""
    aug_view: Annotated[AugmentName | None, alias("--aug-view")] = None
    """Augmentation of a third view with its own route; None has no third view."""
    mixup: Annotated[Alpha, alias("--mixup")] = Field(0.0, ge=0, le=LARGEST)
    """Mix every training image with another of its micro-batch, by a share from Beta(mixup, mixup);
    0 does not."""
    cutmix: Annotated[Alpha, alias("--cutmix")] = Field(0.0, ge=0, le=LARGEST)
    """Paste a box of another image, of a share from Beta(cutmix, cutmix); with mixup each
    micro-batch draws which."""
    changed: Literal["error", "accept"] = "error"
    """With --resume: what happens where the data are no longer those of the checkpoint; the record
    lists what changed."""
    on_bad_image: Annotated[Literal["error", "skip"], alias("--on-bad-image")] = "error"
    """An image file that cannot be read stops the run, or another image of its class takes its
    place (listed)."""
    num_workers: int = Field(0, ge=0, le=256)
    """Loader processes; 0 loads in the training process (best for images held in memory)."""
    mean: tuple[float, ...] = (0.5,)
    """Mean of each channel in [0, 1] pixels; one value serves all channels."""
    std: tuple[float, ...] = (0.5,)
    """Standard deviation of each channel in [0, 1] pixels."""


class ModelConfig(Section):
    """The network."""

    name: Annotated[str, alias("--model")] = "resnet8"
    """resnet{8,14,20,32,44,56} for small images (He et al. 2016, section 4.2), any torchvision
    classifier, timm:NAME, or module:function, your own code (docs/models.md)."""
    width: int | None = Field(None, ge=1, le=WIDEST)
    """Channels of the first stage of the small-image networks (16 in the paper)."""
    args: tuple[Annotated[str, Field(max_length=1000)], ...] = Field((), max_length=100)
    """More arguments of the network's constructor as NAME=VALUE, such as drop_rate=0.1 img_size=64.
    """


class OptimConfig(Section):
    """The optimizer. None takes the default of the optimizer named (conadv.optim.OPTIMIZERS)."""

    name: Annotated[OptimizerName, alias("--optimizer")] = "lars"
    lr: Annotated[float, alias("--lr")] = Field(1.0, gt=0, le=LARGEST_LR)
    """Peak learning rate (before lr_scaling)."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """Multiply lr by (global_batch_size / lr_reference_batch) or its square root."""
    lr_reference_batch: Count | None = Field(None, ge=1)
    """The global batch that lr was chosen for; needed by lr_scaling."""
    momentum: float | None = Field(None, ge=0, lt=1)
    nesterov: bool | None = None
    weight_decay: float | None = Field(None, ge=0, le=LARGEST)
    variant: Literal["tf", "timm", "nus", "larc", "no-wd-ratio"] | None = None
    """Which LARS formula, see conadv.LARS."""
    trust_coefficient: float | None = Field(None, gt=0, le=LARGEST)
    """eta of LARS."""
    betas: tuple[_Beta, _Beta] | None = None
    eps: float | None = Field(None, ge=0, le=LARGEST)
    """Added to LARS's denominator, or to LAMB's and AdamW's root."""
    clip_norm: float | None = Field(None, gt=0, le=LARGEST_LR)
    """Scale the whole gradient down to this Euclidean norm before the update; None does not clip.
    """


class ScheduleConfig(Section):
    """Learning rate over steps: linear warm-up, then decay to end_lr."""

    warmup_epochs: float = Field(0.0, ge=0, le=LONGEST)
    decay: Literal["polynomial", "cosine", "constant"] = "polynomial"
    power: float = Field(2.0, gt=0, le=LARGEST)
    """Exponent of the polynomial decay."""
    end_lr: float = Field(0.0, ge=0, le=LARGEST_LR)


class AttackConfig(Section):
    """Adversarial images for training (eps is also the magnitude of the noise control)."""

    name: AttackName | None = None
    """The attack; None is fgsm for one plain step and pgd otherwise."""
    eps: Annotated[FractionFloat, alias("--eps")] = Field(4 / 255, ge=0, le=LARGEST)
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
    """Share of every micro-batch that gets an adversarial copy, or with mix replace becomes one."""
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
    precise_bn_images: Annotated[Count | None, alias("--precise-bn")] = Field(None, ge=2)
    """After the last step compute batch norm's running statistics anew over so many training
    images."""


class EmaConfig(Section):
    """An exponential moving average of the weights, which is then evaluated and exported."""

    decay: float | None = Field(None, gt=0, lt=1)
    """Share of the old average in the new one, such as 0.999; smaller in the first steps. None
    keeps no average."""


class CheckpointConfig(Section):
    """Checkpoints for --resume."""

    every_epochs: float | None = Field(None, gt=0, le=LONGEST)
    """Save this often; None only at the end."""
    keep: Count = Field(2, ge=1)
    """How many of the newest checkpoints stay."""
    keep_best: bool = False
    """Also keep the checkpoint with the best accuracy on data.validation_images, measured every
    eval.every_epochs."""
    background: bool = False
    """Write while training goes on, from a copy of the state in the CPU's memory."""


class ProbeConfig(Section):
    """The staleness probe: what stale and predicted weights are worth to the attack
    (docs/staleness.md).
    """

    every_epochs: float | None = Field(None, gt=0, le=LONGEST)
    """Measure this often; None never."""
    staleness: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field((1, 2, 4, 8), min_length=1)
    """The values of tau that are measured."""
    images: Count = Field(256, ge=1)
    """How many training images are used, always the same ones."""


class Config(Section):
    """Everything that decides what a run computes."""

    recipe: tyro.conf.Suppress[str] = "custom"
    method: MethodName = "vanilla"
    """vanilla | sam | multiview, noise (controls) | disadv (sequential attack) | conadv
    (concurrent) | recycle."""
    staleness: int | None = Field(None, ge=0, le=1024)
    """tau: the adversarial batch of step t is made at the weights of step t - tau (conadv only;
    default 1)."""
    lookahead: bool = False
    """Attack at predicted weights instead of stale ones (conadv only)."""
    pending_dtype: Literal["float32", "float16", "bfloat16", "uint8"] | None = None
    """How adversarial images wait between steps (conadv and recycle; default float32)."""
    mix: Literal["add", "replace"] | None = None
    """Extra images beside the clean ones, as published (add, the default), or in the place of
    attack.share of them (replace): a step then has no more gradients than plain training."""
    adv_weight: float | None = Field(None, gt=0, le=LARGEST)
    """Weight of the extra view's loss beside the clean view's 1 (default 1; the mean is taken)."""
    adv_route: Literal["own", "statistics", "clean"] = "own"
    """Batch norm of the extra view: all its own, statistics of its own alone, or the clean route.
    """
    sam_rho: float | None = Field(None, gt=0, le=LARGEST)
    """How far uphill SAM takes its gradient, a length in weight space (sam only; default 0.05)."""
    aug_weight: float | None = Field(None, gt=0, le=LARGEST)
    """Weight of the aug view's loss (default 1)."""
    loss: Literal["cross-entropy", "bce", "mse"] = "cross-entropy"
    """What is trained, and what attacks ascend. bce and mse compare every logit with 0 or 1;
    evaluations report cross-entropy all the same."""
    class_weights: Literal["balanced"] | None = None
    """balanced: classes count alike, however many images they have (cross-entropy only)."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    global_batch_size: Count = Field(128, ge=1)
    """Clean images per update, over all micro-batches and ranks."""
    micro_batch_size: Annotated[Count, Field(ge=1)] | Literal["auto"] | None = None
    """Clean images per forward pass: what batch norm sees in each route. None is the global batch;
    auto the largest that fits on this device, by trial, which config.yaml then names."""
    epochs: float | None = Field(None, gt=0, le=LONGEST)
    """Passes over the training set (give epochs or steps)."""
    steps: Count | None = Field(None, ge=1)
    """Updates (give epochs or steps)."""
    seed: int = Field(0, ge=0, le=LARGEST_SEED)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 are autocast's; fp16 scales the loss and leaves out a step whose gradient
    overflows."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is infinite or NaN: end the run before the update, or leave the
    update out."""
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
    """A checked copy with the given fields changed; a dotted path is written with double
    underscores.
    """
    nested: dict[str, dict[str, Any]] = {}
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        head, _, rest = key.partition("__")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            flat[head] = value
    flat |= {head: replace(getattr(section, head), **fields) for head, fields in nested.items()}
    kept = {name: getattr(section, name) for name in type(section).model_fields}
    return type(section).model_validate({**kept, **flat})


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dictionary with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def differences(a: Config, b: Config) -> list[str]:
    """``name: a -> b`` for every setting that differs."""
    left, right = flatten(a.model_dump(mode="json")), flatten(b.model_dump(mode="json"))
    return [f"{name}: {left[name]} -> {right[name]}" for name in left if left[name] != right[name]]


DEFAULTS: Mapping[str, Any] = flatten(Config().model_dump())
"""Every setting by its dotted name, with its default."""


def changed(config: Config, name: str) -> bool:
    """Whether a setting, by its dotted name, has another value than its default."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return bool(value != DEFAULTS[name])
