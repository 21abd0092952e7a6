"""Augmentation, mixup and cutmix: pure functions of their keys, which do what their names say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conadv.data import AUGMENTATIONS
from conadv.data.augment import (
    build_augment,
    build_photo_augment,
    crop_flip,
    draw_integers,
    sample_keys,
)
from conadv.data.images import Files
from conadv.data.mix import Mix
from conadv.data.splits import Draw, PhotoSplit
from conadv.errors import ConadvError

from .data_cases import picture


def pictures(count: int, channels: int = 3, size: int = 16) -> Tensor:
    """Smooth pictures without symmetry, so that every operation of a policy shows."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    phase = torch.rand(count, channels, 1, 1, generator=torch.Generator().manual_seed(1))
    return ((0.5 + 0.5 * torch.sin(5 * x + 9 * y * y + 6 * phase)) * 255).to(torch.uint8)


# ---- keys and draws


def test_keys_are_the_same_on_every_machine() -> None:
    # Red when: the hash, its constants or the key's path change (which changes every augmented
    # run).
    keys = sample_keys(0, 0, "clean", torch.tensor([0, 1, 49_999]))
    assert keys.tolist() == [-4061753050277948786, -4048447066167926135, -8381359660446067702]


def test_seed_epoch_view_and_sample_all_change_the_key() -> None:
    # Red when: any of the four is left out of the key, or keys count positions in the batch.
    paths = [(0, 0, "clean"), (1, 0, "clean"), (0, 1, "clean"), (0, 0, "aug")]
    keys = [sample_keys(*path, torch.arange(1000)) for path in paths]
    assert len(torch.cat(keys).unique()) == 4000
    assert torch.equal(sample_keys(*paths[1], torch.tensor([7, 3])), keys[1][[7, 3]])


def test_draws_are_uniform_and_slots_independent() -> None:
    # Red when: the slot is left out, or high bits are taken with an arithmetic shift.
    keys = sample_keys(0, 0, "clean", torch.arange(90_000))
    a, b = (draw_integers(keys, slot, 9) for slot in (0, 1))
    cells = torch.bincount(a * 9 + b, minlength=81).double()
    chi2 = ((cells - 90_000 / 81) ** 2 / (90_000 / 81)).sum()
    assert len(cells) == 81
    assert 40 < chi2 < 140  # 80 degrees of freedom: 99.9 % of 46..125


# ---- what holds for every augmentation


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_depends_on_its_keys_alone(name: str) -> None:
    # Red when: a policy is not seeded per sample, draws from the global generator, or writes into
    # its input.
    images, indices = pictures(30), torch.arange(30)
    before = images.clone()
    augment = build_augment(name, 16)
    whole, second, later = (
        augment(images, sample_keys(5, epoch, view, indices))
        for epoch, view in ((2, "clean"), (2, "second"), (3, "clean"))
    )
    assert (whole.dtype, whole.shape) == (torch.uint8, images.shape)
    assert torch.equal(images, before)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    for part in order.split(7):
        assert torch.equal(augment(images[part], sample_keys(5, 2, "clean", part)), whole[part])
    for other in (second, later, images):
        changed = (whole != other).flatten(1).any(1).float().mean()
        assert changed > 0.7 if name != "none" else changed == 0
    photo, photo_augment = picture(0, 60, 40), build_photo_augment(name, 16)
    first, again, third = (photo_augment(photo, key) for key in (3, 3, 4))
    assert (first.dtype, first.shape) == (torch.uint8, (3, 16, 16))
    assert torch.equal(first, again)
    assert torch.equal(first, third) == (name == "none")


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_callers_random_stream_is_left_alone(name: str, tmp_path: Path) -> None:
    # Red when: fork_rng is removed from build_augment, or from either method of PhotoSplit.
    picture(0, 60, 40).save(tmp_path / "0.png")
    one = {"keys": np.array([b"0.png"]), "labels": torch.tensor([0]), "class_names": ("cat",)}
    photos = PhotoSplit(tmp_path, "", **one, store=Files(tmp_path), image_size=16)
    index = torch.tensor([0])
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    build_augment(name, 16)(pictures(3), sample_keys(0, 0, "clean", torch.arange(3)))
    photos.views(index, {"clean": Draw(name, sample_keys(0, 0, "clean", index))})
    photos.readable(index, [])
    assert torch.equal(torch.rand(4), expected)


