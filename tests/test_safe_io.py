"""Text that somebody else has written: YAML, JSON, documents, records and names are values, or
short errors.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conadv import safe_io
from conadv.cli.program import main
from conadv.config.files import dump_yaml, load_yaml, parse
from conadv.config.resolve import resolve
from conadv.config.schema import Config
from conadv.errors import ConadvError, printable
from conadv.training import documents
from conadv.training.record import read_lines

from .report_records import analysis, probe_lines, write_sweep

LARGE = "1" + "0" * 400
CONFIG = Config(steps=1, global_batch_size=8)

# YAML

BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
YAMLS = {
    "python object": "method: !!python/object/apply:os.system [touch MARKER]",
    "python module": "!!python/object/new:os.system ['touch MARKER']",
    "alias bomb": BOMB,
    "merge of an alias": "a: &a {seed: 1}\ndata:\n  <<: *a",
    "deep": "[" * 5000,
    "duplicate": "seed: 1\nseed: 2",
    "date": "seed: 2024-99-99",
    "huge number": f"seed: {'9' * 5000}",
    "binary": "seed: !!binary x",
    "set": "!!set {a}",
    "nothing": "",
    "large": "# " + "x" * 2**20,
    "long value": f"method: {'x' * 100_000}",
    "long key": f"{'k' * 100_000}: 1",
    "empty int": 'steps: !!int ""',
    "no bool": "steps: !!bool x",
    "hexadecimal": f"steps: 0x{'f' * 5000}",
    "21 digits": "data: {mean: [100000000000000000000]}",
    "base 60": "steps: 1:30",
    "long float": f"epochs: 0.{'1' * 5000}",
    "number as key": "foo: {0xffff: 1}",
    "date as key": "2024-01-01: 3",
}
MANY: dict[str, str] = {  # they took more than 10 s, or have more values than are allowed
    "keys twice": "{" + ",".join(f"a{i % 10}: 1" for i in range(25_000)) + "}",
    "many keys": "{" + ",".join(f"a{i}: 1" for i in range(12_000)) + ", a1: 2}",
    "many merges": "{" + "<<: {}," * 12_000 + "}",
    "base 60": "steps: 1" + ":1" * 120_000,
    "list": "[" + "0," * 120_000 + "]",
    "tags": "- !!str a\n" * 25_000,
}


@pytest.mark.parametrize("name", [*YAMLS, *MANY])
def test_hostile_configs_are_short_and_quick_errors(name: str, tmp_path: Path) -> None:
    # Red when: yaml.unsafe_load; no check of aliases, depth, duplicates, size; each key is looked
    # for in a list of those before it; without a limit on numbers of base 60, which take the square
    # of their length.
    file = tmp_path / "config.yaml"
    file.write_text((YAMLS | MANY)[name].replace("MARKER", str(tmp_path / "ran")))
    begin = time.process_time()
    with pytest.raises(ConadvError) as caught:
        load_yaml(file)
    assert time.process_time() - begin < 5
    assert len(str(caught.value)) < 2000
    assert ("anchors" in str(caught.value)) == ("alias" in name)
    assert not (tmp_path / "ran").exists()


def test_a_yaml_number_may_have_20_digits() -> None:
    # Red when: 20 digits are refused, or 21 in a list are not.
    text = "a: [99999999999999999999, -0x10, 0b11, 1_000, .inf, 1.5e+3]"
    assert safe_io.parse_yaml(text)["a"][0] == 10**20 - 1
    with pytest.raises(yaml.YAMLError, match=r"'100000000000000000000' has more than 20 digits"):
        safe_io.parse_yaml("- -1\n- 100000000000000000000")


@pytest.mark.parametrize("text", ['!!int ""', "!!bool x", "1:30", "0x" + "f" * 5000, "{1: 2}"])
def test_the_command_line_reads_yaml_in_the_same_way(text: str, tmp_path: Path) -> None:
    # Red when: parse_yaml lets another error than YAMLError through, or keys that are not text
    # pass: exit code 70.
    args = ["--model.name", "torchvision:resnet18", "--model.args", f"a={text[:900]}"]
    out = ["--out", str(tmp_path / "out")]
    assert main(["train", "digits", "--steps", "1", *args, *out]) == 2
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"steps: {text}")
    assert main(["sweep", str(spec), *out]) == 2


@pytest.mark.parametrize("kind", ["folder", "pipe", "latin-1"])
def test_a_config_that_is_no_text_file_is_an_error(kind: str, tmp_path: Path) -> None:
    # Red when: read_text opens a named pipe, which waits for ever.
    path = tmp_path / "config.yaml"
    make = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "latin-1": lambda: path.write_bytes(b"recipe: \xe9"),
    }
    make[kind]()
    with pytest.raises(ConadvError, match="Cannot read the config"):
        load_yaml(path)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.sampled_from([*Config.model_fields, "seed_", "data_"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(names, plain, max_size=6))
def test_any_plain_values_are_a_config_or_an_error(values: dict[str, Any]) -> None:
    # Red when: explain or resolve raises something else.
    with suppress(ConadvError):
        found = resolve(parse(values, "x"))
        assert parse(yaml.safe_load(dump_yaml(found)), "x") == found


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: raw.decode("latin1")))
def test_any_text_is_yaml_or_an_error(text: str) -> None:
    with suppress(yaml.YAMLError):
        safe_io.parse_yaml(text)


@pytest.mark.parametrize(
    "text",
    ["1e999999999", "1e400", "1/1e400", "9" * 5000, "1/0", "nan", "inf", "", "0x1", "1_0/3 /"],
)
def test_numbers_that_are_none_are_errors(text: str) -> None:
    # Red when: Fraction gets any text (it would write out a billion digits), or an OverflowError
    # gets through.
    with pytest.raises(ConadvError, match="attack"):
        parse({"attack": {"eps": text}}, "config")


def test_a_config_from_somebody_else_does_not_download(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: --config keeps data.download.
    data = {"source": "fashion-mnist", "dir": tmp_path / "x", "download": True}
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(Config(steps=1, data=data)))
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "run")]) == 2
    assert "--download" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("recipe", ["../../escaped", "/tmp/escaped", "..", "a\n", "", "a" * 300])
def test_a_recipe_name_does_not_lead_out_of_runs(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Red when: the default run directory takes any name.
    folder = tmp_path / "one" / "two"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    (folder / "config.yaml").write_text(dump_yaml(CONFIG.model_copy(update={"recipe": recipe})))
    assert main(["train", "--config", "config.yaml"]) == 2
    assert "Give --out" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == [folder.parent, folder, folder / "config.yaml"]


# JSON


@pytest.mark.parametrize(
    "text", [LARGE, "-" + LARGE, "1" * 21, "[" * 33 + "]" * 33, '{"a":' * 33 + "1" + "}" * 33]
)
def test_numbers_and_nesting_that_readers_could_not_take_are_no_json(text: str) -> None:
    # Red when: parse_json calls json.loads without _whole, or does not look at the depth.
    with pytest.raises(ValueError, match=r"more than 20 digits|too deeply"):
        safe_io.parse_json(text)


def test_every_number_and_depth_that_conadv_writes_is_json() -> None:
    # Red when: a limit is below what a seed may be, or below the depth of a list of lists.
    values = [2**64 - 1, -(2**63), 0.1, [[[1], [2]]] * 50]
    assert safe_io.parse_json(json.dumps(values)) == values
    assert safe_io.parse_json("[" * 32 + "]" * 32) == json.loads("[" * 32 + "]" * 32)


LINES = {
    "list": b"[]",
    "no type": b'{"step": 1}',
    "type is a list": b'{"type": []}',
    "NaN": b'{"type": "eval", "step": 1, "loss": NaN}',
    "infinity": b'{"type": "eval", "step": 1, "loss": 1e999}',
    "deep": b"[" * 100_000,
    "digits": b'{"type": "step", "step": ' + b"9" * 10_000 + b"}",
    "digits elsewhere": b'{"type": "step", "step": 1, "lr": ' + b"9" * 400 + b"}",
    "not UTF-8": b'{"type": "\xff"}',
    "step is text": b'{"type": "step", "step": "x"}',
    "step is true": b'{"type": "step", "step": true}',
    "no step": b'{"type": "eval"}',
    "nul": b"\0",
}


@pytest.mark.parametrize("name", LINES)
def test_hostile_records_are_errors_with_the_line(name: str, tmp_path: Path) -> None:
    # Red when: parse_json accepts NaN or 1e999, or LINES is not looked at.
    path = tmp_path / "record.jsonl"
    path.write_bytes(b'{"type": "header", "steps": 3}\n' + LINES[name] + b"\n")
    with pytest.raises(ConadvError, match="line 2 is not JSON of a record") as caught:
        read_lines(path)
    assert len(str(caught.value)) < 1000
    path.write_bytes(path.read_bytes()[:-1])  # the same, cut off
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


# Documents


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder, seeds=1, probes=False)
    return folder


CELL = ("cells", 0)
ODD: dict[type[safe_io.Document], list[tuple[tuple[Any, ...], Any]]] = {
    documents.Summary: [
        (("ranks",), "x"),
        (("test_accuracy",), "1"),
        (("test_accuracy",), 2.0),
        (("seconds",), -1.0),
        (("step_seconds_median",), 1e300),
    ],
    documents.Sweep: [
        (("cells",), 5),
        (("cells",), [1]),
        (("failed",), [{"run": "runs/x", "error": "e", "diverged": 3}]),
        (("spec", "title"), []),
        (("spec", "tune", "seeds"), 5),
        ((*CELL, "arm"), None),
        ((*CELL, "settings", "global_batch_size"), {}),
        ((*CELL, "runs"), [1]),
        ((*CELL, "trials", 0, "validation"), ["0"]),
    ],
    documents.Analysis: [
        (("hessian", "eigenvalues"), 5),
        (("sharpness", "sam", "value"), "x"),
        (("loss",), "x"),
    ],
    documents.Probe: [(("tau",), "x"), (("loss_increase",), None)],
}


@pytest.mark.parametrize("kind", ODD)
def test_a_document_with_values_that_cannot_be_is_an_error(
    kind: type[safe_io.Document], sweep: Path, tmp_path: Path
) -> None:
    # Red when: a model is not strict, a range is missing, or Line does not compare lengths.
    genuine = {
        documents.Summary: {"ranks": 1, "test_accuracy": 0.5},
        documents.Sweep: json.loads((sweep / "sweep.json").read_text()),
        documents.Analysis: analysis(3.0),
        documents.Probe: probe_lines(5)[0],
    }[kind]
    file = tmp_path / "file.json"
    file.write_text(json.dumps(genuine))
    safe_io.read_document(kind, file, "The remedy.")
    for keys, value in ODD[kind]:
        document = json.loads(json.dumps(genuine))
        part = document
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        file.write_text(json.dumps(document))
        with pytest.raises(ConadvError) as caught:
            safe_io.read_document(kind, file, "The remedy.")
        assert f"{file} is not what conadv writes: {keys[0]}" in str(caught.value)
        assert str(caught.value).endswith("The remedy.")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "results" / "studies").glob("*/sweep.json"))
)
def test_the_sweeps_of_the_studies_are_readable(path: Path) -> None:
    # Red when: a field's type or range is narrower than what `conadv sweep` writes.
    assert documents.read_sweep(path).cells


# Names


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


def test_a_link_in_place_of_a_temporary_file_is_not_written_through(tmp_path: Path) -> None:
    # Red when: write_atomic opens with "w" what lies there.
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".a.json.tmp").symlink_to(tmp_path / "precious")
    safe_io.write_atomic(tmp_path / "a.json", "new\udcff")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "new\\udcff"
