"""The loader beside a plain torchvision DataLoader: images per second.

Both read an image folder and make uint8 batches of the same size by the same kind of augmentation;
conadv's draws are keyed by the sample.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from conadv.config.resolve import resolve
from conadv.config.schema import AugmentName, Config, DataConfig
from conadv.data import augment as augments
from conadv.distributed.comm import Comm
from conadv.planning.timing import Case, Row, Sample, measure
from conadv.training.data import load_data

OURS, PLAIN = "conadv", "torchvision, DataLoader"
CLASSES, PER_CLASS = 4, 64
Batches = Callable[[int], Iterator[Any]]
"""Number of steps -> a fresh iterator over that many, each with all its micro-batches."""


@dataclass(frozen=True)
class Loading:
    """What to time: ``accumulation`` micro-batches of ``batch`` images are taken at once.

    images: that are timed in each round, once the loader runs. pause: seconds after each step in
    which nothing is taken, as while a step computes; part of the time.
    """

    data: DataConfig
    batch: int = 64
    accumulation: int = 1
    images: int = 1024
    pause: float = 0.0

    @property
    def step(self) -> int:
        """Images that are taken at once."""
        return self.batch * self.accumulation


def loader_speed(loading: Loading, rounds: int) -> list[Row]:
    """Seconds per step of both loaders, interleaved."""
    loaders = {OURS: ours(loading), PLAIN: plain(loading)}
    cases = {name: Case(timed(batches, loading), PLAIN) for name, batches in loaders.items()}
    return measure(cases, rounds, Comm())


@contextmanager
def random_photographs(size: int, per_class: int = PER_CLASS) -> Iterator[Path]:
    """A folder of smooth random images for as long as the block runs.

    Pure noise would decode far more slowly than photographs do.
    """
    with tempfile.TemporaryDirectory(prefix="conadv-bench-") as folder:
        for split, count in (("train", per_class), ("test", 1)):
            for label in range(CLASSES):
                target = Path(folder) / split / f"class{label}"
                target.mkdir(parents=True)
                draws, edge = torch.Generator().manual_seed(label), max(2, size // 16)
                coarse = torch.randint(
                    0, 256, (count, 3, edge, edge), generator=draws, dtype=torch.uint8
                )
                for number, image in enumerate(F.resize(coarse, [size, size], antialias=True)):
                    F.to_pil_image(image).save(target / f"{number}.jpg")
        yield Path(folder)


def ours(loading: Loading) -> Batches:
    config = Config(
        data=loading.data, global_batch_size=loading.step, micro_batch_size=loading.batch, steps=1
    )
    data = load_data(resolve(config))
    return lambda count: data.train_batches(0, count)


def plain(loading: Loading) -> Batches:
    data = loading.data
    assert data.dir is not None
    images = ImageFolder(str(data.dir / "train"), pipeline(data.augment, data.image_size or 224))

    def batches(count: int) -> Iterator[Any]:
        sampler = RandomSampler(images, replacement=True, num_samples=count * loading.step)
        workers = data.num_workers
        loader = iter(DataLoader(images, loading.batch, sampler=sampler, num_workers=workers))
        return (list(islice(loader, loading.accumulation)) for _ in range(count))

    return batches


def pipeline(name: AugmentName, size: int) -> v2.Compose:
    """torchvision's usual pipeline for photographs of any size."""
    policy = augments.build_policy(name, v2.AutoAugmentPolicy.IMAGENET)
    train = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *([policy] if policy else [])]
    still = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)]
    return v2.Compose([*(still if name == "none" else train), v2.PILToTensor()])


def timed(batches: Batches, loading: Loading) -> Callable[[], Sample]:
    """Seconds per step once the loader runs, without what workers have read ahead."""
    ahead = -(-2 * loading.data.num_workers // loading.accumulation) + 1
    count = -(-loading.images // loading.step)

    def run() -> Sample:
        stream = batches(ahead + count)
        for _ in islice(stream, ahead):
            pass
        start = time.perf_counter()
        for _ in stream:
            time.sleep(loading.pause)
        return Sample((time.perf_counter() - start) / count)

    return run
