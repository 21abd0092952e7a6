"""Files that cannot be read, and files that are read although they look odd; ``conadv check``."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conadv import ConadvError
from conadv.cli.program import main
from conadv.config.resolve import resolve
from conadv.config.schema import Config, replace
from conadv.data.check import Finding, check_folder
from conadv.data.folder import scan_split
from conadv.data.images import BadImage, Files
from conadv.data.loader import Data
from conadv.data.source import build_source
from conadv.data.splits import PhotoSplit, stand_ins
from conadv.training.loop import train
from conadv.training.record import read_lines

from .data_cases import image_folder, picture


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "data")


def config(root: Path, source: str = "folder", **changes: Any) -> Config:
    base = Config(steps=6, global_batch_size=12, micro_batch_size=6)
    data = {"source": source, "dir": root, "image_size": 8, "on_bad_image": "skip"}
    given = {f"data__{name}": value for name, value in {**data, "augment": "basic"}.items()}
    return resolve(replace(base, model__width=4, eval__robust_images=4, **{**given, **changes}))


def read_rgb(path: Path) -> Image.Image:
    key, labels = np.array([os.fsencode(path.name)]), torch.tensor([0])
    above, name = path.parent.parent, path.parent.name
    return PhotoSplit(above, name, key, labels, ("cat",), Files(path.parent)).read(0)


def bad_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "record.jsonl") if line["type"] == "bad_image"]


# ---- damage: each makes a file that is not an image at ``path``


def png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def truncated_jpeg(path: Path) -> None:
    picture(1, 64, 64).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-500])


def linked(target: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return damage


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "truncated"),
    "truncated jpeg": (truncated_jpeg, "truncated"),
    "no bytes": (lambda path: path.write_bytes(b""), "it is empty"),
    "text": (lambda path: path.write_text("<html>404</html>"), "not an image in a known format"),
    "Pillow gives it to Ghostscript": (lambda path: path.write_text(POSTSCRIPT), "not an image"),
    "16 bits": (
        lambda path: Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path),
        "more than 8 bits",
    ),
    "vanished": (Path.unlink, "No such file"),
    "broken link": (linked("nowhere"), "No such file"),
    "looping link": (linked("0.png"), "symbolic links"),
    "pipe": (pipe, "not a regular file"),
    "device": (linked("/dev/zero"), "not a regular file"),
    "2.5 billion pixels": (
        lambda path: path.write_bytes(png(50_000, 50_000, 8, bytes(100_000))),
        "decompression bomb",
    ),
    "between Pillow's warning and its error": (
        lambda path: Image.new("1", (10_000, 10_000)).save(path),
        "decompression bomb",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.filterwarnings("ignore:Image size")
def test_damaged_files_are_named_with_the_reason_and_found_by_check(name: str, root: Path) -> None:
    # Red when: there is no limit on pixels, any format is decoded, pipes are opened to wait for
    # them; check accepts what training refuses.
    damage, reason = DAMAGE[name]
    path = root / "train" / "cat" / "0.png"
    damage(path)
    message = f"Cannot read the image {path}.*{reason}.*Replace"
    with pytest.raises(BadImage, match=message) as caught:
        read_rgb(path)
    assert str(path) not in caught.value.reason
    train = build_source("folder", dir=root).train
    if name == "vanished":  # after the scan
        return
    with pytest.raises(BadImage, match=message):
        train.readable(torch.tensor([0]))
    assert check_folder(root) == (36, [Finding("train/cat/0.png", caught.value.reason)])


# ---- what is read


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
@pytest.mark.filterwarnings("error")
def test_any_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 4, axis=1))
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    transparency = {"transparency": b"\x00\x80"} if mode == "P" else {}
    grey.convert(mode).save(path, **transparency)
    pixels = np.asarray(read_rgb(path)).astype(int)
    assert pixels.shape == (2, 4, 3)
    assert np.abs(pixels - np.array([0, 255])[:, None, None]).max() <= 3


def test_orientation_is_not_applied_and_of_frames_the_first_is_taken(tmp_path: Path) -> None:
    # Red when: ImageOps.exif_transpose is called, or the last frame is taken.
    image, frames = picture(1), {"save_all": True, "append_images": [picture(2)]}
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "rotated.png", exif=exif)
    image.save(tmp_path / "frames.png", **frames)
    image.save(tmp_path / "frames.webp", lossless=True, **frames)
    red = Image.new("RGB", (6, 4), "red")  # flat colours, which a palette holds exactly
    red.save(tmp_path / "f.gif", save_all=True, append_images=[Image.new("RGB", (6, 4), "blue")])
    for name in ("rotated.png", "frames.png", "frames.webp"):
        assert np.array_equal(np.asarray(read_rgb(tmp_path / name)), np.asarray(image)), name
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "f.gif")), np.asarray(red))


def test_sixteen_bits_per_colour_become_the_high_byte(tmp_path: Path) -> None:
    row = b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0, 0xFFFF, 0x00FF)
    (tmp_path / "a.png").write_bytes(png(2, 1, 16, row))
    found = np.asarray(read_rgb(tmp_path / "a.png")).ravel().tolist()
    assert found == [0x12, 0x56, 0x9A, 0, 0xFF, 0]


ODD = [
    b"a\nb.png",
    b"not\xffutf8.png",
    b"esc\x1b[2J.png",
    b" .png",
    b"\xe2\x80\xaeright.png",
    b"-x.PNG",
]


def test_any_file_name_is_read_and_printed_on_one_line(root: Path) -> None:
    # Red when: names are kept as text in UTF-8, or printed as they are.
    folder = root / "train" / "cat"
    for number, name in enumerate(ODD):
        picture(500 + number).save(root / "x.png")
        (root / "x.png").rename(folder / os.fsdecode(name))
    photos = scan_split(root / "train")
    assert {key.rpartition(b"/")[2] for key in photos.keys[:14]} >= set(ODD)
    build_source("folder", dir=root).train.readable(torch.arange(14))
    for name in ODD:
        (folder / os.fsdecode(name)).write_bytes(b"")
    _, findings = check_folder(root)
    assert len(findings) == len(ODD)
    assert all(finding.path.isprintable() for finding in findings)
    with pytest.raises(ConadvError) as caught:
        build_source("cifar10", dir=root)
    assert str(caught.value).isprintable()


# ---- training


@pytest.mark.parametrize(("source", "workers"), [("folder", 2), ("folder", 0), ("cifar10", 0)])
def test_a_run_with_bad_images_is_a_run_with_copies_of_their_stand_ins(
    root: Path, tmp_path: Path, source: str, workers: int
) -> None:
    # Red when: the stand-in depends on the step, the worker or the view, or is of another class; a
    # test image is counted twice.
    damaged, repaired = (Path(shutil.copytree(root, tmp_path / name)) for name in "ab")
    photos, bad = scan_split(root / "train"), [3, 4, 9]
    for index in bad:
        other = next(i for i in stand_ins(photos.labels, index) if i not in bad)
        (damaged / photos.name(index)).write_bytes(b"")
        shutil.copy(root / photos.name(other), repaired / photos.name(index))
    (damaged / "test" / "cat" / "1.png").write_bytes(b"")
    changes = {"data__num_workers": workers, "data__aug_view": "trivialaugment"}
    got = train(config(damaged, source, **changes), tmp_path / "out-a")
    want = train(config(repaired, source, **changes), tmp_path / "out-b")
    records = [read_lines(tmp_path / out / "record.jsonl") for out in ("out-a", "out-b")]
    a, b = ([line["loss"] for line in lines if line["type"] == "step"] for lines in records)
    assert a == b
    assert (got["bad_images"], want["bad_images"]) == (4, 0)
    found = {(line["path"], line["reason"]) for line in bad_lines(tmp_path / "out-a")}
    names = {photos.name(index) for index in bad} | {"test/cat/1.png"}
    assert found == {(name, "it is empty") for name in names}
    assert [line for line in records[0] if line.get("split") == "test"][-1]["images"] == 11


def test_error_is_the_default_and_stops_the_run(root: Path, tmp_path: Path) -> None:
    # Red when: _Caught lets the error through (its message begins with the worker's traceback).
    (root / "train" / "dog" / "3.png").write_bytes(b"x")
    assert Config().data.on_bad_image == "error"
    changes = {"data__on_bad_image": "error", "data__num_workers": 2}
    with pytest.raises(
        ConadvError, match=r"^Cannot.*train/dog/3\.png: [^\n]*on_bad_image skip[^\n]*$"
    ):
        train(config(root, **changes), tmp_path / "out")


def test_files_that_vanish_are_listed_once_even_by_a_resumed_run(
    root: Path, tmp_path: Path
) -> None:
    # Red when: PhotoSplit lets the error through, known files are not taken from the record, or
    # later ones stay in it.
    class Remover:
        def __getattr__(self, name: str) -> Any:
            return lambda *args: None

        def step(self, record: Any) -> None:
            if record.step == 2:
                (root / "train" / "owl" / "5.png").unlink(missing_ok=True)

    settings = config(root, checkpoint__every_epochs=0.5, checkpoint__keep=9)
    train(settings, tmp_path / "whole", observer=Remover())
    (first,) = bad_lines(tmp_path / "whole")
    assert (first["path"], first["reason"]) == ("train/owl/5.png", "No such file or directory")
    assert first["step"] >= 2
    for name in ("cat", "dog"):
        (root / "train" / name / "0.png").write_bytes(b"")
    train(settings, tmp_path / "cut")
    whole = bad_lines(tmp_path / "cut")
    for step in range(3, 7):
        (tmp_path / "cut" / "checkpoints" / f"step_{step:08d}.pt").unlink()
    (tmp_path / "cut" / "summary.json").unlink()
    summary = train(settings, tmp_path / "cut", resume=True)
    assert bad_lines(tmp_path / "cut") == whole
    assert summary["bad_images"] == len(whole) == 2


def test_a_class_without_any_readable_image_is_an_error(root: Path) -> None:
    # Red when: stand_ins goes on for ever, or takes another class.
    for path in (root / "train" / "owl").iterdir():
        path.write_bytes(b"")
    found = build_source("folder", dir=root, image_size=8, on_bad_image="skip")
    data = Data(found, global_batch_size=24, micro_batch_size=24, on_bad_image="skip")
    message = r"No image of its class can be read.*train/owl/"
    with pytest.raises(ConadvError, match=message):
        list(data.train_batches(0, 1))
    with pytest.raises(ConadvError, match=message):
        build_source("cifar10", dir=root, on_bad_image="skip")


def test_stand_ins_are_all_others_of_the_class_spread_evenly() -> None:
    # Red when: the image itself or another class is among them, or all begin with the same one.
    labels = torch.arange(3).repeat_interleave(40)
    for index in (0, 50, 119):
        found = list(stand_ins(labels, index))
        assert sorted(found) == [i for i in range(120) if i // 40 == index // 40 and i != index]
        assert found == list(stand_ins(labels, index))
    assert len({next(stand_ins(labels, index)) for index in range(40)}) > 15
    assert list(stand_ins(torch.tensor([0, 1]), 1)) == []


@pytest.mark.parametrize("source", ["folder", "cifar10"])
def test_an_image_held_out_is_no_stand_in_and_has_none(root: Path, source: str) -> None:
    # Red when: the split into training and validation comes after stand-ins were chosen.
    wanted: dict[str, Any] = {"dir": root, "validation_images": 6, "on_bad_image": "skip"}
    photos: Any = build_source("folder", **wanted)
    for split in (photos.train, photos.validation):
        (root / split.name(2)).write_bytes(b"")
    data = Data(
        build_source(source, **wanted),
        global_batch_size=18,
        micro_batch_size=18,
        on_bad_image="skip",
    )
    held = torch.cat([x for x, _ in data.eval_batches("validation", None, 9)])
    batch = next(data.train_batches(0, 1)).micro[0].views["clean"].flatten(1)
    assert len(held) == 5
    assert len(batch.unique(dim=0)) == 17  # one image and its copy
    assert len(torch.cat([batch, held.flatten(1)]).unique(dim=0)) == 22
    assert len(data.bad) == 2


# ---- conadv check


def test_check_finds_everything_and_says_so(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: it stops at the first, or the exit code is that of a clean folder.
    assert main(["check", str(root)]) == 0
    assert "36 images" in capsys.readouterr().out
    for n, name in enumerate(("truncated", "text", "pipe", "broken link")):
        DAMAGE[name][0](root / "train" / "cat" / f"{n}.png")
    out = tmp_path / "findings.json"
    assert main(["check", str(root), "--json", str(out), "--show", "3"]) == 1
    shown = capsys.readouterr().out
    report = json.loads(out.read_text())
    paths = [line["path"] for line in report["findings"]]
    assert paths == [f"train/cat/{n}.png" for n in range(4)]
    assert report["bad"] == 4
    assert "4 cannot be read" in " ".join(shown.split())  # lines wrap where the name makes them
    assert "and 1 more" in shown


@pytest.mark.parametrize("args", [["nowhere"], [".", "--workers", "0"], ["."], []])
def test_check_without_an_image_folder_is_a_users_error(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: object = main(["check", *args])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
