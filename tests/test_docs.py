"""The documentation is true: its Python runs, its commands parse, its links lead somewhere, its tables are complete.

Each page's ```python blocks run in order in one namespace, in an empty folder. The pages may take two names for
granted, as their readers have them: ``model`` (a small network for 8x8 grey images) and ``loader`` (batches for it).
In ```sh and ```console blocks every `conadv` command goes through the program's own parser and `conadv train` through
resolve(), without training; `make` targets and scripts must exist. Edits of existing files are ```diff blocks.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import tyro

from conadv import bench, cli, recipes
from conadv.analyze import AnalyzeArgs
from conadv.config import Config, dump_yaml, override, resolve
from conadv.demo import DemoArgs
from conadv.doctor.command import DoctorArgs
from conadv.errors import ConadvError
from conadv.methods import METHODS
from conadv.models import SmallResNet
from conadv.plan.command import PlanArgs
from conadv.staleness import StalenessArgs
from conadv.sweep.command import SweepArgs
from conadv.timeline import TimelineArgs
from conadv.watch.command import WatchArgs

ROOT = Path(__file__).parent.parent
TOP = [page for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (page := ROOT / name).is_file()]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *TOP]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PARSED = {
    "eval": cli.EvalArgs,
    "analyze": AnalyzeArgs,
    "export": cli.ExportArgs,
    "report": cli.ReportArgs,
    "timeline": TimelineArgs,
    "staleness": StalenessArgs,
    "plan": PlanArgs,
    "demo": DemoArgs,
    "sweep": SweepArgs,
    "watch": WatchArgs,
    "doctor": DoctorArgs,
}
OPTIONS_ALONE = ("--help", "--version")

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")


def blocks(text: str, *languages: str) -> list[str]:
    """The bodies of the fenced blocks in one of ``languages``; a line number in an error is that of the page."""
    return [
        "\n" * text.count("\n", 0, match.start("body")) + match["body"]
        for match in _FENCE.finditer(text)
        if match["language"] in languages
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in the shell blocks: lines joined; prompts, comments and output left out."""
    for language in ("sh", "console"):
        for body in blocks(text, language):
            for line in body.replace("\\\n", " ").splitlines():
                if language == "console" and not line.startswith("$ "):
                    continue  # what the command prints
                for part in re.split(r"&&|;", line.removeprefix("$ ")):
                    words = shlex.split(part, comments=True)
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
    """Parse a `conadv` command as the program does; the config for `conadv train`. ConadvError or SystemExit if not."""
    name, *args = words[1:]
    if name in OPTIONS_ALONE:
        return None
    assert name in cli.COMMANDS, f"unknown command {name}"
    if name in PARSED:
        tyro.cli(PARSED[name], args=args)
    if name == "bench" and args:
        bench.parse(args)[1].check()
    if name != "train":
        return None
    if args[:1] == ["--config"]:  # a run that the reader has and we have not
        Path(args[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(args[1]).write_text(dump_yaml(resolve(recipes.get("digits"))))
    base, _, rest = cli._base_config(args, recipes.get)
    parsed = tyro.cli(cli.TrainArgs, default=cli.TrainArgs(base, cli.RunOptions()), args=rest)
    return resolve(override(base, parsed.config, cli.given_settings(rest)))


@pytest.mark.parametrize("name", NAMES)
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: a name in a block is misspelt (an assert in extending.md also fails when its look-ahead is wrong).
    parts = blocks((ROOT / name).read_text(), "python")
    if not parts:
        pytest.skip("no Python on this page")
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # classes look up the module that they are defined in
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    page.model = SmallResNet(8, 4, 1, 10)  # type: ignore[attr-defined]
    page.loader = [(torch.rand(16, 1, 8, 8), torch.arange(16) % 10) for _ in range(3)]  # type: ignore[attr-defined]
    for part in parts:
        exec(compile(part, name, "exec", dont_inherit=True), page.__dict__)


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Red when: a page writes --warmup-epochs for --schedule.warmup-epochs, or --staleness beside --method disadv.
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
        assert target.is_relative_to(ROOT), f"{name}: {match['target']} is outside of the repository"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{name}: {match['target']}"


def test_every_method_has_its_row() -> None:
    # Red when: a row is taken out of docs/methods/README.md, or a method is added to METHODS alone.
    rows = re.findall(r"^\| *\[?`(\w+)`", (ROOT / "docs" / "methods" / "README.md").read_text(), re.M)
    assert set(rows) == set(METHODS)


def test_the_checks_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parsers above find what they are for: an empty list would pass every page."""
    monkeypatch.chdir(tmp_path)
    text = "# One  head\n\n```sh\nA=1 conadv train digits \\\n  --lr 3  # high\n```\n```console\n$ make test\nok\n```\n"
    text += "```python\n1 / 0\n```\nSee [a](b.md#c) and `[no](link)`.\n"
    assert list(commands(text)) == [["conadv", "train", "digits", "--lr", "3"], ["make", "test"]]
    assert blocks(text, "python")[0].strip() == "1 / 0"
    assert [match["target"] for match in _LINK.finditer(prose(text))] == ["b.md#c"]
    assert anchors("## `run(x)`, then stop\n") == {"runx-then-stop"}
    config = parse(["conadv", "train", "digits", "--method", "conadv", "--eps", "4/255"])
    assert config is not None
    assert (config.staleness, config.attack.eps) == (1, 4 / 255)
    with pytest.raises(ConadvError, match="no effect"):
        parse(["conadv", "train", "digits", "--staleness", "2"])
    with pytest.raises(SystemExit):
        parse(["conadv", "train", "digits", "--warmup-epochs", "2"])
    with pytest.raises(SystemExit):
        parse(["conadv", "report", "runs", "--title", "x"])
