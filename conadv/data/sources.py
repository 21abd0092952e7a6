"""The data sets by name. A source is one function of the data settings and one row in SOURCES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import functional as F

from conadv.config.schema import DataConfig, home
from conadv.data.files import BadFile, Progress, decode, scan_folder
from conadv.data.parquet import scan_parquet
from conadv.data.splits import MemorySplit, Photos, PhotoSplit, Split, choose, hold_out
from conadv.errors import ConadvError, printable, unknown


@dataclass(frozen=True)
class Source:
    """A data set ready for training. Images are ``channels`` x ``image_size`` x ``image_size``, uint8.

    ``validation``: images held out of ``train`` to choose settings by, None without.
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    validation: Split | None = None


def build_source(
    config: DataConfig, progress: Progress | None = None, seed: int | None = None
) -> Source:
    """The source that ``config`` names. Raises ConadvError for whatever is wrong with the folder or the settings.

    ``seed``: the run's, which nothing here depends on but a data.subset_seed of None. ``progress`` hears of images
    decoded into memory.
    """
    if config.source not in SOURCES:
        raise unknown("data source", config.source, SOURCES)
    if config.on_bad_image == "skip" and (config.download or config.source not in _ENCODED):
        raise ConadvError("data.on_bad_image has no effect without files of images. Leave it out.")
    config = _with_subset_seed(config, seed)
    source = SOURCES[config.source](config, progress)
    _check_normalisation(config, source.channels)
    if config.validation_images is None:
        return source
    assert config.subset_seed is not None
    train, validation = hold_out(
        source.train, config.validation_images, source.class_names, seed=config.subset_seed
    )
    return replace(source, train=train, validation=validation)


def _with_subset_seed(config: DataConfig, seed: int | None) -> DataConfig:
    if config.subset_seed is not None:
        return config
    if seed is None:
        raise ConadvError(
            "data.subset_seed None takes the run's seed. Give build_source that seed."
        )
    return config.model_copy(update={"subset_seed": seed})


def _choose(labels_N: Tensor, config: DataConfig, class_names: tuple[str, ...]) -> Tensor:
    assert config.subset_seed is not None  # build_source puts the run's seed there
    return choose(labels_N, config.train_images, class_names, seed=config.subset_seed)


def digits(config: DataConfig, progress: Progress | None = None) -> Source:
    """scikit-learn's 8x8 handwritten digits, 898 training and 899 test images, always the same split. No mirroring."""
    from sklearn.datasets import load_digits  # scikit-learn takes a second to import
    from sklearn.model_selection import train_test_split

    if config.dir is not None or config.download:
        raise ConadvError(
            "data.dir and data.download have no effect with data.source digits. Leave them out."
        )
    values, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.round(values * 255 / 16).astype(np.uint8)).view(-1, 1, 8, 8)
    parts = train_test_split(np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=0)
    splits = [(images[part], torch.from_numpy(labels[part]).long()) for part in parts]
    return _in_memory(splits, tuple("0123456789"), config, flip=False)


def cifar10(config: DataConfig, progress: Progress | None = None) -> Source:
    """CIFAR-10, or any folder of small images, held in memory; with ``download`` torchvision's copy of CIFAR-10."""
    if config.download:
        return _torchvision(datasets.CIFAR10, config)
    train, test = scan_folder(_directory(config))
    train = train.subset(_choose(train.labels, config, train.class_names))
    bad: list[dict[int, BadFile]] = [{}, {}]
    skip = config.on_bad_image == "skip"
    images = [
        decode(listing, config.image_size, progress, unread if skip else None)
        for listing, unread in zip((train, test), bad, strict=True)
    ]
    if images[0].shape[1:] != images[1].shape[1:]:
        raise ConadvError(
            f"The images in {train.root} are {images[0].shape[-1]} pixels wide and those in {test.root} "
            f"{images[1].shape[-1]}. Give data.image_size to bring all images to one size."
        )
    splits = (
        MemorySplit(images[0], train.labels, bad=bad[0]),
        MemorySplit(images[1], test.labels, bad=bad[1]),
    )
    return Source(*splits, train.class_names, channels=3, image_size=images[0].shape[-1])


