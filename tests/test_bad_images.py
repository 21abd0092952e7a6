"""Files that cannot be read, and files that are read although they look odd; ``conadv check``."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conadv.cli.program import main
from conadv.config.resolve import resolve
from conadv.config.schema import Config, replace
from conadv.data.check import check_folder
from conadv.data.folder import scan_split
from conadv.data.images import BadImage, read_rgb, stand_ins
from conadv.errors import ConadvError
from conadv.training.data import load_data
from conadv.training.loop import train
from conadv.training.record import read_lines, truncate

CLASSES = ("cat", "dog", "owl")


def picture(number: int, pixels: int = 16) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(number).integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """root/{train,test}/{cat,dog,owl}/<n>.png: 8 and 4 images per class."""
    for s, (split, count) in enumerate({"train": 8, "test": 4}.items()):
        for label, name in enumerate(CLASSES):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for n in range(count):
                picture(1000 * s + 100 * label + n).save(
                    tmp_path / "data" / split / name / f"{n}.png"
                )
    return tmp_path / "data"


def config(root: Path, source: str = "folder", **changes: Any) -> Config:
    base = Config(steps=6, global_batch_size=12, micro_batch_size=6)
    data = {
        "source": source,
        "dir": root,
        "image_size": 8,
        "on_bad_image": "skip",
        "augment": "basic",
    }
    given = {f"data__{name}": value for name, value in data.items()} | changes
    return resolve(replace(base, model__width=4, eval__robust_images=4, **given))


# Damage: each makes a file that is no image at ``path``


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def truncated_jpeg(path: Path) -> None:
    picture(1, 64).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-500])


def zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("<html>404</html>")


def sixteen_bit(path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)


def vanished(path: Path) -> None:
    path.unlink()


def broken_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def looping_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def bomb(path: Path) -> None:
    """A PNG of a few hundred bytes that says it has 2.5 billion pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def small_bomb(path: Path) -> None:
    """Between Pillow's warning and its error."""
    Image.new("1", (10_000, 10_000)).save(path)


def postscript(path: Path) -> None:
    """What Pillow gives to Ghostscript, another program."""
    path.write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )


DAMAGE: dict[Callable[[Path], None], str] = {
    truncated: "truncated",
    truncated_jpeg: "truncated",
    zero_bytes: "it is empty",
    text: "not an image in a known format",
    sixteen_bit: "more than 8 bits",
    vanished: "No such file",
    broken_link: "No such file",
    looping_link: "symbolic links",
    pipe: "not a regular file",
    device: "not a regular file",
    bomb: "decompression bomb",
    small_bomb: "decompression bomb",
    postscript: "not an image in a known format",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
@pytest.mark.filterwarnings("ignore:Image size")
def test_damaged_files_are_named_with_the_reason(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    # Red when: no limit on pixels (small_bomb), any format is decoded (postscript), pipes are opened to wait for them.
    path = tmp_path / "a.png"
    picture(1).save(path)
    damage(path)
    with pytest.raises(
        BadImage, match=f"Cannot read the image {path}.*{DAMAGE[damage]}.*Replace"
    ) as caught:
        read_rgb(path)
    assert DAMAGE[damage] in caught.value.reason
    assert str(path) not in caught.value.reason


# What is read


def test_orientation_is_not_applied_and_of_frames_the_first_is_taken(tmp_path: Path) -> None:
    # Red when: ImageOps.exif_transpose is called, or the last frame is taken.
    image, other = picture(1), picture(2)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "rotated.png", exif=exif)
    image.save(tmp_path / "frames.png", save_all=True, append_images=[other])
    image.save(tmp_path / "frames.webp", save_all=True, append_images=[other], lossless=True)
    for name in ("rotated.png", "frames.png", "frames.webp"):
        assert np.array_equal(np.asarray(read_rgb(tmp_path / name)), np.asarray(image)), name


def test_of_an_animated_gif_the_first_frame_is_taken(tmp_path: Path) -> None:
    # Red when: the last frame is taken. Two flat colours, which a palette holds exactly.
    red, blue = (Image.new("RGB", (6, 4), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "frames.gif", save_all=True, append_images=[blue])
    assert getattr(Image.open(tmp_path / "frames.gif"), "n_frames", 1) == 2
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "frames.gif")), np.asarray(red))


