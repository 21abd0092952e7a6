"""Recipes: plain functions that return a Config. The docstring is the command, the time and the expected result.

Every recipe trains with every method; its learning rate was chosen for its optimizer and batch.
"""

from __future__ import annotations

from collections.abc import Callable

from .config import (
    AttackConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
)
from .errors import unknown


def digits() -> Config:
    """8x8 handwritten digits at the full batch of 898 images, ResNet-8, LARS: 20 seconds on one core.

    conadv train digits --method conadv --lookahead

    scikit-learn's digits, 898 training and 899 test images; nothing is downloaded. See the README for results.
    """
    return Config(
        recipe="digits",
        global_batch_size=898,
        epochs=80,
        data=DataConfig(source="digits", mean=(0.3053,), std=(0.3763,)),
        model=ModelConfig(name="resnet8", width=16),
        optim=OptimConfig(name="lars", lr=3.0),
        schedule=ScheduleConfig(warmup_epochs=8),
        attack=AttackConfig(eps=0.2),
        eval=EvalConfig(every_epochs=10, robust_eps=0.1),
        checkpoint=CheckpointConfig(every_epochs=20),
    )


def cifar10() -> Config:
    """CIFAR-10 from an image folder DIR/{train,test}/<class>/*, ResNet-20, LARS at batch 1,000.

    conadv train cifar10 --data DIR --method conadv --lookahead --precision bf16

    --download takes torchvision's CIFAR10 instead of an image folder. The folder is decoded once into memory.
    """
    return Config(
        recipe="cifar10",
        global_batch_size=1000,
        micro_batch_size=250,
        epochs=30,
        data=DataConfig(source="cifar10", augment="basic", mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
        model=ModelConfig(name="resnet20", width=16),
        optim=OptimConfig(name="lars", lr=10.0),
        schedule=ScheduleConfig(warmup_epochs=5),
        attack=AttackConfig(eps=2 / 255),
        eval=EvalConfig(every_epochs=5),
        checkpoint=CheckpointConfig(every_epochs=1),
    )


def fashion_mnist() -> Config:
    """Fashion-MNIST through torchvision (download only), ResNet-20, LARS at batch 2,000.

    conadv train fashion-mnist --data DIR --download --method conadv
    """
    return Config(
        recipe="fashion-mnist",
        global_batch_size=2000,
        epochs=30,
        data=DataConfig(source="fashion-mnist", augment="basic", mean=(0.2860,), std=(0.3530,)),
        model=ModelConfig(name="resnet20", width=16),
        optim=OptimConfig(name="lars", lr=10.0),
        schedule=ScheduleConfig(warmup_epochs=5),
        attack=AttackConfig(eps=8 / 255),
        eval=EvalConfig(every_epochs=5),
        checkpoint=CheckpointConfig(every_epochs=1),
    )


def imagefolder() -> Config:
    """Any image folder DIR/{train,test or val}/<class>/*, any torchvision model, LARS.

    Images are decoded on the fly.

    conadv train imagefolder --data DIR --model resnet50 --data.num-workers 8 --global-batch-size 4096
        --micro-batch-size 64 --lr 10 --method conadv

    Defaults are MLPerf's 4K point for ResNet-50 with LARS (docs/numerics.md), its lr divided by 4 for batch 256. Not
    run to convergence by us.
    """
    return Config(
        recipe="imagefolder",
        global_batch_size=256,
        epochs=90,
        label_smoothing=0.1,
        data=DataConfig(
            source="folder",
            augment="basic",
            image_size=224,
            num_workers=2,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        model=ModelConfig(name="resnet50"),
        optim=OptimConfig(name="lars", lr=2.5, weight_decay=2e-4),
        schedule=ScheduleConfig(warmup_epochs=5, end_lr=1e-4),
        attack=AttackConfig(eps=4 / 255, step_size=4 / 255),
        eval=EvalConfig(every_epochs=5, batch_size=100),
        checkpoint=CheckpointConfig(every_epochs=1),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "digits": digits,
    "cifar10": cifar10,
    "fashion-mnist": fashion_mnist,
    "imagefolder": imagefolder,
}


def get(name: str) -> Config:
    """The recipe's config, or ConadvError with the nearest name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]()


def summary(name: str) -> str:
    """The first line of a recipe's docstring."""
    return (RECIPES[name].__doc__ or "").strip().partition("\n")[0]
