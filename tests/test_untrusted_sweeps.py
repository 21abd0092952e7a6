"""The folder of a sweep that somebody else has made: no run outside of it is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conadv.cli.program import main
from conadv.errors import ConadvError
from conadv.report.comparison import read_sweep
from conadv.safe_io import inside

from .report_records import write_sweep


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
        read_sweep(sweep)
    assert main(["report", str(sweep), "--out", str(tmp_path / "report.html")]) == 2
    assert "leads out of" in capsys.readouterr().err


def test_a_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    # Red when: inside resolves the path alone.
    (tmp_path / "real" / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert inside(tmp_path / "link", "runs/a") == tmp_path / "link" / "runs" / "a"
