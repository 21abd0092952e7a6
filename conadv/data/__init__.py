"""Data: the order, the augmentation, the sources, and the batches that the engine trains on."""

from conadv.data.augment import build_augment, build_photo_augment, sample_keys
from conadv.data.loader import Data, build_data, windows
from conadv.data.order import Order
from conadv.data.sources import SOURCES, Source, build_source
from conadv.data.splits import MemorySplit, PhotoSplit, Split
from conadv.data.windowed import WindowedLoader

__all__ = [
    "SOURCES",
    "Data",
    "MemorySplit",
    "Order",
    "PhotoSplit",
    "Source",
    "Split",
    "WindowedLoader",
    "build_augment",
    "build_data",
    "build_photo_augment",
    "build_source",
    "sample_keys",
    "windows",
]
