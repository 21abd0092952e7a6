"""Data: the order, the augmentation, the sources, and the batches that the engine trains on.

A new data set is a function ``(SourceSettings) -> Source`` in a file of its own, and a row here.
Nothing here imports torch.
"""

SOURCES: dict[str, str] = {
    "digits": "conadv.data.digits:digits",
    "cifar10": "conadv.data.folder:cifar10",
    "fashion-mnist": "conadv.data.downloads:fashion_mnist",
    "folder": "conadv.data.folder:folder",
    "huggingface": "conadv.data.huggingface:huggingface",
}
"""Name -> "module:function", imported when it is used."""

AUGMENTATIONS = ("none", "basic", "autoaugment", "randaugment", "trivialaugment")
"""What :mod:`conadv.data.augment` builds by name."""