def test_crop_flip_is_a_shift_with_zeros_and_a_mirror() -> None:
    # Red when: top and left are swapped; the mirror is taken of the rows, or where it changes the
    # class; the padding is not zero.
    images = pictures(50, size=8)
    keys = sample_keys(0, 0, "clean", torch.arange(50))
    top, left, mirrored = (
        draw_integers(keys, slot, high).tolist() for slot, high in [(0, 3), (1, 3), (2, 2)]
    )
    for flip in (True, False):
        out = crop_flip(images, keys, padding=1, flip=flip)
        for n in range(50):
            padded = np.zeros((3, 10, 10), np.uint8)
            padded[:, 1:9, 1:9] = images[n].numpy()
            want = padded[:, top[n] : top[n] + 8, left[n] : left[n] + 8]
            assert np.array_equal(
                out[n].numpy(), want[:, :, ::-1] if flip and mirrored[n] else want
            )
    assert (set(top), set(left), set(mirrored)) == ({0, 1, 2}, {0, 1, 2}, {0, 1})


def test_evaluation_resizes_the_short_side_and_takes_the_centre() -> None:
    # Red when: the short side goes to image_size instead of image_size * 256 / 224.
    photo = picture(0, 96, 64)
    expected = photo.resize((96 // 2, 64 // 2), Image.Resampling.BILINEAR).crop((10, 2, 38, 30))
    out = build_photo_augment("none", 28)(photo, 0)
    assert np.array_equal(out.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ConadvError, match="Did you mean 'randaugment'"):
        build_augment("randaug", 32)


# ---- mixup and cutmix


def partner_share(y_NK: Tensor, y_N: Tensor) -> Tensor:
    """The share of the partner (the image before) by the labels."""
    return 1 - y_NK[torch.arange(len(y_N)), y_N]


def test_mixup_is_its_formula_in_every_view() -> None:
    # Red when: each view draws a share of its own; images are truncated, not rounded.
    views, y_N = {"clean": pictures(6), "aug": pictures(6).flip(-1)}, torch.arange(6) % 5
    mixed, y_NK = Mix(0.4, 0.0, 6, seed=3)(views, y_N, step=4, index=1)
    assert y_NK.sum(1).tolist() == pytest.approx([1] * 6)
    for name, x in views.items():
        lam = 1 - partner_share(y_NK, y_N)[1:2].view(1, 1, 1)
        want = (lam * x.float() + (1 - lam) * x.float().roll(1, 0)).round()
        assert (mixed[name].float() - want).abs().max() <= 1  # a tie may fall to either side
        assert ((mixed[name].float() - want).abs() > 0).float().mean() < 0.05
        assert mixed[name].dtype == torch.uint8
        assert not torch.equal(mixed[name], x)


def test_cutmix_pastes_one_box_of_the_share_that_the_labels_say() -> None:
    # Red when: views get boxes of their own, or the label's share is not the box's.
    shares = set()
    views, y_N = {"clean": pictures(6), "second": pictures(6).flip(-1)}, torch.arange(6) % 5
    for step in range(8):
        mixed, y_NK = Mix(0.0, 1.0, 6, seed=3)(views, y_N, step, 0)
        boxes = []
        for name, x in views.items():
            own, other = mixed[name] == x, mixed[name] == x.roll(1, 0)
            assert (own | other).all()
            boxes.append((~own).any(1).any(0))
        assert torch.equal(boxes[0], boxes[1])
        share = boxes[0].float().mean()
        assert partner_share(y_NK, y_N)[1:5] == pytest.approx(share.expand(4), abs=0.02)
        shares.add(round(share.item(), 3))
    assert len(shares) > 3
