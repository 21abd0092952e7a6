"""Randomness as a pure function of what it is for.

Nothing in conadv draws from a stream whose state depends on what ran before. Every draw is keyed by
a seed and a path of names and numbers, such as ``(seed, "attack", step, micro_batch)``, so that two
processes agree without talking, executors may reorder work, and a resumed run continues bit for bit
without saving generator states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *path: int | str) -> int:
    """A 63-bit seed for ``path`` under ``seed``, the same on every platform."""
    text = "/".join(map(str, (seed, *path)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(device: torch.device | str, seed: int, *path: int | str) -> torch.Generator:
    """A fresh generator on ``device`` seeded by :func:`derive`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *path))


@contextmanager
def scope(device: torch.device, seed: int, *path: int | str) -> Iterator[None]:
    """Seed torch's global generators (dropout, stochastic depth) inside the block.

    The caller's own random stream is the same whether the block ran or not.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(derive(seed, *path))
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(derive(seed, *path))
        yield
