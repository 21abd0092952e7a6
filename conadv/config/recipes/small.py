"""Recipes for small images, which one machine trains in seconds to minutes."""

from __future__ import annotations

from conadv.config.schema import (
    AttackConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
)


def digits() -> Config:
    """8x8 handwritten digits, full batch of 898 images, ResNet-8, LARS: 20 seconds on one core.

    conadv train digits --method conadv --lookahead

    scikit-learn's digits, 898 training and 899 test images; nothing is downloaded. See the README
    for results.
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

    --download takes torchvision's CIFAR10 instead of an image folder. The folder is decoded once
    into memory.
    """
    return Config(
        recipe="cifar10",
        global_batch_size=1000,
        micro_batch_size=250,
        epochs=30,
        data=DataConfig(
            source="cifar10",
            augment="basic",
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
        ),
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
