"""Recipes for photographs: any image folder, and ImageNet at batches from 4K to 96K.

**None of the ImageNet recipes has been run by us**: we have neither the data nor the machines. Each names the source of
its numbers and says what is our own choice. They train with every ``--method``; without one they are the baseline.

On one node of 8 GPUs, and on several, each of which gets the same command:

    torchrun --nproc-per-node 8 -m conadv train RECIPE --data DIR --method conadv --lookahead
    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        -m conadv train RECIPE --data DIR --method conadv --lookahead

On Slurm `conadv slurm > job.sh` prints a script for as many nodes as each recipe names below.

DIR has train/<class>/* and val/<class>/*; ImageNet's own val has to be sorted first (docs/data.md). Accumulation makes
up for a smaller number of devices: the global batch, and the images that batch norm sees (micro_batch_size), stay what
they are. So the number of ranks times micro_batch_size must divide the global batch: at 4K with 128, 32 ranks at most.

Time: `conadv plan NODE.json --measure all` on one node, with the recipe's network (docs/imagenet.md has the commands);
each recipe's last command then says how long the training takes on any number of devices. No time is stated here that
nobody has measured.

Warm-up: an epoch is floor(1,281,167 / batch) steps. The reference implementation rounds up, so its warm-up is up to 5 %
longer at 64K. Its decay has ``decay_steps`` steps after the warm-up; so have these.
"""

from __future__ import annotations

import math

from conadv.config.schema import (
    AttackConfig,
    AugmentName,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    replace,
)

TRAIN_IMAGES = 1_281_167


def _photographs(augment: AugmentName, num_workers: int = 8) -> DataConfig:
    return DataConfig(
        source="folder",
        augment=augment,
        image_size=224,
        num_workers=num_workers,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
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
        data=_photographs("basic", num_workers=2),
        model=ModelConfig(name="resnet50"),
        optim=OptimConfig(name="lars", lr=2.5, weight_decay=2e-4),
        schedule=ScheduleConfig(warmup_epochs=5, end_lr=1e-4),
        attack=AttackConfig(eps=4 / 255, step_size=4 / 255),
        eval=EvalConfig(every_epochs=5, batch_size=100),
        checkpoint=CheckpointConfig(every_epochs=1),
    )


def _imagenet(recipe: str, batch: int, micro: int, model: ModelConfig) -> Config:
    """What all ImageNet recipes share; the attack is that of imagefolder."""
    shared: Config = replace(
        imagefolder(),
        recipe=recipe,
        global_batch_size=batch,
        micro_batch_size=micro,
        precision="bf16",
        channels_last=True,
        model=model,
        data=_photographs("basic"),
        eval__every_epochs=4,
        # conadv's have a batch of adversarial images in them, 20 GB at 32K
        checkpoint=CheckpointConfig(every_epochs=10, background=True),
    )
    return shared


