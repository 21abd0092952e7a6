"""Data: the order, the augmentation, the sources, and the batches that the engine trains on."""

from .augment import build_augment, build_photo_augment, sample_keys
from .loader import Data, build_data, windows
from .order import Order
from .sources import SOURCES, Source, build_source
from .splits import MemorySplit, PhotoSplit, Split
from .windowed import WindowedLoader

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
