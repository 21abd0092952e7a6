"""The documentation is true: its Python runs, its commands parse, its links lead somewhere, its
tables are complete.

Each page's ```python blocks and the commands of its ```sh and ```console blocks run in the order of
the page, in one namespace and one folder, small (``docs_runs.py`` says how, and gives the reason
for each command that is not run). The pages may take two names for granted, as their readers have
them: ``model`` (a small network for 8x8 grey images) and ``loader`` (batches for it). A page with
the comment "tests: two ranks" has its Python run by two processes. Before that every command goes
through its own parser as it stands, and `conadv train` through resolve(); `make` targets and
scripts must exist. Lines that a ```diff block leaves alone stand in the code; ```yaml is a file of
the repository.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import tyro
import yaml

from conadv.cli.program import COMMANDS
from conadv.config import recipes
from conadv.config.files import dump_yaml
from conadv.config.resolve import resolve
from conadv.config.schema import Config
from conadv.errors import ConadvError
from conadv.methods import METHODS
from conadv.sweep.cells import expand
from conadv.sweep.spec import parse_spec

from . import docs_runs

ROOT = Path(__file__).parent.parent
TOP = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
NAMES = [*(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))), *TOP]
RUN = ("python", "sh", "console")
TWO_RANKS = "<!-- tests: two ranks -->"
READERS = """import torch
from conadv.models.small import SmallResNet
torch.set_num_threads(1)
torch.manual_seed(0)
model = SmallResNet(8, 4, 1, 10)
loader = [(torch.rand(16, 1, 8, 8), torch.arange(16) % 10) for _ in range(3)]
"""
OPTIONS_ALONE = ("--help", "--version")

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S
)
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def in_order(text: str) -> Iterator[tuple[str, str]]:
    """(language, body) of the fenced blocks from the top of a page to its end, those within lists
    too.

    A line number in an error is that of the page.
    """
    for match in _FENCE.finditer(text):
        body = textwrap.dedent(match["body"])
        yield match["language"], "\n" * text.count("\n", 0, match.start("body")) + body


def blocks(text: str, *languages: str) -> list[str]:
    """The bodies of the fenced blocks in one of ``languages``."""
    return [body for language, body in in_order(text) if language in languages]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in the shell blocks."""
    for language, body in in_order(text):
        if language in ("sh", "console"):
            yield from commands_of(language, body)


