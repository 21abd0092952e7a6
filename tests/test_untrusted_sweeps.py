"""The folder of a sweep that somebody else has made: nothing outside of it is written or read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conadv.cli.program import main
from conadv.errors import ConadvError
from conadv.report.study import load_sweep
from conadv.safe_io import inside
from conadv.sweep.folder import Folder

from .sweep_folder import write_sweep
from .test_sweep import run, write


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    # Red when: os.open gets no O_NOFOLLOW (the second sweep then holds somebody's file).
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.write_text("mine")
    out.mkdir()
    (out / ".sweep.json.lock").symlink_to(precious)
    with pytest.raises(ConadvError, match="Cannot write to"), Folder(out).locked("sweep.json"):
        pass
    assert precious.read_text() == "mine"


def test_a_lock_file_keeps_its_content(tmp_path: Path) -> None:
    # Red when: the lock is opened with O_TRUNC: a hard link may lead elsewhere as well.
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".sweep.json.lock").hardlink_to(tmp_path / "precious")
    folder = Folder(tmp_path)
    with (
        folder.locked("sweep.json"),
        pytest.raises(ConadvError, match="Another sweep"),
        folder.locked("sweep.json"),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    "name", [".sweep.json.lock", "runs", "sweep.json", "runs/lars-batch-20-lr-1-seed100"]
)
def test_a_sweep_refuses_links_in_its_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: the command does not call Folder.check.
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(outside)
    assert run(write(tmp_path), out, "--dry-run") == run(write(tmp_path), out) == 2
    assert "is a link" in capsys.readouterr().err
    assert not list(outside.iterdir())


@pytest.mark.parametrize(
    "path", ["../base", "/base", "runs/../../base", "", ".", "runs/away", "runs/away/run", "a\0b"]
)
def test_a_report_takes_no_run_from_elsewhere(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: inside joins the paths and looks at neither.
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    write_sweep(sweep, seeds=1, probes=False)
    (sweep / "runs" / "0-20-seed0").rename(tmp_path / "base")
    (sweep / "runs" / "away").symlink_to(tmp_path)
    document = json.loads((sweep / "sweep.json").read_text())
    document["cells"][0]["runs"] = [str(tmp_path) + path if path == "/base" else path]
    (sweep / "sweep.json").write_text(json.dumps(document))
    with pytest.raises(ConadvError, match="leads out of"):
        load_sweep(sweep)
    assert main(["report", str(sweep), "--out", str(tmp_path / "report.html")]) == 2
    assert "leads out of" in capsys.readouterr().err


def test_a_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    # Red when: inside resolves the path alone.
    (tmp_path / "real" / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert inside(tmp_path / "link", "runs/a") == tmp_path / "link" / "runs" / "a"
