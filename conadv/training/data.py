"""From a config to its data set, its batches and its network."""

from __future__ import annotations

from typing import Any

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


def load_data(config: Config, source: Source | None = None, **placed: Any) -> Data:
    """The batches of a resolved config. ``source``: what :func:`load_source` made of it already.

    ``placed``: ``rank``, ``ranks``, ``mine`` and ``read`` of :class:`conadv.data.loader.Data`.
    """
    accumulation(config, placed.get("ranks", 1))  # before anything is read
    names = ("augment", "aug_view", "mixup", "cutmix", "num_workers", "on_bad_image")
    return Data(
        source or load_source(config),
        global_batch_size=config.global_batch_size,
        micro_batch_size=micro_batch(config),
        seed=config.seed,
        **{name: getattr(config.data, name) for name in names},
        **placed,
    )


def load_model(model: ModelConfig, in_channels: int, num_classes: int) -> nn.Module:
    """The network of a config, freshly initialised from the global generator."""
    return build_model(model.name, in_channels, num_classes, width=model.width, args=model.args)
