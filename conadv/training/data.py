"""From a config to its data set, its batches and its network."""

from __future__ import annotations

from torch import nn

from conadv.config.files import home
from conadv.config.resolve import accumulation, micro_batch
from conadv.config.schema import Config, ModelConfig
from conadv.data.loader import Data
from conadv.data.source import Progress, Source, build_source
from conadv.errors import ConadvError
from conadv.models.make import build_model


def load_source(config: Config, progress: Progress | None = None) -> Source:
    """The data set of a resolved config. ``progress`` hears of images decoded into memory.

    Raises ConadvError, naming the path or the setting and what to do, for a folder that cannot be
    trained on and for settings that do not fit the data.
    """
    data = config.data
    source = build_source(
        data.source,
        dir=None if data.dir is None else home(data.dir),
        download=data.download,
        image_size=data.image_size,
        train_images=data.train_images,
        validation_images=data.validation_images,
        subset_seed=config.seed if data.subset_seed is None else data.subset_seed,
        on_bad_image=data.on_bad_image,
        progress=progress,
    )
    for name, values in (("mean", data.mean), ("std", data.std)):
        if len(values) not in (1, source.channels):
            raise ConadvError(
                f"data.{name} has {len(values)} values, but {data.source} has {source.channels} "
                f"channel(s). Give 1 or {source.channels}."
            )
    if min(data.std) <= 0:
        raise ConadvError(f"data.std {data.std} must be positive.")
    return source


def load_data(
    config: Config,
    *,
    rank: int = 0,
    ranks: int = 1,
    mine: range | None = None,
    read: int | None = None,
    source: Source | None = None,
) -> Data:
    """The batches of a resolved config; ``source``: what :func:`load_source` has made of it, where
    it is there already.

    The other arguments are those of :func:`conadv.data.loader.Data`.
    """
    accumulation(config, ranks)  # before anything is read
    return Data(
        source or load_source(config),
        global_batch_size=config.global_batch_size,
        micro_batch_size=micro_batch(config),
        read=read,
        seed=config.seed,
        augment=config.data.augment,
        aug_view=config.data.aug_view,
        mixup=config.data.mixup,
        cutmix=config.data.cutmix,
        num_workers=config.data.num_workers,
        on_bad_image=config.data.on_bad_image,
        rank=rank,
        ranks=ranks,
        mine=mine,
    )


def load_model(model: ModelConfig, in_channels: int, num_classes: int) -> nn.Module:
    """The network of a config, freshly initialised from the global generator."""
    return build_model(model.name, in_channels, num_classes, width=model.width, args=model.args)
