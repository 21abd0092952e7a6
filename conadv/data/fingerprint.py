"""A data set in a few kilobytes, to see on resume whether it is still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from conadv.data.source import Source
from conadv.data.splits import MemorySplit, PhotoSplit, Split
from conadv.errors import first_few

Fingerprint = dict[str, Any]
"""Text, numbers, lists and dictionaries alone, for a checkpoint or a JSON file."""


def fingerprint(source: Source) -> Fingerprint:
    """Source, class names in order, and per split the images of each class: how many, and a hash.

    The hash is over pixels where images are in memory, else over names and sizes (sizes alone in
    parquet files) and the bytes of each class's first image: another image of the same name and
    size further back goes unnoticed. The order of images counts; the folder's place and the time of
    its files do not.
    Costs: a stat of each file (3 s for a million), or a pass over the pixels (1 GB/s).
    """
    splits = {"train": source.train, "test": source.test, "validation": source.validation}
    return {
        "source": source.name,
        "classes": list(source.class_names),
        "splits": {
            name: _describe(split, len(source.class_names))
            for name, split in splits.items()
            if split is not None
        },
    }


def _describe(split: Split, num_classes: int) -> dict[str, Any]:
    counts = torch.bincount(split.labels, minlength=num_classes).tolist()
    by_class = torch.argsort(split.labels, stable=True).split(counts)
    if isinstance(split, MemorySplit):
        images = split.images
        hashes = [_hash(str(images.shape[1:]).encode(), images[own].numpy()) for own in by_class]
    else:
        tags = split.store.tags(split.keys)
        hashes = [
            _hash(*(tags[index] for index in own.tolist()), _content(split, own))
            for own in by_class
        ]
    return {"counts": counts, "hashes": hashes, "order": _hash(split.labels.numpy())}


def _content(split: PhotoSplit, indices_N: torch.Tensor) -> bytes:
    """The bytes of the first of these images; none where it cannot be read."""
    for index in indices_N[:1].tolist():
        with suppress(Exception), split.store.open(split.keys[index]) as file:
            return file.read()
    return b""


def _hash(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def changes(old: Fingerprint, new: Fingerprint) -> list[str]:
    """What differs between two fingerprints, one sentence each; empty if nothing does."""
    return list(_changes(old, new))


def _changes(old: Fingerprint, new: Fingerprint) -> Iterator[str]:
    if old["source"] != new["source"]:
        yield f"data.source was {old['source']}, it is {new['source']} now."
    before, after = old["classes"], new["classes"]
    if set(before) != set(after):
        for title, some, others in (("missing", before, after), ("new", after, before)):
            if names := [name for name in some if name not in set(others)]:
                yield f"Classes that are {title}: {first_few(names)}."
    elif before != after:
        orders = f"{first_few(before)} before, {first_few(after)} now"
        yield f"The classes are in another order: {orders}."
    for name in old["splits"] | new["splits"]:
        ours, theirs = (found["splits"].get(name) for found in (old, new))
        if ours is None or theirs is None:
            number = sum((ours or theirs)["counts"])
            yield f"{name}: {number} images that are {'new' if ours is None else 'missing'}."
        elif ours != theirs:
            yield from _changes_of_split(name, _by_class(old, name), _by_class(new, name))


def _changes_of_split(
    name: str, ours: dict[str, tuple[int, str]], theirs: dict[str, tuple[int, str]]
) -> Iterator[str]:
    """``ours``, ``theirs``: number and hash of the images of each class, before and now."""
    before, after = (sum(count for count, _ in each.values()) for each in (ours, theirs))
    if before != after:
        yield f"{name}: {before} images before, {after} now."
    shared = [key for key in ours if key in theirs]
    if counted := [key for key in shared if ours[key][0] != theirs[key][0]]:
        numbers = [f"{key} ({ours[key][0]} before, {theirs[key][0]} now)" for key in counted]
        yield f"{name}: more or fewer images in {first_few(numbers)}."
    edited = [key for key in shared if ours[key] != theirs[key] and key not in counted]
    if edited:
        yield f"{name}: other images, names or sizes in {first_few(edited)}."
    if ours == theirs:
        yield f"{name}: the images are in another order."


def _by_class(found: Fingerprint, name: str) -> dict[str, tuple[int, str]]:
    split = found["splits"][name]
    pairs = zip(split["counts"], split["hashes"], strict=True)
    return dict(zip(found["classes"], pairs, strict=True))
