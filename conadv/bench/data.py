"""The loader beside a plain torchvision DataLoader: images per second, and the memory of a process that does only that.

Both make uint8 batches of the same size by the same kind of augmentation. conadv's draws are keyed by the sample, and
for images in memory it augments a batch at once; the plain loader does what torchvision's data sets do, one PIL image
after another.
"""

from __future__ import annotations

import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from conadv.bench import output
from conadv.bench.harness import Case, Row, Sample, measure
from conadv.bench.memory import Peak, private_memory
from conadv.bench.options import DataArgs
from conadv.config.schema import AugmentName, Config, DataConfig
from conadv.data import augment as augments
from conadv.data.splits import MemorySplit
from conadv.distributed.environment import pick_device
from conadv.training.data import load_data, load_source

OURS, PLAIN = "conadv", "torchvision, DataLoader"
CLASSES, PER_CLASS = 4, 64
MIB = 2**20


def command(options: DataArgs) -> None:
    """Measure, print a table, write JSON."""
    output.prepare(options)
    device = pick_device(options.device)
    with with_images(options) as found:
        cases = {
            name: Case(timed_batches(make(found), found), PLAIN) for name, make in LOADERS.items()
        }
        rows = measure(cases, options.rounds, seconds=options.seconds, seed=options.seed)
        memory = {name: _in_fresh_process(name, found) for name in LOADERS}
    complete = [asdict(row) | rates(row, options) | memory[row.name] for row in rows]
    output.say(table(rows, complete))
    output.write(options.out, output.facts("data", options, device), "data", complete)


# ---- the images


@contextmanager
def with_images(options: DataArgs) -> Iterator[DataArgs]:
    """The options with a folder: the user's, or one with images made at random for as long as the block runs."""
    if options.data is not None or options.source == "digits":
        yield options
        return
    with tempfile.TemporaryDirectory(prefix="conadv-bench-") as folder:
        size = 32 if options.source == "cifar10" else options.photo_size
        per_class = max(PER_CLASS, -(-options.step // CLASSES))
        for split, count in (("train", per_class), ("test", 1)):
            for label in range(CLASSES):
                _draw_class(Path(folder) / split / f"class{label}", count, size, label)
        yield replace(options, data=Path(folder))


def _draw_class(folder: Path, count: int, size: int, seed: int) -> None:
    """Smooth random photographs: pure noise would decode far slower than photographs do."""
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(
        0, 256, (count, 3, max(2, size // 16), max(2, size // 16)), generator=g, dtype=torch.uint8
    )
    for number, image in enumerate(F.resize(coarse, [size, size], antialias=True)):
        F.to_pil_image(image).save(folder / (f"{number}.png" if size <= 32 else f"{number}.jpg"))


# ---- the loaders

Batches = Callable[[int], Iterator[Any]]
"""number of steps -> a fresh iterator over that many, each with all its micro-batches."""


def ours(options: DataArgs) -> Batches:
    data = load_data(_config(options))
    return lambda count: data.train_batches(0, count)


def plain(options: DataArgs) -> Batches:
    images = _plain_images(options)

    def batches(count: int) -> Iterator[Any]:
        sampler = RandomSampler(images, replacement=True, num_samples=count * options.step)  # type: ignore[arg-type]
        parts = iter(
            DataLoader(images, options.batch, sampler=sampler, num_workers=options.num_workers)
        )
        return (list(islice(parts, options.accumulation)) for _ in range(count))

    return batches


LOADERS: dict[str, Callable[[DataArgs], Batches]] = {OURS: ours, PLAIN: plain}


@dataclass(frozen=True)
class InMemory(Dataset[Any]):
    """As torchvision's CIFAR10: one array, of which each item becomes a PIL image and goes through the transform."""

    split: MemorySplit
    transform: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(F.to_pil_image(self.split.images[index])), int(
            self.split.labels[index]
        )


def _plain_images(options: DataArgs) -> Dataset[Any]:
    if options.source == "folder":
        assert options.data is not None
        images: Dataset[Any] = ImageFolder(
            str(options.data / "train"), photo_transform(options.augment, options.image_size or 224)
        )
        return images
    split = load_source(_config(options)).train
    assert isinstance(split, MemorySplit)
    return InMemory(split, memory_transform(options.augment, split.images.shape[-1], split.flip))


def photo_transform(name: AugmentName, size: int) -> v2.Compose:
    """torchvision's usual pipeline for photographs of any size."""
    if name == "none":
        return v2.Compose(
            [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()]
        )
    policy = augments._policy(name, v2.AutoAugmentPolicy.IMAGENET)
    steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), policy, v2.PILToTensor()]
    return v2.Compose([step for step in steps if step is not None])


def memory_transform(name: AugmentName, size: int, flip: bool) -> v2.Compose:
    """torchvision's usual pipeline for small images of one size."""
    if name == "none":
        return v2.Compose([v2.PILToTensor()])
    mirror = v2.RandomHorizontalFlip() if flip else None
    policy = augments._policy(name, v2.AutoAugmentPolicy.CIFAR10)
    steps = [v2.RandomCrop(size, padding=max(1, size // 8)), mirror, policy, v2.PILToTensor()]
    return v2.Compose([step for step in steps if step is not None])


def _config(options: DataArgs) -> Config:
    data = DataConfig(
        source=options.source,
        dir=options.data,
        image_size=options.image_size,
        augment=options.augment,
        num_workers=options.num_workers,
    )
    sizes = {"global_batch_size": options.step, "micro_batch_size": options.batch}
    return Config(data=data, steps=1, **sizes)


# ---- what is measured


def timed_batches(batches: Batches, options: DataArgs) -> Callable[[], Sample]:
    """Seconds per step once the loader runs: starting workers and what they have read ahead is not counted."""
    ahead = -(-2 * options.num_workers // options.accumulation) + 1
    count = -(-options.images // options.step)

    def run() -> Sample:
        stream = batches(ahead + count)
        for _ in islice(stream, ahead):
            pass
        start = time.perf_counter()
        for _ in stream:
            time.sleep(options.pause)
        return Sample((time.perf_counter() - start) / count)

    return run


def _in_fresh_process(name: str, options: DataArgs) -> dict[str, float | None]:
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as fresh:
        return fresh.submit(peak_memory, name, options).result()


def peak_memory(name: str, options: DataArgs) -> dict[str, float | None]:
    """Peak memory in MiB of a process that only loads, with its workers, and how much it had before the first image."""
    torch.set_num_threads(options.threads)
    before = private_memory()
    with Peak() as peak:
        for _ in LOADERS[name](options)(-(-options.images // options.step)):
            pass
    return {"peak_mib": peak.bytes and peak.bytes / MIB, "start_mib": before and before / MIB}


def rates(row: Row, options: DataArgs) -> dict[str, float]:
    return {"images_per_second": 1e3 * options.step / row.median_ms}


def table(rows: list[Row], complete: list[dict[str, Any]]) -> str:
    head = ["", "images/s", "ms per step", "ratio", "to", "peak MiB", "MiB at start"]
    cells = []
    for row, values in zip(rows, complete, strict=True):
        memory = [
            f"{values[name]:.0f}" if values[name] else "-" for name in ("peak_mib", "start_mib")
        ]
        speed = [f"{values['images_per_second']:.0f}", f"{row.median_ms:.2f}"]
        cells.append([row.name, *speed, output.ratio_text(row), row.yardstick, *memory])
    return f"{output.text_table(head, cells)}\n{output.describe_rounds(rows)}"