def test_sixteen_bits_per_colour_become_the_high_byte(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    row = b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0, 0xFFFF, 0x00FF)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert np.asarray(read_rgb(tmp_path / "a.png")).ravel().tolist() == [
        0x12,
        0x56,
        0x9A,
        0,
        0xFF,
        0,
    ]


ODD = [
    b"line\nend.png",
    b"not\xffutf8.png",
    b"esc\x1b[2J.png",
    b" .png",
    "\u202eright.png".encode(),
    b"-x.PNG",
]


def test_any_file_name_is_read_and_printed_on_one_line(root: Path) -> None:
    # Red when: names are kept as text in UTF-8, or printed as they are.
    folder = os.fsencode(root / "train" / "cat")
    for number, name in enumerate(ODD):
        picture(500 + number).save(root / "x.png")
        os.rename(root / "x.png", os.path.join(folder, name))  # noqa: PTH104, PTH118
    listing = scan_split(root / "train")
    assert {os.fsencode(listing.path(i).name) for i in range(len(listing))} >= set(ODD)
    for index in range(len(listing)):
        read_rgb(listing.path(index))
    for name in ODD:
        Path(os.fsdecode(os.path.join(folder, name))).write_bytes(b"")  # noqa: PTH118
    report = check_folder(root)
    assert len(report.bad) == len(ODD)
    assert all(finding.path.isprintable() for finding in report.findings)
    assert sum(finding.kind == "odd name" for finding in report.findings) == 4
    with pytest.raises(ConadvError) as caught:
        load_data(config(root, "cifar10", data__on_bad_image="error"))
    assert str(caught.value).isprintable()


def test_links_to_folders_are_followed_and_those_in_a_circle_are_errors(root: Path) -> None:
    # Red when: walk does not compare with the folders above.
    (root / "elsewhere").mkdir()
    picture(7).save(root / "elsewhere" / "7.png")
    (root / "train" / "cat" / "more").symlink_to(root / "elsewhere")
    assert len(scan_split(root / "train")) == 25
    (root / "train" / "dog" / "self").symlink_to(root / "train")
    with pytest.raises(ConadvError, match="is a link to a folder that it lies in"):
        scan_split(root / "train")
    assert {f.kind for f in check_folder(root).bad} == {"looping link"}
    (root / "train" / "dog" / "self").unlink()
    looping_link(root / "train" / "dog" / "0.png")
    assert (
        len(scan_split(root / "train")) == 25
    )  # listed, and found to be unreadable when it is read


# Training


