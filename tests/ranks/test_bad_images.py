"""Images that cannot be read, on two ranks."""

from __future__ import annotations

from pathlib import Path

from conadv.training.loop import train
from conadv.training.record import read_lines

from ..test_bad_images import config, picture
from . import jobs
from .pool import Ranks


def test_two_ranks_list_what_either_of_them_left_out(two: Ranks, tmp_path: Path) -> None:
    # Red when: rank 0 writes its own findings only, or a stand-in depends on the rank.
    for split, count in {"train": 8, "test": 4}.items():
        for label, name in enumerate(("cat", "dog", "owl")):
            (folder := tmp_path / "data" / split / name).mkdir(parents=True)
            for n in range(count):
                picture(100 * label + n).save(folder / f"{n}.png")
    for name in (
        "train/cat/1.png",
        "train/dog/2.png",
        "train/owl/7.png",
        "test/cat/0.png",
        "test/owl/3.png",
    ):
        (tmp_path / "data" / name).write_bytes(b"")
    settings = config(tmp_path / "data", eval__batch_size=3, checkpoint__every_epochs=0.5)
    two.run(jobs.train_run, tmp_path / "two", settings)
    train(settings, tmp_path / "one")
    found = {}
    for name in ("one", "two"):
        lines = read_lines(tmp_path / name / "record.jsonl")
        found[name] = {
            (line["path"], line["reason"]) for line in lines if line["type"] == "bad_image"
        }
        assert len(found[name]) == sum(line["type"] == "bad_image" for line in lines) == 5
        assert [line["images"] for line in lines if line.get("split") == "test"][-1] == 10
    assert found["one"] == found["two"]
