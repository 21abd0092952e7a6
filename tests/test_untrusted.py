"""What somebody else may have written: nothing is executed, nothing leads out of a folder, refusals are errors."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conadv import safe_io
from conadv.cli.program import main
from conadv.cli.progress import Live
from conadv.config.files import dump_yaml, load_yaml, parse
from conadv.config.resolve import resolve
from conadv.config.schema import Config, replace
from conadv.errors import ConadvError, printable
from conadv.report.load import load_run as load_report_run
from conadv.safe_io import write_atomic
from conadv.training import checkpoint
from conadv.training.export import load_plain_model
from conadv.training.loop import train
from conadv.training.record import read_lines
from conadv.training.resume import load_run
from conadv.training.run_dir import RunDir

from . import hostile

CPU = torch.device("cpu")


def tiny(**changes: Any) -> Config:
    return resolve(
        replace(
            Config(steps=1, global_batch_size=8), model__width=4, eval__robust_images=0, **changes
        )
    )


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
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# Pickles and archives


def test_the_live_payloads_run_when_they_are_unpickled(tmp_path: Path) -> None:
    # The control: if these did nothing, the refusals below would show nothing.
    assert len(hostile.LIVE) >= 20
    for number, name in enumerate(hostile.LIVE):
        marker = tmp_path / f"ran{number}"
        with suppress(Exception):
            pickle.loads(hostile.PICKLES[name](marker))
        deadline = time.monotonic() + 5
        while not marker.exists() and time.monotonic() < deadline:  # Popen does not wait
            time.sleep(0.01)
        assert marker.exists(), name


def places(path: Path) -> dict[str, Any]:
    """Every place of the library that reads a checkpoint."""
    folder, file = path / "checkpoints", path / "checkpoints" / "step_00000001.pt"
    return {
        "load": lambda: checkpoint.load(file, CPU),
        "load_newest": lambda: checkpoint.load_newest(folder, CPU),
        "export": lambda: load_plain_model(path),
        "eval": lambda: load_run(path, CPU),
        "resume": lambda: train(tiny(), path, resume=True),
    }


@pytest.mark.parametrize("kind", hostile.files(Path("marker")))
def test_hostile_checkpoints_are_refused_everywhere(kind: str, copy: Path, tmp_path: Path) -> None:
    # Red when: check_archive is not called and torch.load gets weights_only=False.
    marker = tmp_path / "ran"
    (copy / "checkpoints" / "step_00000001.pt").write_bytes(
        hostile.sealed(hostile.files(marker)[kind])
    )
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
    # Red when: _problem or _pickle_problem returns None at once; torch.load gets weights_only=False.
    marker, file = tmp_path / "ran", tmp_path / "file.pt"
    file.write_bytes(hostile.files(marker)[kind])
    with pytest.raises(ConadvError, match="Cannot read the checkpoint"):
        safe_io.check_archive(file)
    with suppress(Exception):
        torch.load(file, weights_only=True)
    assert not marker.exists()


def test_what_torch_saves_passes_the_archive_check(tmp_path: Path) -> None:
    # Red when: an entry or a global of a genuine file is missing from the lists.
    values = {
        "a": torch.zeros(3, dtype=torch.bfloat16),
        "b": torch.ones(2, 0).bool(),
        "c": [1, 2.5, "x", None, (True,)],
    }
    torch.save({**values, "model": torch.nn.BatchNorm2d(3).state_dict()}, tmp_path / "a.pt")
    safe_io.check_archive(tmp_path / "a.pt")


STATES: dict[str, Any] = {
    "no pending": {"model": {}},
    "model is a list": {"model": [], "optimizer": {}, "engine": {"version": 1, "pending": []}},
    "wrong shapes": {"model": {"conv.weight": torch.zeros(1)}, "optimizer": {}},
    "names are numbers": {
        "model": {1: torch.zeros(1)},
        "optimizer": {1: 2},
        "engine": {"version": 1, "pending": {}},
    },
    "an average of something else": {
        "channels": 1,
        "class_names": ["a"],
        "ema": {"module.a": 1},
        "model": {},
    },
    "class names": {"channels": -3, "class_names": 7, "model": {}},
    "many classes": {
        "channels": 1,
        "class_names": [],
        "model": {"x": torch.zeros(1).expand(2**40)},
    },
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("name", STATES)
def test_checkpoints_that_do_not_fit_are_errors(name: str, copy: Path) -> None:
    # Red when: restore or load_plain_model lets a KeyError, TypeError or RuntimeError through.
    state = {"engine": {"version": 1, "pending": {}}, "best": None, **STATES[name]}
    checkpoint.save(copy / "checkpoints", 1, state, 1)
    for read in (lambda: load_plain_model(copy), lambda: load_run(copy, CPU)):
        with pytest.raises(
            ConadvError, match=r"step_00000001.pt does not fit (the run's config|itself)"
        ):
            read()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("channels", value)
            for value in (0, -1, True, 1.0, "1", [1], None, 2**40, torch.tensor(1))
        ),
        *(
            ("image_size", value)
            for value in (0, -8, False, 8.0, "x", {}, None, 10**400, torch.tensor([8.0, 8.0]))
        ),
        *(
            ("class_names", value)
            for value in ([], "0123456789", list(range(10)), dict.fromkeys("0123456789"), None)
        ),
        ("step", 10**12),
    ],
)
def test_what_a_checkpoint_says_of_its_images_is_checked(
    name: str, value: object, copy: Path
) -> None:
    # Red when: _images_problem returns None, or is_count has no upper bound (export then ended with exit code 70).
    state = {**checkpoint.load_newest(copy / "checkpoints", CPU), name: value}
    if name == "step":
        state["engine"]["version"] = value
    step = int(state.pop("step"))
    checkpoint.save(copy / "checkpoints", step, state, 9)
    for command in ("eval", "export", "export --format torch-export"):
        assert main([*command.split(), str(copy)]) == 2, command
    with pytest.raises(ConadvError, match="does not fit itself: its "):
        checkpoint.load_newest(copy / "checkpoints", CPU)
    assert not (copy / "model.safetensors").exists()


def test_an_image_size_that_is_not_the_configs_is_an_error(copy: Path) -> None:
    # Red when: export believes the checkpoint, whatever the config says.
    (copy / "config.yaml").write_text(dump_yaml(tiny(data__image_size=16)))
    with pytest.raises(ConadvError, match="its images have 8 pixels, those of the config 16"):
        load_plain_model(copy)


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
            listening.bind(
                f"{short}/s"
            )  # a socket's path has at most 107 bytes, pytest's folders may have more
            os.rename(f"{short}/s", path)  # noqa: PTH104


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
@pytest.mark.parametrize("place", ["checkpoints/step_00000002.pt", "checkpoints/step_00000001.pt"])
def test_a_checkpoint_that_is_no_file_is_refused(
    kind: str, place: str, copy: Path, alarm: None
) -> None:
    # Red when: verify opens whatever has the name (a pipe waits for ever).
    (copy / place).unlink(missing_ok=True)
    _odd_file(kind, copy / place)
    for name, read in places(copy).items():
        if (name, place) != ("load", "checkpoints/step_00000002.pt"):
            with pytest.raises(
                ConadvError, match=r"not a regular file|is a pipe, a socket or a device"
            ):
                read()
    fast = [
        "--images",
        "8",
        "--landscape",
        "none",
        "--eigenvalues",
        "0",
        "--probes",
        "0",
        "--robust-images",
        "0",
    ]
    for command in (["eval"], ["export"], ["analyze", *fast]):
        assert main([*command, str(copy)]) == 2, command


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


def test_a_pipe_in_the_way_of_a_checkpoint_is_replaced(tmp_path: Path, alarm: None) -> None:
    # Red when: save writes into what has the temporary name.
    os.mkfifo(tmp_path / "step_00000001.tmp")
    state = {"engine": {"version": 1, "pending": {}}, "best": None}
    assert checkpoint.load(checkpoint.save(tmp_path, 1, state, 1), CPU)["step"] == 1


def _set(state: Any, path: tuple[Any, ...], value: object) -> None:
    for key in path[:-1]:
        state = state[key]
    state[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("ema",), {"module.a": 1}),
        (("engine", "guard", "in_a_row"), float("inf")),
        (("engine", "guard"), None),
        (("optimizer", "param_groups", 0, "lr"), "x"),
        (("optimizer", "param_groups", 0, "momentum"), [1]),
        (("optimizer", "param_groups", 0, "momentum"), torch.ones(2)),
    ],
)
def test_values_that_do_not_fit_are_errors(
    path: tuple[Any, ...], value: object, copy: Path
) -> None:
    # Red when: giving catches no OverflowError, load_run takes the average outside of it, or the optimizer's settings
    # are not compared.
    state = checkpoint.load_newest(copy / "checkpoints", CPU)
    _set(state, path, value)
    checkpoint.save(copy / "checkpoints", state["step"], state, 1)
    with pytest.raises(ConadvError, match=r"step_\d{8}.pt does not fit the run's config"):
        load_run(copy, CPU)


def test_waiting_images_that_do_not_fit_end_a_resume(copy: Path) -> None:
    # Red when: the images are dealt out outside of giving. Whoever only reads the run does not look at them.
    state = checkpoint.load_newest(copy / "checkpoints", CPU)
    _set(state, ("engine", "pending"), {"2": {"images": 3}})
    checkpoint.save(copy / "checkpoints", state["step"], state, 1)
    assert len(load_run(copy, CPU).step.pending) == 0
    with pytest.raises(ConadvError, match=r"step_\d{8}.pt does not fit the run's config"):
        train(RunDir(copy).open(), copy, resume=True)


# Configs

BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
YAMLS = {
    "python object": "method: !!python/object/apply:os.system [touch MARKER]",
    "python name": "method: !!python/name:os.system",
    "python module": "!!python/object/new:os.system ['touch MARKER']",
    "alias bomb": BOMB,
    "recursive alias": "&a [*a]",
    "merge": "a: &a {seed: 1}\ndata:\n  <<: *a",
    "deep": "[" * 5000,
    "deep mapping": "".join(" " * i + f"k{i}:\n" for i in range(100)),
    "duplicate": "seed: 1\nseed: 2",
    "date": "seed: 2024-99-99",
    "huge number": f"seed: {'9' * 5000}",
    "binary": "seed: !!binary x",
    "unhashable": "? [1]\n: 2",
    "set": "!!set {a}",
    "two documents": "seed: 1\n---\nseed: 2",
    "list": "[1]",
    "nothing": "",
    "tab": "\t- x",
    "nul": "seed: \0",
    "large": "# " + "x" * 2**20,
    "infinity": "optim: {lr: .inf}",
    "long value": f"method: {'x' * 100_000}",
    "long key": f"{'k' * 100_000}: 1",
    "empty int": 'steps: !!int ""',
    "empty float": 'epochs: !!float ""',
    "sign": "steps: !!int +",
    "no bool": "steps: !!bool x",
    "no timestamp": "steps: !!timestamp x",
    "list as int": "steps: !!int [1]",
    "hexadecimal": f"steps: 0x{'f' * 5000}",
    "octal": f"steps: 0{'7' * 5000}",
    "binary number": f"steps: 0b{'1' * 5000}",
    "21 digits": "data: {mean: [100000000000000000000]}",
    "base 60": "steps: 1:30",
    "base 60 float": "epochs: 1:30.5",
    "long float": f"epochs: 0.{'1' * 5000}",
    "number as key": "foo: {0xffff: 1}",
    "long number as key": f"? 0x{'f' * 5000}\n: 1",
    "date as key": "2024-01-01: 3",
    "truth as key": "on: 1",
    "nothing as key": "~: 1",
    "set of numbers": "steps: !!set {1, 2}",
}
MANY: dict[
    str, str
] = {  # of a size that took more than 10 s of processor time, or more values than are allowed
    "keys twice": "{" + ",".join(f"a{i % 10}: 1" for i in range(25_000)) + "}",
    "many keys": "{" + ",".join(f"a{i}: 1" for i in range(12_000)) + ", a1: 2}",
    "many merges": "{" + "<<: {}," * 12_000 + "}",
    "base 60": "steps: 1" + ":1" * 120_000,
    "list": "[" + "0," * 120_000 + "]",
    "tags": "- !!str a\n" * 25_000,
    "escapes": 'a: "' + "\\x41" * 65_000 + '"',
}


@pytest.mark.parametrize("name", YAMLS)
def test_hostile_configs_are_short_errors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: yaml.unsafe_load; no check of aliases, depth, duplicates, size.
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(YAMLS[name].replace("MARKER", str(tmp_path / "ran")))
    begin = time.monotonic()
    with pytest.raises(ConadvError) as caught:
        load_yaml(file)
    assert time.monotonic() - begin < 2
    assert len(str(caught.value)) < 2000
    assert ("anchors" in str(caught.value)) == (name in ("alias bomb", "recursive alias", "merge"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", MANY)
def test_no_config_takes_long(name: str, tmp_path: Path) -> None:
    # Red when: each key is looked for in a list of those before it, or values are not counted (list); without a limit
    # on numbers, of base 60: they take the square of their length.
    file = tmp_path / "config.yaml"
    file.write_text(MANY[name])
    assert file.stat().st_size <= safe_io.YAML_BYTES
    begin = time.process_time()
    with pytest.raises(ConadvError):
        load_yaml(file)
    assert time.process_time() - begin < 5


def test_a_yaml_number_may_have_20_digits() -> None:
    # Red when: 20 digits are refused, or 21 in a key or a list are not.
    assert (
        safe_io.parse_yaml("a: [99999999999999999999, -0x10, 0b11, 1_000, .inf, 1.5e+3]")["a"][0]
        == 10**20 - 1
    )
    with pytest.raises(yaml.YAMLError, match=r"'100000000000000000000' has more than 20 digits"):
        safe_io.parse_yaml("- -1\n- 100000000000000000000")


@pytest.mark.parametrize(
    "text", ['!!int ""', '!!float ""', "!!bool x", "1:30", "0x" + "f" * 5000, "{1: 2}"]
)
def test_values_of_a_tag_that_they_do_not_fit_are_errors_of_the_command_line(
    text: str, run: Path, tmp_path: Path
) -> None:
    # Red when: parse_yaml catches no LookupError or TypeError, or keys that are not text pass: exit code 70.
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(tiny()))
    options = [
        "--model.name",
        "torchvision:resnet18",
        "--model.args",
        f"a={text[:900]}",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["train", "--config", str(config), *options]) == 2
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"steps: {text}")
    assert main(["sweep", str(spec), "--out", str(tmp_path / "sweep")]) == 2
    mine = Path(shutil.copytree(run, tmp_path / "run"))
    (mine / "config.yaml").write_text(f"{config.read_text()}\nfoo: {text}\n")
    assert main(["report", str(mine), "--out", str(tmp_path / "report.html")]) == 0


@pytest.mark.parametrize("kind", ["folder", "pipe", "latin-1"])
def test_a_config_that_is_no_text_file_is_an_error(kind: str, tmp_path: Path) -> None:
    # Red when: read_text opens a named pipe, which waits for ever.
    path = tmp_path / "config.yaml"
    {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "latin-1": lambda: path.write_bytes(b"recipe: \xe9"),
    }[kind]()
    with pytest.raises(ConadvError, match="Cannot read the config"):
        load_yaml(path)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.sampled_from([*Config.model_fields, *(f"{n}_" for n in ("seed", "data"))])


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, plain, max_size=6))
def test_any_plain_values_are_a_config_or_an_error(values: dict[str, Any]) -> None:
    # Red when: explain or resolve raises something else.
    with suppress(ConadvError):
        assert (
            parse(yaml.safe_load(dump_yaml(config := resolve(parse(values, "x")))), "x") == config
        )


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: raw.decode("latin1")))
def test_any_text_is_yaml_or_an_error(text: str) -> None:
    with suppress(yaml.YAMLError):
        safe_io.parse_yaml(text)


@pytest.mark.parametrize(
    "text",
    ["1e999999999", "1e400", "1/1e400", "9" * 5000, "1/0", "nan", "inf", "", "0x1", "1_0/3 /"],
)
def test_numbers_that_are_none_are_quick_errors(text: str) -> None:
    # Red when: Fraction gets any text (it would write out a billion digits), or an OverflowError gets through.
    begin = time.monotonic()
    with pytest.raises(ConadvError, match="attack"):
        parse({"attack": {"eps": text}}, "config")
    assert time.monotonic() - begin < 1
    assert parse({"attack": {"eps": " 8 / 255"}}, "config").attack.eps == 8 / 255


def test_a_config_from_somebody_else_does_not_download(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: --config keeps data.download.
    file = tmp_path / "config.yaml"
    file.write_text(
        dump_yaml(
            Config(
                steps=1, data={"source": "fashion-mnist", "dir": tmp_path / "x", "download": True}
            )
        )
    )
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "run")]) == 2
    assert "--download" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


# Paths


@pytest.mark.parametrize(
    "recipe", ["../../escaped", "/tmp/escaped", "..", "a/b", "a\n", "", "-x", "a" * 300]
)
def test_a_recipe_name_does_not_lead_out_of_runs(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: _default_out takes any name.
    folder = tmp_path / "one" / "two"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    (folder / "config.yaml").write_text(dump_yaml(tiny(recipe=recipe)))
    assert main(["train", "--config", "config.yaml"]) == 2
    assert "Give --out" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == [folder.parent, folder, folder / "config.yaml"]


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


def test_a_run_directory_may_itself_be_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    assert RunDir(tmp_path / "link").open() == tiny()


def test_a_link_in_place_of_a_temporary_file_is_not_written_through(tmp_path: Path) -> None:
    # Red when: write_atomic opens with "w" what lies there.
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".a.json.tmp").symlink_to(tmp_path / "precious")
    write_atomic(tmp_path / "a.json", "new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "new"


# Records

LINES = {
    "list": b"[]\n",
    "number": b"1\n",
    "no type": b'{"step": 1}\n',
    "type is a list": b'{"type": []}\n',
    "NaN": b'{"type": "eval", "step": 1, "loss": NaN}\n',
    "infinity": b'{"type": "eval", "step": 1, "loss": 1e999}\n',
    "deep": b"[" * 100_000 + b"\n",
    "digits": b'{"type": "step", "step": ' + b"9" * 10_000 + b"}\n",
    "not UTF-8": b'{"type": "\xff"}\n',
    "step is text": b'{"type": "step", "step": "x"}\n',
    "no step": b'{"type": "eval"}\n',
    "nul": b"\0\n",
}


@pytest.mark.parametrize("name", LINES)
def test_hostile_records_are_errors_with_the_line(name: str, tmp_path: Path) -> None:
    # Red when: parse_json accepts NaN or 1e999, or _checked is not called.
    path = tmp_path / "record.jsonl"
    path.write_bytes(b'{"type": "header", "steps": 3}\n' + LINES[name])
    with pytest.raises(ConadvError, match="line 2 is not JSON of a record") as caught:
        read_lines(path)
    assert len(str(caught.value)) < 1000
    path.write_bytes(path.read_bytes()[:-1])  # the same, cut off
    with suppress(ConadvError):
        assert read_lines(path) == [{"type": "header", "steps": 3}]


def test_a_line_without_end_is_an_error_and_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red when: read_lines has no limit.
    monkeypatch.setattr(safe_io, "LINE_BYTES", 1000)
    (tmp_path / "record.jsonl").write_bytes(b'{"type": "' + b"x" * 2000)
    with pytest.raises(ConadvError, match="line 1 is longer than 1,000 bytes"):
        read_lines(tmp_path / "record.jsonl")


def test_separators_of_lines_within_text_do_not_end_a_line(tmp_path: Path) -> None:
    # Red when: lines are split as text.
    path = tmp_path / "record.jsonl"
    path.write_text('{"type": "x", "m": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert read_lines(path)[0]["m"] == "a\u2028b\x85c"


# Text for people


@settings(max_examples=200)
@given(st.text(st.characters(), max_size=40))
def test_printable_text_is_one_line_that_any_output_takes(text: str) -> None:
    # Red when: printable leaves surrogates or control characters.
    shown = printable(text)
    assert shown.isprintable()
    shown.encode("utf-8")
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


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
    code = main(
        [
            command,
            *([] if command == "train" else [str(odd / "run")]),
            *(each.format(odd) for each in options),
        ]
    )
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


def test_profiles_are_checked(tmp_path: Path) -> None:
    from conadv.planning.profile import load

    file = tmp_path / "profile.json"
    for content in (
        b"[]",
        b"{",
        b"\xff",
        b'{"format": NaN}',
        b"[" * 100_000,
        json.dumps({"x" * 10**5: 1}).encode(),
    ):
        file.write_bytes(content)
        with pytest.raises(ConadvError, match="profile"):
            load(file)


# The report

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
    "\u202e\x1b[2J\0",
    "\udcff",
)


def report_page(folder: Path, text: str) -> str:
    """The page of a run in which every text that somebody can choose is ``text``."""
    from conadv.report import write_report

    run = folder / "run"
    run.mkdir(parents=True, exist_ok=True)
    config = {**json.loads(json.dumps(tiny().model_dump(mode="json"))), "recipe": text, "seed": 3}
    config["model"]["name"] = config["data"]["dir"] = config["x" + text] = text
    header = {
        "time": text,
        "version": text,
        "versions": {text: text},
        "machine": {"device": text, text: text},
    }
    header |= {"git": {"commit": text, "dirty": True}, "steps": 2, "recipe": text, "config": config}
    lines: list[dict[str, Any]] = [{"type": "header", **header}]
    lines += [
        {"type": "step", "step": i, "epoch": 1.0, "loss": 1.0, "phases": {"x" + text: 0.1}}
        for i in range(2)
    ]
    lines += [
        {"type": "eval", "step": 2, "epoch": 1.0, "split": "test", "loss": 1.0, "accuracy": 0.5}
    ]
    lines += [{"type": "error", "step": 2, "message": text}]
    (run / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (run / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = folder / "page" / "report.html"
    write_report([run], out, names={str(run): text}, title=text, command=text)
    return out.read_text(encoding="utf-8")


def elements(page: str) -> set[tuple[str, tuple[str, ...]]]:
    """Every kind of element with the names of its attributes."""
    from html.parser import HTMLParser

    found: set[tuple[str, tuple[str, ...]]] = set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.add((tag, tuple(sorted(name for name, _ in attrs))))

        def handle_comment(self, data: str) -> None:
            found.add(("comment", ()))

    Reader().feed(page)
    return found


@pytest.mark.parametrize("text", ATTACKS)
def test_no_text_of_a_run_becomes_markup_of_the_report(text: str, tmp_path: Path) -> None:
    # Red when: autoescape is off in render_html.
    plain = elements(report_page(tmp_path / "plain", "word"))
    assert elements(report_page(tmp_path / "hostile", text)) <= plain


@settings(max_examples=10, deadline=None)
@given(
    # An arm's name must not be blank: that has its own error.
    st.lists(
        st.sampled_from([*ATTACKS, "<", ">", '"', "'", "&", "\n", "`", "é"]), min_size=1, max_size=4
    )
    .map("".join)
    .filter(str.strip)
)
def test_no_mixture_of_them_does_either(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        assert elements(report_page(Path(name) / "a", text)) <= elements(
            report_page(Path(name) / "b", "word")
        )
