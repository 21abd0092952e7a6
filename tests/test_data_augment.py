"""Augmentation is a pure function of (seed, epoch, view, sample), and does what its name says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from conadv.data import AUGMENTATIONS as NAMES
from conadv.data.augment import (
    CropFlip,
    build_augment,
    build_photo_augment,
    draw_integers,
    sample_keys,
)
from conadv.data.splits import Draw, PhotoSplit
from conadv.errors import ConadvError

RANDOM = [name for name in NAMES if name != "none"]


def pictures(count: int, channels: int = 3, size: int = 16) -> Tensor:
    """Smooth pictures without symmetry, so that every operation of a policy shows."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    phase = torch.rand(count, channels, 1, 1, generator=torch.Generator().manual_seed(1))
    return ((0.5 + 0.5 * torch.sin(5 * x + 9 * y * y + 6 * phase)) * 255).to(torch.uint8)


def photograph(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def test_keys_are_the_same_on_every_machine() -> None:
    # Red when: the hash, its constants or the key's path change (which changes every augmented run).
    keys = sample_keys(0, 0, "clean", torch.tensor([0, 1, 49_999]))
    assert keys.tolist() == [-4061753050277948786, -4048447066167926135, -8381359660446067702]


@given(st.integers(0, 2**62), st.integers(0, 1000), st.permutations(range(20)), st.integers(1, 19))
@settings(max_examples=40, deadline=None)
def test_a_key_does_not_depend_on_the_batch(
    seed: int, epoch: int, order: list[int], cut: int
) -> None:
    # Red when: keys count positions in the batch instead of sample indices.
    whole = sample_keys(seed, epoch, "clean", torch.arange(20))
    parts = [sample_keys(seed, epoch, "clean", part) for part in torch.tensor(order).split(cut)]
    assert torch.equal(torch.cat(parts), whole[order])


def test_seed_epoch_view_and_sample_all_change_the_key() -> None:
    # Red when: any of the four is left out of the key.
    indices = torch.arange(1000)
    keys = [
        sample_keys(*key, indices)
        for key in [(0, 0, "clean"), (1, 0, "clean"), (0, 1, "clean"), (0, 0, "aug")]
    ]
    assert len(torch.cat(keys).unique()) == 4000


def test_draws_are_uniform_and_slots_independent() -> None:
    # Red when: the slot is left out, or high bits are taken with an arithmetic shift.
    keys = sample_keys(0, 0, "clean", torch.arange(90_000))
    a, b = (draw_integers(keys, slot, 9) for slot in (0, 1))
    cells = torch.bincount(a * 9 + b, minlength=81).double()
    chi2 = ((cells - 90_000 / 81) ** 2 / (90_000 / 81)).sum()
    assert len(cells) == 81
    assert 40 < chi2 < 140  # 80 degrees of freedom: 99.9 % of 46..125


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_the_same_in_any_batch(name: str, channels: int) -> None:
    # Red when: PerSample does not seed per sample; CropFlip draws from the global generator.
    images, indices = pictures(40, channels), torch.arange(40)
    augment = build_augment(name, 16)
    whole = augment(images, sample_keys(5, 2, "clean", indices))
    assert whole.dtype == torch.uint8
    assert whole.shape == images.shape
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    for part in order.split(7):
        assert torch.equal(augment(images[part], sample_keys(5, 2, "clean", part)), whole[part])


@pytest.mark.parametrize("name", RANDOM)
def test_views_and_epochs_differ_and_the_input_stays(name: str) -> None:
    images, indices = pictures(64), torch.arange(64)
    before = images.clone()
    augment = build_augment(name, 16)
    a, b, c = (
        augment(images, sample_keys(0, *key, indices))
        for key in [(0, "clean"), (0, "second"), (1, "clean")]
    )
    assert torch.equal(images, before)
    for other in (b, c, images):
        assert (a != other).flatten(1).any(1).float().mean() > 0.8


@pytest.mark.parametrize("name", NAMES)
def test_the_callers_random_stream_is_left_alone(name: str) -> None:
    # Red when: fork_rng is removed from PerSample, or from either method of PhotoSplit.
    listing = SimpleNamespace(labels=torch.tensor([0]), read=lambda _: photograph())
    photos, index = PhotoSplit(listing, 16), torch.tensor([0])
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    build_augment(name, 16)(pictures(3), sample_keys(0, 0, "clean", torch.arange(3)))
    photos.views(index, {"clean": Draw(name, sample_keys(0, 0, "clean", index))})
    photos.readable(index, [])
    assert torch.equal(torch.rand(4), expected)


def test_crop_flip_is_a_shift_with_zeros_and_a_mirror() -> None:
    # Red when: top and left are swapped; the mirror is taken of the rows; the padding is not zero.
    images = pictures(50, size=8)
    keys = sample_keys(0, 0, "clean", torch.arange(50))
    top, left, flip = (
        draw_integers(keys, slot, high).tolist() for slot, high in [(0, 3), (1, 3), (2, 2)]
    )
    out = CropFlip(padding=1)(images, keys)
    for n in range(50):
        padded = np.zeros((3, 10, 10), np.uint8)
        padded[:, 1:9, 1:9] = images[n].numpy()
        expected = padded[:, top[n] : top[n] + 8, left[n] : left[n] + 8]
        assert np.array_equal(out[n].numpy(), expected[:, :, ::-1] if flip[n] else expected)
    assert set(top) == set(left) == {0, 1, 2}
    assert set(flip) == {0, 1}


def test_no_mirror_where_it_would_change_the_class() -> None:
    # Red when: CropFlip ignores flip.
    ramp = torch.arange(8, dtype=torch.uint8).mul(20).expand(30, 1, 8, 8)
    out = build_augment("basic", 8, flip=False)(ramp, sample_keys(0, 0, "clean", torch.arange(30)))
    inner = out[:, :, 1:-1, 1:-1].int()
    assert (inner.diff(dim=-1) == 20).all()
    mirrored = build_augment("basic", 8, flip=True)(
        ramp, sample_keys(0, 0, "clean", torch.arange(30))
    )
    assert (mirrored[:, :, 1:-1, 1:-1].int().diff(dim=-1) == -20).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_photograph_depends_on_its_key_alone(name: str) -> None:
    # Red when: Photo does not seed with the key.
    augment, photo = build_photo_augment(name, 16), photograph()
    first, again, other = (augment(photo, key) for key in (3, 3, 4))
    assert first.shape == (3, 16, 16)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "none")


def test_evaluation_resizes_the_short_side_and_takes_the_centre() -> None:
    # Red when: the short side goes to image_size instead of image_size * 256 / 224.
    photo = photograph(96, 64)
    expected = photo.resize((96 // 2, 64 // 2), Image.Resampling.BILINEAR).crop((10, 2, 38, 30))
    out = build_photo_augment("none", 28)(photo, 0)
    assert np.array_equal(out.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_an_unknown_name_is_an_error() -> None:
    for build in (build_augment, build_photo_augment):
        with pytest.raises(ConadvError, match="Did you mean 'randaugment'"):
            build("randaug", 32)