def commands_of(language: str, body: str) -> Iterator[list[str]]:
    """The words of every command of one block, without prompts, comments and output."""
    for line in body.replace("\\\n", " ").splitlines():
        if language == "console" and not line.startswith("$ "):
            continue  # what the command prints
        for part in re.split(r"&&|;", re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ")):
            words = shlex.split(re.sub(r"\s>\s*\S+\s*$", "", part))  # without "> file"
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                words.pop(0)  # a variable set for this command
            if words:
                yield words


def prose(text: str) -> str:
    """The page without code."""
    return re.sub(r"`[^`\n]*`", "`code`", _FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ +(.*)$", _FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def parse(words: list[str]) -> Config | None:
    """Parse a `conadv` command as the program does; the config for `conadv train`. ConadvError or
    SystemExit if not.
    """
    name, *args = words[1:]
    if name in OPTIONS_ALONE:
        return None
    assert name in COMMANDS, f"unknown command {name}"
    module = import_module(f"conadv.cli.{COMMANDS[name][0]}")
    if hasattr(module, "Args"):
        tyro.cli(module.Args, args=args)
    elif args and not {"--help", "--help-all"} & set(args):
        if args[0] == "--config":  # a run that the reader has and we have not
            Path(args[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(args[1]).write_text(dump_yaml(resolve(recipes.get("digits"))))
        config: Config = module.read_options(args)[0]
        return config
    return None


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that pages read; every page gets copies."""
    folder = tmp_path_factory.mktemp("docs") / "run"
    docs_runs.short_run(folder)
    return folder


def page_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The namespace of a page, with what its reader has."""
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # classes look up the module they are defined in
    exec(READERS, page.__dict__)
    return page


@pytest.mark.parametrize("name", NAMES)
def test_blocks_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # Red when: a name in a block is misspelt (an assert in extending.md also fails when its
    # look-ahead is wrong), timeline.md shows steps that its run does not have, or a block is ```py.
    text = (ROOT / name).read_text()
    assert not re.search(r"^ *```.*$\n", _FENCE.sub("", text), re.M), (
        "a fence that no test understands"
    )
    for language, _ in in_order(text):
        assert language in (*RUN, "diff", "yaml"), f"```{language} is not checked"
    todo = [block for block in in_order(text) if block[0] in RUN]
    if not todo:
        return
    kept = request.getfixturevalue("kept")
    docs_runs.furnish(tmp_path, kept)
    monkeypatch.chdir(tmp_path)
    page = page_module(monkeypatch)
    for language, body in todo:
        if language != "python":
            for words in commands_of(language, body):
                if docs_runs.why_not(words) is None:
                    docs_runs.run(words, kept)
        elif TWO_RANKS not in text:
            exec(compile(body, name, "exec", dont_inherit=True), page.__dict__)
    if TWO_RANKS in text:
        docs_runs.on_two_ranks(READERS + "".join(blocks(text, "python")), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_diffs_and_specs_fit_the_repository(name: str) -> None:
    # Red when: the row beside which extending.md adds one is renamed; sweep.md's spec has an
    # unknown key.
    text = (ROOT / name).read_text()
    files = [path for folder in ("conadv", "tests") for path in (ROOT / folder).rglob("*.py")]
    code = [path.read_text() for path in files] if "```diff" in text else []
    for body in blocks(text, "diff"):
        for line in filter(None, body.splitlines()):
            assert line[0] in " +-", f"{name}: {line}"
            assert line[0] == "+" or any(line[1:] + "\n" in source for source in code), (
                f"{name}: {line} is not there"
            )
    for body in blocks(text, "yaml"):
        assert expand(parse_spec(yaml.safe_load(body), name)).runs


def test_what_is_not_run_has_a_reason() -> None:
    # Red when: a command goes from the pages and its reason stays, or the test that a reason names
    # is renamed.
    shown = [words for name in NAMES for words in commands((ROOT / name).read_text())]
    for start, reason in docs_runs.NOT_RUN.items():
        assert any(docs_runs.why_not(words) == reason for words in shown), f"no page has {start}"
        for file, test in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", reason):
            assert f"def {test}" in (ROOT / file).read_text(), f"{file}::{test}"


@pytest.mark.parametrize(
    "path", sorted({*ROOT.glob("*/*.sh"), *ROOT.glob("conadv/*/*.sh")}), ids=lambda p: p.name
)
def test_scripts_are_bash(path: Path) -> None:
    # Red when: an `if` of a script loses its `fi`.
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: a page writes --warmup-epochs for --schedule.warmup-epochs, or --staleness beside
    # --method disadv.
    monkeypatch.chdir(tmp_path)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for words in commands((ROOT / name).read_text()):
        line = " ".join(words)
        if words[:3] == ["python", "-m", "conadv"]:
            words = ["conadv", *words[3:]]
        try:
            if words[0] == "conadv":
                parse(words)
        except (ConadvError, SystemExit) as error:
            pytest.fail(f"{name}: {line}\n{error}")
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        if words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), line


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    # Red when: a page or a heading that another page links to is renamed.
    page = ROOT / name
    for match in _LINK.finditer(prose(page.read_text())):
        path, _, anchor = match["target"].partition("#")
        if re.match(r"\w+:", path):
            continue  # the web
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name}: {match['target']}"
        assert target.is_relative_to(ROOT), f"{match['target']} is outside of the repository"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{name}: {match['target']}"


def test_every_method_has_its_row() -> None:
    # Red when: a row is taken out of docs/methods/README.md, or a method is added to METHODS alone.
    rows = re.findall(
        r"^\| *\[?`(\w+)`", (ROOT / "docs" / "methods" / "README.md").read_text(), re.M
    )
    assert set(rows) == set(METHODS)


def test_the_checks_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parsers above find what they are for: an empty list would pass every page."""
    monkeypatch.chdir(tmp_path)
    text = "# One  head\n\n```sh\nA=1 conadv train digits \\\n  --lr 3  # a; b\n```\n"
    text += "```console\n$ make test\nok\n```\n"
    text += "* a\n\n  ```python\n  if 1:\n      1 / 0\n  ```\nSee [a](b.md#c) and `[no](link)`.\n"
    assert list(commands(text)) == [["conadv", "train", "digits", "--lr", "3"], ["make", "test"]]
    assert blocks(text, "python")[0].lstrip("\n") == "if 1:\n    1 / 0\n"
    assert [match["target"] for match in _LINK.finditer(prose(text))] == ["b.md#c"]
    assert anchors("## `run(x)`, then stop\n") == {"runx-then-stop"}
    config = parse(["conadv", "train", "digits", "--method", "conadv", "--eps", "4/255"])
    assert config is not None
    assert (config.staleness, config.attack.eps) == (1, 4 / 255)
    with pytest.raises(ConadvError, match="no effect"):
        parse(["conadv", "train", "digits", "--staleness", "2"])
    for wrong in (["train", "digits", "--warmup-epochs", "2"], ["report", "runs", "--title", "x"]):
        with pytest.raises(SystemExit):
            parse(["conadv", *wrong])
