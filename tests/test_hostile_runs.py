"""A run or sweep that somebody else has made: nothing is executed, nothing leads out of it,
refusals are errors.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conadv import safe_io
from conadv.cli.analyze import read as read_analysis
from conadv.cli.program import main
from conadv.cli.progress import Live
from conadv.cli.watch import View
from conadv.config.files import dump_yaml
from conadv.config.resolve import resolve
from conadv.config.schema import Config, replace
from conadv.errors import ConadvError
from conadv.report import write_report
from conadv.report.comparison import read_sweep
from conadv.report.load import load_run as load_report_run
from conadv.sweep.cells import Run
from conadv.sweep.folder import Folder
from conadv.training import checkpoint
from conadv.training.export import load_plain_model
from conadv.training.loop import train
from conadv.training.resume import load_run
from conadv.training.run_dir import RunDir

from . import hostile
from .report_records import make_config, write_run, write_sweep

CPU = torch.device("cpu")
FIRST = "checkpoints/step_00000001.pt"


def tiny(**changes: Any) -> Config:
    base = Config(steps=1, global_batch_size=8)
    return resolve(replace(base, model__width=4, eval__robust_images=0, **changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    train(tiny(), path)
    return path


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def alarm() -> Iterator[None]:
    """Ends what waits for ever: the test then fails, and the others go on."""

    def ring(*_: object) -> None:
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def places(path: Path) -> dict[str, Callable[[], object]]:
    """Every place of the library that reads a checkpoint."""
    return {
        "load": lambda: checkpoint.load(path / FIRST, CPU),
        "load_newest": lambda: checkpoint.load_newest(path / "checkpoints", CPU),
        "export": lambda: load_plain_model(path),
        "eval": lambda: load_run(path, CPU),
        "resume": lambda: train(tiny(), path, resume=True),
    }


# Checkpoints


def test_the_live_payloads_run_when_they_are_unpickled(tmp_path: Path) -> None:
    # The control: if these did nothing, the refusals below would show nothing.
    assert len(hostile.LIVE) == 10
    for number, name in enumerate(hostile.LIVE):
        marker = tmp_path / f"ran{number}"
        with suppress(Exception):
            pickle.loads(hostile.PICKLES[name](marker))
        deadline = time.monotonic() + 60
        while not marker.exists() and time.monotonic() < deadline:  # Popen does not wait
            time.sleep(0.01)
        assert marker.exists(), name


@pytest.mark.parametrize("kind", hostile.files(Path("marker")))
def test_hostile_checkpoints_are_refused_everywhere(kind: str, copy: Path, tmp_path: Path) -> None:
    # Red when: check_archive is not called and torch.load gets weights_only=False.
    marker = tmp_path / "ran"
    (copy / FIRST).write_bytes(hostile.sealed(hostile.files(marker)[kind]))
    before = sorted(tmp_path.rglob("*"))
    for name, read in places(copy).items():
        with pytest.raises(ConadvError, match="checkpoint"):
            read()
        assert not marker.exists(), name
    assert sorted(tmp_path.rglob("*")) == before or sorted(tmp_path.rglob("*.damaged"))
    assert main(["export", str(copy)]) == 2


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:'torch.load' received")
@pytest.mark.parametrize("kind", hostile.files(Path("marker")))
def test_each_gate_alone_refuses_or_runs_nothing(kind: str, tmp_path: Path) -> None:
    # Red when: _archive_problem returns None at once; torch.load gets weights_only=False.
    marker, file = tmp_path / "ran", tmp_path / "file.pt"
    file.write_bytes(hostile.files(marker)[kind])
    with pytest.raises(ConadvError, match="Cannot read the checkpoint"):
        safe_io.check_archive(file)
    if kind != "bytes of any number":  # which the second gate would make
        with suppress(Exception):
            torch.load(file, weights_only=True)
    assert not marker.exists()


def test_what_torch_saves_passes_the_archive_check(tmp_path: Path) -> None:
    # Red when: an entry or a global of a genuine file is missing from the lists.
    tensors = {"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.ones(2, 0).bool()}
    values = {"c": [1, 2.5, "x", None, (True,)], "model": torch.nn.BatchNorm2d(3).state_dict()}
    torch.save({**tensors, **values}, tmp_path / "a.pt")
    safe_io.check_archive(tmp_path / "a.pt")


STATES: dict[str, Any] = {
    "no pending": {"model": {}},
    "model is a list": {"model": [], "optimizer": {}, "engine": {"version": 1, "pending": []}},
    "names are numbers": {"model": {1: torch.zeros(1)}, "optimizer": {1: 2}},
    "an average of something else": {"channels": 1, "class_names": ["a"], "ema": {"module.a": 1}},
    "huge": {"channels": 1, "class_names": ["a"], "model": {"x": torch.zeros(1).expand(2**40)}},
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("name", STATES)
def test_checkpoints_that_do_not_fit_are_errors(name: str, copy: Path) -> None:
    # Red when: restore or load_plain_model lets a KeyError, TypeError or RuntimeError through. What
    # is compared of each part: tests/test_validate.py.
    state = {"engine": {"version": 1, "pending": {}}, "best": None, "model": {}, **STATES[name]}
    checkpoint.save(copy / "checkpoints", 1, state, 1)
    for read in (lambda: load_plain_model(copy), lambda: load_run(copy, CPU)):
        with pytest.raises(
            ConadvError, match=r"step_00000001.pt does not fit the run's config|data have changed"
        ):
            read()


SAID: dict[str, tuple[Any, ...]] = {
    "channels": (0, -1, True, 1.0, "1", [1], None, 2**40, torch.tensor(1)),
    "image_size": (0, False, 8.0, "x", {}, None, 10**400, torch.tensor([8.0, 8.0])),
    "class_names": ([], "0123456789", list(range(10)), dict.fromkeys("0123456789"), None),
    "step": (10**12,),
}


@pytest.mark.parametrize("name", SAID)
def test_what_a_checkpoint_says_of_its_images_is_checked(name: str, copy: Path) -> None:
    # Red when: _Envelope lacks that field, or a step has no upper bound (export then ended with
    # exit code 70).
    genuine = checkpoint.load_newest(copy / "checkpoints", CPU)
    for value in SAID[name]:
        state = {**genuine, name: value}
        step = int(state.pop("step"))
        state["engine"] = {**state["engine"], "version": step}
        shutil.rmtree(copy / "checkpoints")
        checkpoint.save(copy / "checkpoints", step, state, 9)
        with pytest.raises(ConadvError, match="does not fit itself: its "):
            checkpoint.load_newest(copy / "checkpoints", CPU)
    for command in ("eval", "export", "export --format torch-export"):
        assert main([*command.split(), str(copy)]) == 2, command
    assert not (copy / "model.safetensors").exists()


def test_an_image_size_that_is_not_the_configs_is_an_error(copy: Path) -> None:
    # Red when: export believes the checkpoint, whatever the config says.
    (copy / "config.yaml").write_text(dump_yaml(tiny(data__image_size=16)))
    with pytest.raises(ConadvError, match="its images have 8 pixels, those of the config 16"):
        load_plain_model(copy)


# Links, pipes, folders


def _odd_file(kind: str, path: Path) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with (
            socket.socket(socket.AF_UNIX) as listening,
            tempfile.TemporaryDirectory(dir="/tmp") as short,
        ):
            # a socket's path has at most 107 bytes, pytest's folders may have more
            listening.bind(f"{short}/s")
            os.rename(f"{short}/s", path)  # noqa: PTH104


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
@pytest.mark.parametrize("place", ["checkpoints/step_00000002.pt", FIRST])
def test_a_checkpoint_that_is_no_file_is_refused(
    kind: str, place: str, copy: Path, alarm: None
) -> None:
    # Red when: verify opens whatever has the name (a pipe waits for ever).
    (copy / place).unlink(missing_ok=True)
    _odd_file(kind, copy / place)
    for name, read in places(copy).items():
        if name != "load" or place == FIRST:
            with pytest.raises(ConadvError, match=r"not a regular file|is a pipe, a socket or"):
                read()
    assert [main([command, str(copy)]) for command in ("eval", "export")] == [2, 2]


@pytest.mark.parametrize(
    "place", ["checkpoints/step_00000002.tmp", "record.jsonl", "model.tmp", "timeline"]
)
def test_pipes_among_the_files_of_a_run_are_refused(place: str, copy: Path, alarm: None) -> None:
    # Red when: refuse_links lets pipes be.
    (copy / place).unlink(missing_ok=True)
    os.mkfifo(copy / place)
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ConadvError, match=r"is a pipe, a socket or a device.*Remove it"):
            train(tiny(), copy, **how)
    for command in ("eval", "export", "timeline", "report", "watch"):
        extra = ["--out", str(copy.parent / "out" / "report.html")] if command == "report" else []
        assert main([command, str(copy), *extra]) == 2, command


def test_pipes_that_are_not_in_the_way_of_anybody(tmp_path: Path, alarm: None) -> None:
    # Red when: save writes into what has the temporary name; watch opens whatever lies there.
    os.mkfifo(tmp_path / "step_00000001.tmp")
    state = {"engine": {"version": 1, "pending": {}}, "best": None}
    assert checkpoint.load(checkpoint.save(tmp_path, 1, state, 1), CPU)["step"] == 1
    write_run(tmp_path / "runs" / "a", make_config(), accuracy=0.9)
    (tmp_path / "runs" / "a" / "record.jsonl").unlink()
    os.mkfifo(tmp_path / "runs" / "a" / "record.jsonl")
    assert main(["watch", str(tmp_path / "runs"), "--once"]) == 0


@pytest.mark.parametrize(
    "name", ["record.jsonl", "checkpoints", "config.yaml", "summary.json", "timeline", "model.tmp"]
)
def test_links_in_a_run_are_refused(name: str, copy: Path, tmp_path: Path) -> None:
    # Red when: refuse_links is not called by open, check or the report.
    outside = tmp_path / "outside"
    if (copy / name).exists():
        (copy / name).rename(outside)
    (copy / name).symlink_to(outside)
    content = outside.read_bytes() if outside.is_file() else None
    for read in (lambda: load_run(copy, CPU), lambda: load_report_run(copy)):
        with pytest.raises(ConadvError, match="is a link"):
            read()
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ConadvError, match="is a link"):
            train(tiny(), copy, **how)
    assert main(["export", str(copy)]) == main(["timeline", str(copy)]) == 2
    assert content is None or outside.read_bytes() == content


def test_a_folder_may_itself_be_a_link(run: Path, tmp_path: Path) -> None:
    # Red when: refuse_links looks at the folder too; inside resolves the path alone.
    (tmp_path / "link").symlink_to(run)
    assert RunDir(tmp_path / "link").open() == tiny()
    assert safe_io.inside(tmp_path / "link", "runs/a") == tmp_path / "link" / "runs" / "a"


@pytest.mark.parametrize(
    "path", ["../base", "/base", "runs/../../base", "", ".", "runs/away", "runs/away/run", "a\0b"]
)
def test_a_report_takes_no_run_from_elsewhere(path: str, tmp_path: Path) -> None:
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


# Documents, by each of their readers


def test_readers_check_the_documents_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: a reader takes what json.loads gives.
    run = tmp_path / "runs" / "a"
    write_run(run, make_config(), accuracy=0.9)
    (run / "analysis.json").write_text('{"loss": "x", "options": {}}')
    with pytest.raises(ConadvError, match=r"loss is 'x'.*conadv analyze"):
        read_analysis(run)
    (run / "analysis.json").unlink()
    (run / "summary.json").write_text('{"validation_accuracy": "x"}')
    with pytest.raises(ConadvError, match=r"validation_accuracy is 'x'.*Leave the run out"):
        load_report_run(run)
    monkeypatch.setattr("conadv.training.run_dir.RunDir.changes", lambda *_: [])
    with pytest.raises(ConadvError, match=r"validation_accuracy is 'x'.*Delete .* to run it again"):
        Folder(tmp_path).result(Run("a", None))  # type: ignore[arg-type]
    with (run / "record.jsonl").open("a") as file:
        file.write('{"type": "probe", "step": 1}\n')
    assert main(["staleness", str(run)]) == 2


@pytest.mark.parametrize("content", ['{"cells": 5}', "[]", "{", '{"cells": [1]}'])
def test_readers_check_a_sweep(content: str, tmp_path: Path) -> None:
    # Red when: a reader takes what json.loads gives.
    write_sweep(tmp_path, seeds=1, probes=False)
    (tmp_path / "sweep.json").write_text(content)
    for read in (lambda: read_sweep(tmp_path), lambda: View(tmp_path).planned()):
        with pytest.raises(ConadvError, match=r"sweep\.json"):
            read()
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out" / "report.html")]) == 2


# What is shown

SHOWN = {
    "eval": ([], False),
    "export": ([], True),
    "timeline": ([], True),
    "watch": (["--once"], False),
    "report": (["--out", "{0}/report.html"], True),
    "staleness": ([], True),
    "check": ([], True),
    "plan": ([], True),
    "train": (["--config", "{0}/config.yaml", "--out", "{0}/run", "--quiet"], True),
}
"""Command -> its options and whether it names the run."""


@pytest.mark.parametrize("command", SHOWN)
def test_a_path_is_shown_on_one_line_without_escape_codes(
    command: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Red when: the command, or its error, writes a path as it is.
    monkeypatch.chdir(tmp_path)
    odd = Path("a\x1b[31mb\nc")
    shutil.copytree(run, odd / "run")
    options, named = SHOWN[command]
    path = [] if command == "train" else [str(odd / "run")]
    code = main([command, *path, *(each.format(odd) for each in options)])
    assert code == (2 if command in ("staleness", "check", "plan", "train") else 0)
    shown = "".join(capsys.readouterr())
    assert "\x1b" not in shown
    assert "b\nc" not in shown
    assert (r"a\x1b[31mb\nc" in shown) == named


def test_a_recipe_with_brackets_is_no_markup() -> None:
    # Red when: the bar of the terminal reads a title as markup (rich then raises MarkupError).
    shown = Live()
    shown.start("[/x] \x1b[2J", 0, 3)
    shown.finish()


ATTACKS = (
    "<script>alert(1)</script>",
    "</style><script>x</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='x",
    "{{ 7 * 7 }}{% raw %}",
    "<!-- --><svg/onload=x>",
    "&lt;b&gt;",
    "$\\frac{1}{2}$ <b>",
    "]]></svg><script>x</script>",
    "\u202e\x1b[2J\0`\n&é",
    "\udcff",
)


def report_page(folder: Path, text: str) -> str:
    """The page of a run in which every text that somebody can choose is ``text``."""
    run = folder / "run"
    run.mkdir(parents=True)
    config = {**tiny().model_dump(mode="json"), "recipe": text, "seed": 3}
    config["model"]["name"] = config["data"]["dir"] = config["x" + text] = text
    header = {"time": text, "version": text, "versions": {text: text}, "steps": 2, "recipe": text}
    header |= {"machine": {"device": text, text: text}, "git": {"commit": text, "dirty": True}}
    step = {"type": "step", "epoch": 1.0, "loss": 1.0, "phases": {"x" + text: 0.1}}
    lines: list[dict[str, Any]] = [
        {"type": "header", **header, "config": config},
        *({**step, "step": i} for i in range(2)),
        {"type": "eval", "step": 2, "epoch": 1.0, "split": "test", "loss": 1.0, "accuracy": 0.5},
        {"type": "error", "step": 2, "message": text},
    ]
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (run / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = folder / "page" / "report.html"
    write_report([run], out, names={str(run): text}, title=text, command=text)
    return out.read_text(encoding="utf-8")


def elements(page: str) -> set[tuple[str, tuple[str, ...]]]:
    """Every kind of element with the names of its attributes."""
    found: set[tuple[str, tuple[str, ...]]] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.add((tag, tuple(sorted(name for name, _ in attrs))))

        def handle_comment(self, data: str) -> None:
            found.add(("comment", ()))

    Reader().feed(page)
    return found


def test_no_text_of_a_run_becomes_markup_of_the_report(tmp_path: Path) -> None:
    # Red when: autoescape is off in the report's templates.
    plain = elements(report_page(tmp_path / "plain", "word"))
    for number, text in enumerate(ATTACKS):
        assert elements(report_page(tmp_path / f"hostile{number}", text)) <= plain, text