def fashion_mnist(config: DataConfig, progress: Progress | None = None) -> Source:
    """Fashion-MNIST by torchvision: 28x28 grey images, 60,000 and 10,000."""
    return _torchvision(datasets.FashionMNIST, config)


def folder(config: DataConfig, progress: Progress | None = None) -> Source:
    """Any image folder, photographs of any size, decoded when they are needed. image_size is 224 unless given."""
    _refuse_download(config)
    return _photos(*scan_folder(_directory(config)), config)


def huggingface(config: DataConfig, progress: Progress | None = None) -> Source:
    """Parquet files in the layout of Hugging Face, decoded when they are needed. image_size is 224 unless given."""
    _refuse_download(config)
    return _photos(*scan_parquet(_directory(config)), config)


def _refuse_download(config: DataConfig) -> None:
    if config.download:
        raise ConadvError(
            f"data.download has no effect with data.source {config.source}. Leave it out."
        )


def _photos(train: Photos, test: Photos, config: DataConfig) -> Source:
    train = train.subset(_choose(train.labels, config, train.class_names))
    size = config.image_size or 224
    return Source(
        PhotoSplit(train, size),
        PhotoSplit(test, size),
        train.class_names,
        channels=3,
        image_size=size,
    )


SOURCES: dict[str, Callable[[DataConfig, Progress | None], Source]] = {
    "digits": digits,
    "cifar10": cifar10,
    "fashion-mnist": fashion_mnist,
    "folder": folder,
    "huggingface": huggingface,
}
_ENCODED = ("cifar10", "folder", "huggingface")


def _directory(config: DataConfig) -> Path:
    if config.dir is None:
        raise ConadvError(
            f"data.source {config.source} needs a folder. Give data.dir (--data DIR)."
        )
    return home(config.dir)


def _torchvision(factory: Any, config: DataConfig) -> Source:
    directory = _directory(config)
    try:
        parts = [
            factory(str(directory), train=train, download=config.download)
            for train in (True, False)
        ]
    except Exception as error:  # whatever downloading, unpacking and reading raise
        if config.download:
            message = (
                f"The download of {config.source} into {printable(directory)} failed: {error}. Check the network and "
                "the folder."
            )
        else:
            message = f"There is no {config.source} in {printable(directory)}: {error}. Give data.download (--download)."
        raise ConadvError(message) from error
    splits = [(_to_nchw(part.data), torch.as_tensor(part.targets)) for part in parts]
    return _in_memory(splits, tuple(parts[0].classes), config, flip=True)


def _to_nchw(images: Any) -> Tensor:
    images_N: Tensor = torch.as_tensor(images)
    return images_N[:, None] if images_N.dim() == 3 else images_N.permute(0, 3, 1, 2).contiguous()


def _in_memory(
    parts: list[tuple[Tensor, Tensor]],
    class_names: tuple[str, ...],
    config: DataConfig,
    *,
    flip: bool,
) -> Source:
    """A source from (uint8 images_NCHW, labels_N) of train and test: subset, then one resize."""
    (x, y), test = parts
    chosen = _choose(y, config, class_names)
    train, test = (
        (_resized(x[chosen], config.image_size), y[chosen]),
        (_resized(test[0], config.image_size), test[1]),
    )
    splits = (MemorySplit(*train, flip), MemorySplit(*test, flip))
    return Source(*splits, class_names, channels=x.shape[1], image_size=train[0].shape[-1])


def _resized(images_NCHW: Tensor, image_size: int | None) -> Tensor:
    if image_size is None or image_size == images_NCHW.shape[-1]:
        return images_NCHW
    resized: Tensor = F.resize(images_NCHW, [image_size, image_size], antialias=True)
    return resized


def _check_normalisation(config: DataConfig, channels: int) -> None:
    for name in ("mean", "std"):
        values = getattr(config, name)
        if len(values) not in {1, channels}:
            raise ConadvError(
                f"data.{name} has {len(values)} values, but {config.source} has {channels} channel(s). "
                f"Give 1 or {channels}."
            )
    if min(config.std) <= 0:
        raise ConadvError(f"data.std {config.std} must be positive.")