def _mlperf(
    recipe: str,
    batch: int,
    bn_images: int,
    warmup_epochs: int,
    decay_steps: int,
    optim: OptimConfig,
) -> Config:
    """One of MLPerf's reference convergence points for ResNet-50 with LARS: power 2, end lr 1e-4, eta 0.001, eps 0."""
    config: Config = replace(
        _imagenet(recipe, batch, bn_images, ModelConfig(name="resnet50")),
        epochs=None,
        steps=warmup_epochs * (TRAIN_IMAGES // batch) + decay_steps,
        optim=optim,
        schedule=ScheduleConfig(warmup_epochs=warmup_epochs, power=2.0, end_lr=1e-4),
    )
    return config


def resnet50_8k() -> Config:
    r"""ImageNet, ResNet-50, LARS at batch 8,192: MLPerf's reference point. Not run by us.

    torchrun --nproc-per-node 8 -m conadv train imagenet_resnet50_8k --data DIR --method conadv --lookahead
    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m conadv train imagenet_resnet50_8k --data DIR --method conadv --lookahead
    RECIPE=imagenet_resnet50_8k DATA=DIR sbatch job.sh
    conadv plan NODE.json --devices 8,64 --global-batch-size 8192 --micro-batch-size 64
    (Before: conadv slurm > job.sh; conadv plan NODE.json --measure all ..., see docs/imagenet.md)

    Expected of plain LARS: 75.9 % after 42.0 epochs on average (10 runs; mlcommons/logging, training_2.0.0,
    rcps_resnet.json, resnet_ref_8192). 64 images per batch norm, so accumulation 16 on 8 devices and 2 on 64.
    """
    return _mlperf("imagenet_resnet50_8k", 8_192, 64, 5, 6_095, _lars(17.0, 0.9, 2e-4))


def resnet50_32k() -> Config:
    r"""ImageNet, ResNet-50, LARS at batch 32,768: MLPerf's reference point. Not run by us.

    torchrun --nproc-per-node 8 -m conadv train imagenet_resnet50_32k --data DIR --method conadv --lookahead
    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m conadv train imagenet_resnet50_32k --data DIR --method conadv --lookahead
    RECIPE=imagenet_resnet50_32k DATA=DIR sbatch job.sh
    conadv plan NODE.json --devices 8,64 --global-batch-size 32768 --micro-batch-size 128
    (Before: conadv slurm > job.sh; conadv plan NODE.json --measure all ..., see docs/imagenet.md)

    Expected of plain LARS: 75.9 % after 56.0 epochs on average (10 runs; rcps_resnet.json, resnet_ref_32768). 128
    images per batch norm, so accumulation 32 on 8 devices and 4 on 64.

    LAMB at the same batch, by the code of LAMB's first author (github.com/fastalgo/imagenet_resnet50_lamb, run.sh of
    commit e0fba5c; 76.3 % after 3,519 steps by that repository): --optimizer lamb --lr 0.04 --optim.weight-decay 1.5
    --steps 3519 --schedule.warmup-epochs 20 --schedule.power 1 --schedule.end-lr 0. That code also clips the
    gradient's norm to 1, which LAMB's step hardly depends on.
    """
    return _mlperf("imagenet_resnet50_32k", 32_768, 128, 16, 2_267, _lars(21.2, 0.94, 2.5e-5))


def resnet50_64k() -> Config:
    r"""ImageNet, ResNet-50, LARS at batch 65,536: MLPerf's reference point. Not run by us.

    torchrun --nproc-per-node 8 -m conadv train imagenet_resnet50_64k --data DIR --method conadv --lookahead
    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m conadv train imagenet_resnet50_64k --data DIR --method conadv --lookahead
    RECIPE=imagenet_resnet50_64k DATA=DIR sbatch job.sh
    conadv plan NODE.json --devices 8,64 --global-batch-size 65536 --micro-batch-size 128
    (Before: conadv slurm > job.sh; conadv plan NODE.json --measure all ..., see docs/imagenet.md)

    Expected of plain LARS: 75.9 % after 84.5 epochs on average (10 runs; rcps_resnet.json, resnet_ref_65536). So the
    75.3 % of the paper's LARS at 64K is less than a tuned one reaches. 128 images per batch norm: accumulation 64 on 8
    devices and 8 on 64.
    """
    return _mlperf("imagenet_resnet50_64k", 65_536, 128, 31, 1_133, _lars(24.699, 0.951807, 1e-4))


def _lars(lr: float, momentum: float, weight_decay: float) -> OptimConfig:
    return OptimConfig(
        name="lars", lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=0.001
    )


def resnet50_96k() -> Config:
    r"""ImageNet, ResNet-50, LARS at batch 98,304: the ConAdv authors' settings. Not run by us.

    torchrun --nproc-per-node 8 -m conadv train imagenet_resnet50_96k --data DIR --method conadv --lookahead
    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m conadv train imagenet_resnet50_96k --data DIR --method conadv --lookahead
    RECIPE=imagenet_resnet50_96k DATA=DIR sbatch job.sh
    conadv plan NODE.json --devices 8,64 --global-batch-size 98304 --micro-batch-size 96
    (Before: conadv slurm > job.sh; conadv plan NODE.json --measure all ..., see docs/imagenet.md)

    Their result: 75.3 % with ConAdv, 76.2 % with AutoAugment as a third view (--aug-view autoaugment), arXiv
    2106.00221; LARS alone 74.3 % as the VRGD paper quotes them. 1,301 steps are 99.8 epochs. 96 images per batch norm
    and view: accumulation 128 on 8 devices and 16 on 64. Their attack goes towards a random wrong class from a random
    start: --attack.targeted --attack.random-start 0.8 --eps 0.0161 (not with recycle). What else differs:
    docs/numerics.md.
    """
    config: Config = replace(
        _imagenet("imagenet_resnet50_96k", 98_304, 96, ModelConfig(name="resnet50")),
        epochs=None,
        steps=1_301,
        optim=_lars(43.0, 0.92, 5e-5),
        schedule=ScheduleConfig(warmup_epochs=41, power=1.6, end_lr=1e-4),
    )
    return config


def _efficientnet_b0(recipe: str, batch: int, warmup_epochs: float) -> Config:
    config: Config = replace(
        _imagenet(recipe, batch, 128, ModelConfig(name="efficientnet_b0")),
        epochs=350,
        data=_photographs("autoaugment"),
        optim=OptimConfig(name="lamb", lr=0.04 * math.sqrt(batch / 32_768), weight_decay=0.02),
        schedule=ScheduleConfig(warmup_epochs=warmup_epochs, power=1.0),
    )
    return config


def efficientnet_b0_4k() -> Config:
    r"""ImageNet, EfficientNet-B0, LAMB at batch 4,096. Not run by us, and by nobody whom we know of.

    torchrun --nproc-per-node 8 -m conadv train imagenet_efficientnet_b0_4k --data DIR --method conadv --lookahead
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m conadv train imagenet_efficientnet_b0_4k --data DIR --method conadv --lookahead
    RECIPE=imagenet_efficientnet_b0_4k DATA=DIR sbatch --nodes 4 job.sh
    conadv plan NODE.json --devices 8,32 --global-batch-size 4096 --micro-batch-size 128
    (Before: conadv slurm > job.sh; conadv plan NODE.json --measure all ..., see docs/imagenet.md)

    For comparison: 77.1 % with RMSProp at batch 4,096 in 350 epochs (Tan and Le 2019, arXiv 1905.11946). The learning
    rate is LAMB's at 32K for ResNet-50 (0.04, linear decay, 20 of 90 epochs warm-up: see imagenet_resnet50_32k) times
    sqrt(1/8), the square-root rule of You et al. 2019, arXiv 1904.00962. Our choice: warm-up epochs in proportion to
    the batch, weight decay 0.02, 128 images per batch norm, 350 epochs, AutoAugment.
    """
    return _efficientnet_b0("imagenet_efficientnet_b0_4k", 4_096, 2.5)


def efficientnet_b0_32k() -> Config:
    r"""ImageNet, EfficientNet-B0, LAMB at batch 32,768. Not run by us, and by nobody whom we know of.

    torchrun --nproc-per-node 8 -m conadv train imagenet_efficientnet_b0_32k --data DIR --method conadv --lookahead
    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m conadv train imagenet_efficientnet_b0_32k --data DIR --method conadv --lookahead
    RECIPE=imagenet_efficientnet_b0_32k DATA=DIR sbatch job.sh
    conadv plan NODE.json --devices 8,64 --global-batch-size 32768 --micro-batch-size 128
    (Before: conadv slurm > job.sh; conadv plan NODE.json --measure all ..., see docs/imagenet.md)

    The 32K point of imagenet_efficientnet_b0_4k, where the sources are: lr 0.04, 20 epochs warm-up.
    """
    return _efficientnet_b0("imagenet_efficientnet_b0_32k", 32_768, 20)


def _vit_s(recipe: str, batch: int, warmup_epochs: float) -> Config:
    model = ModelConfig(name="timm:deit3_small_patch16_224", args=("drop_path_rate=0.05",))
    config: Config = replace(
        _imagenet(recipe, batch, 128, model),
        epochs=300,
        data=_photographs("randaugment"),
        optim=OptimConfig(name="lamb", lr=4e-3 * math.sqrt(batch / 2_048), weight_decay=0.05),
        schedule=ScheduleConfig(warmup_epochs=warmup_epochs, decay="cosine"),
    )
    return config


def vit_s_4k() -> Config:
    r"""ImageNet, ViT-S/16, LAMB at batch 4,096 (needs timm). Not run by us.

    torchrun --nproc-per-node 8 -m conadv train imagenet_vit_s_4k --data DIR --method conadv --lookahead
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m conadv train imagenet_vit_s_4k --data DIR --method conadv --lookahead
    RECIPE=imagenet_vit_s_4k DATA=DIR sbatch --nodes 4 job.sh
    conadv plan NODE.json --devices 8,32 --global-batch-size 4096 --micro-batch-size 128
    (Before: conadv slurm > job.sh; conadv plan NODE.json --measure all ..., see docs/imagenet.md)

    No batch norm: all routes share the normalisation. From DeiT III (Touvron et al. 2022, arXiv 2204.07118, README of
    facebookresearch/deit): its ViT-S with LayerScale, LAMB, lr 4e-3 at batch 2,048, weight decay 0.05, cosine, 5 epochs
    warm-up, drop path 0.05; 81.4 % after 800 epochs with mixup, cutmix, 3-Augment, repeated augmentation and binary
    cross-entropy, which are not in this recipe. Our choice: lr times sqrt(batch / 2,048), warm-up epochs in proportion
    to the batch (10 here), RandAugment, label smoothing 0.1, 300 epochs. Expect less than theirs.
    """
    return _vit_s("imagenet_vit_s_4k", 4_096, 10)


def vit_s_32k() -> Config:
    r"""ImageNet, ViT-S/16, LAMB at batch 32,768 (needs timm). Not run by us, and by nobody whom we know of.

    torchrun --nproc-per-node 8 -m conadv train imagenet_vit_s_32k --data DIR --method conadv --lookahead
    torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m conadv train imagenet_vit_s_32k --data DIR --method conadv --lookahead
    RECIPE=imagenet_vit_s_32k DATA=DIR sbatch job.sh
    conadv plan NODE.json --devices 8,64 --global-batch-size 32768 --micro-batch-size 128
    (Before: conadv slurm > job.sh; conadv plan NODE.json --measure all ..., see docs/imagenet.md)

    imagenet_vit_s_4k by the same two rules: lr 4e-3 x sqrt(32,768 / 2,048) = 0.016, 80 epochs warm-up.
    """
    return _vit_s("imagenet_vit_s_32k", 32_768, 80)