@pytest.mark.parametrize("source", ["folder", "cifar10"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_with_bad_images_is_a_run_with_copies_of_their_stand_ins(
    root: Path, tmp_path: Path, source: str, workers: int
) -> None:
    # Red when: the stand-in depends on the step, the worker or the view, or is of another class.
    damaged, repaired = (
        Path(shutil.copytree(root, tmp_path / "a")),
        Path(shutil.copytree(root, tmp_path / "b")),
    )
    listing = scan_split(root / "train")
    bad = [3, 4, 9]
    for index in bad:
        name = listing.path(index).relative_to(root)
        (damaged / name).write_bytes(b"")
        other = next(i for i in stand_ins(listing.labels, index) if i not in bad)
        shutil.copy(root / listing.path(other).relative_to(root), repaired / name)
    (damaged / "test" / "cat" / "1.png").write_bytes(b"")
    changes = {"data__num_workers": workers, "data__aug_view": "trivialaugment"}
    got = train(config(damaged, source, **changes), tmp_path / "out-a")
    want = train(config(repaired, source, **changes), tmp_path / "out-b")
    a, b = (
        [line for line in read_lines(tmp_path / out / "record.jsonl") if line["type"] == "step"]
        for out in ("out-a", "out-b")
    )
    assert [line["loss"] for line in a] == [line["loss"] for line in b]
    assert (got["bad_images"], want["bad_images"]) == (4, 0)
    lines = [
        line
        for line in read_lines(tmp_path / "out-a" / "record.jsonl")
        if line["type"] == "bad_image"
    ]
    names = {str(listing.path(index).relative_to(root)) for index in bad} | {"test/cat/1.png"}
    assert {line["path"] for line in lines} == names
    assert {line["reason"] for line in lines} == {"it is empty"}
    assert len(lines) == 4
    tests = [
        line
        for line in read_lines(tmp_path / "out-a" / "record.jsonl")
        if line.get("split") == "test"
    ]
    assert tests[-1]["images"] == 11  # a test image is left out, none is counted twice


def test_error_is_the_default_and_stops_the_run(root: Path, tmp_path: Path) -> None:
    truncated(root / "train" / "dog" / "3.png")
    assert Config().data.on_bad_image == "error"
    with pytest.raises(ConadvError, match=r"train/dog/3\.png: .*truncated.*on_bad_image skip"):
        train(config(root, data__on_bad_image="error"), tmp_path / "out")


def test_files_that_vanish_while_training_are_replaced_from_then_on(
    root: Path, tmp_path: Path
) -> None:
    # Red when: PhotoSplit._try lets the error through.
    class Remover:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: None

        def step(self, record: Any) -> None:
            if record.step == 2:
                (root / "train" / "owl" / "5.png").unlink()

    summary = train(config(root), tmp_path / "out", observer=Remover())
    lines = [
        line
        for line in read_lines(tmp_path / "out" / "record.jsonl")
        if line["type"] == "bad_image"
    ]
    assert [(line["path"], line["reason"]) for line in lines] == [
        ("train/owl/5.png", "No such file or directory")
    ]
    assert lines[0]["step"] >= 2
    assert summary["bad_images"] == 1


def test_a_class_without_any_readable_image_is_an_error(root: Path, tmp_path: Path) -> None:
    # Red when: stand_ins goes on for ever, or takes another class.
    for path in (root / "train" / "owl").iterdir():
        path.write_bytes(b"")
    for source in ("folder", "cifar10"):
        with pytest.raises(ConadvError, match=r"No image of class .* can be read"):
            train(config(root, source), tmp_path / source)


def test_a_resumed_run_lists_each_file_once(root: Path, tmp_path: Path) -> None:
    # Red when: known files are not taken from the record, or truncate keeps later ones.
    for name in ("0.png", "1.png", "2.png"):
        (root / "train" / "cat" / name).write_bytes(b"")
    settings = config(root, checkpoint__every_epochs=0.5, checkpoint__keep=9)
    train(settings, tmp_path / "whole")
    train(settings, tmp_path / "cut")
    for step in range(3, 7):
        (tmp_path / "cut" / "checkpoints" / f"step_{step:08d}.pt").unlink()
    (tmp_path / "cut" / "summary.json").unlink()
    summary = train(settings, tmp_path / "cut", resume=True)
    whole, cut = (
        [
            line
            for line in read_lines(tmp_path / name / "record.jsonl")
            if line["type"] == "bad_image"
        ]
        for name in ("whole", "cut")
    )
    assert whole == cut
    assert summary["bad_images"] == len(whole) == 3


def test_what_a_resumed_run_will_find_again_is_dropped(tmp_path: Path) -> None:
    # Red when: truncate keeps files that were found after the checkpoint.
    kinds = [
        {"type": "header", "steps": 9},
        *({"type": "bad_image", "step": n, "path": str(n)} for n in (-1, 1, 2, 3)),
    ]
    (tmp_path / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kinds))
    truncate(tmp_path / "record.jsonl", 2)
    assert [line["path"] for line in read_lines(tmp_path / "record.jsonl")[1:]] == ["-1", "1"]


def test_stand_ins_are_all_others_of_the_class_spread_evenly() -> None:
    # Red when: the image itself or another class is among them, or all begin with the same one.
    labels = torch.arange(3).repeat_interleave(40)
    for index in (0, 50, 119):
        found = list(stand_ins(labels, index))
        assert sorted(found) == [i for i in range(120) if i // 40 == index // 40 and i != index]
        assert found == list(stand_ins(labels, index))
    assert len({next(stand_ins(labels, index)) for index in range(40)}) > 15
    assert list(stand_ins(torch.tensor([0, 1]), 1)) == []


def test_validation_images_do_not_stand_in_for_training_images(root: Path) -> None:
    # Red when: stand-ins are chosen before validation images are held out.
    for source in ("folder", "cifar10"):
        for path in (root / "train" / "cat").iterdir():
            picture(1).save(path)
        data = load_data(config(root, source, data__validation_images=6))
        assert data.source.validation is not None
        mine = data.source.train.labels
        for index in range(len(mine)):
            assert all(other < len(mine) for other in stand_ins(mine, index))


def test_the_setting_has_no_effect_without_files() -> None:
    with pytest.raises(ConadvError, match="on_bad_image has no effect"):
        load_data(resolve(Config(steps=1, data={"on_bad_image": "skip"})))


# conadv check


def spoil_everything(root: Path) -> dict[str, str]:
    """path -> kind of everything that is wrong."""
    wrong: dict[str, str] = {}
    kinds = {
        truncated: "truncated",
        zero_bytes: "empty file",
        text: "not an image",
        sixteen_bit: "too many bits",
        broken_link: "broken link",
        looping_link: "broken link",
        pipe: "not a file",
    }
    for (damage, kind), n in zip(kinds.items(), range(8)):  # noqa: B905
        damage(root / "train" / "cat" / f"{n}.png")
        wrong[f"train/cat/{n}.png"] = kind
    bomb(root / "train" / "dog" / "0.png")
    wrong["train/dog/0.png"] = "too many pixels"
    (root / "train" / "dog" / "loop").symlink_to("..")
    (root / "train" / "bird").symlink_to("nowhere")
    wrong["train/bird"] = "broken link"
    (root / "train" / "emu").mkdir()
    wrong["train/emu"] = "empty class"
    return wrong


def test_check_finds_everything_and_says_so(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: one kind is not looked for; the exit code is that of a clean folder.
    wrong = spoil_everything(root)
    out = tmp_path / "findings.json"
    assert main(["check", str(root), "--json", str(out), "--show", "5"]) == 1
    shown = " ".join(
        capsys.readouterr().out.split()
    )  # lines wrap where the folder's name makes them
    report = json.loads(out.read_text())
    found = {(line["path"], line["kind"]) for line in report["findings"] if line["bad"]}
    assert wrong.items() <= found
    assert {kind for _, kind in found} - set(wrong.values()) == {
        "looping link",
        "class in one split",
    }
    assert f"{report['bad']} thing(s)" in shown
    assert f"and {report['bad'] - 5} more" in shown
    assert report["bad"] == len(found)


def test_check_of_a_clean_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).save(root / "train" / "cat" / "0.png", exif=exif)
    picture(1).convert("CMYK").save(root / "train" / "cat" / "c.jpg")
    picture(1).save(root / "train" / "cat" / "f.png", save_all=True, append_images=[picture(2)])
    (root / "train" / "cat" / "notes.txt").write_text("x")
    assert main(["check", str(root)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "38 images",
        "nothing wrong",
        "1 x EXIF orientation",
        "1 x mode CMYK",
        "1 x several frames",
    ):
        assert words in shown
    assert "1 x ignored file" in shown


def test_check_of_imagenet_as_it_unpacks(root: Path) -> None:
    # Red when: check reads the test folder without classes that training passes over, or lists every class of train as
    # missing in a flat val.
    (root / "test").rename(root / "val")
    (root / "test").mkdir()
    picture(1).save(root / "test" / "no label.png")
    assert check_folder(root).bad == []
    for path in list((root / "val").glob("*/*.png")):
        path.rename(root / "val" / f"{path.parent.name}-{path.name}")
        with suppress(OSError):
            path.parent.rmdir()
    (found,) = check_folder(root).bad
    assert (found.path, found.kind) == ("val", "not sorted by class")
    assert "valprep.sh" in found.reason


@pytest.mark.parametrize("args", [["nowhere"], [".", "--workers", "0"], ["."], []])
def test_check_of_what_is_no_image_folder_is_a_users_error(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: object = main(["check", *args])
    except SystemExit as stop:
        code = stop.code
    assert code == 2


@pytest.mark.filterwarnings("ignore:Image size")
def test_check_and_training_agree(root: Path, tmp_path: Path) -> None:
    # Red when: one of them accepts what the other refuses.
    for n, damage in enumerate((truncated, text, sixteen_bit, small_bomb)):
        damage(root / "train" / "dog" / f"{n}.png")
    summary = train(
        config(root, steps=2, global_batch_size=24, micro_batch_size=24), tmp_path / "out"
    )
    assert summary["bad_images"] == len(check_folder(root, workers=3).bad) == 4
