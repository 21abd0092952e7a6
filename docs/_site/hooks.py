"""MkDocs hooks: pages from outside of docs/, help texts for the command-line page, and a check of
what came out.

The pages are written for a reader of the repository. On the site a link out of docs/ leads to a
copy of its target.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import posixpath
import re
from html import unescape
from pathlib import Path
from unittest import mock

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from conadv.cli import program as cli

ROOT = Path(__file__).resolve().parents[2]
TOP = {
    "README.md": "measured.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "license.md",
}
"""Files beside docs/, and their pages; README.md would take the place of index.md."""
log = logging.getLogger(
    "mkdocs.hooks.conadv"
)  # below "mkdocs", so that --strict counts its warnings

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)(?P<path>[^)\s#]+)(?=[#)])")
_HELP = re.compile(r"^<!-- help: (?P<command>.*) -->$", re.M)
_FENCED = re.compile(r"^(?P<indent> *)```.*?^(?P=indent)```$", re.M | re.S)
# What Python-Markdown leaves of a list, table or fence that lacks its empty line.
_RAW = re.compile(r"<p>[^<]*\n(?:[*-] |\d+\. |\|)|<p>\||```")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the results that there are in front of their section."""
    assert config.nav is not None
    found = [path.relative_to(ROOT / "docs").as_posix() for path in _result_pages()]
    for section in config.nav:
        if "Results" in section:
            section["Results"][:0] = found
    return config


def _result_pages() -> list[Path]:
    docs = ROOT / "docs"
    return [*docs.glob("results.md"), *sorted(docs.glob("results/*.md"))]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README and its like, and whatever pages link to outside of docs/."""
    texts = {
        file.src_uri: Path(file.abs_src_path or "").read_text()
        for file in files.documentation_pages()
    }
    sources = {f"docs/{uri}": text for uri, text in texts.items()} | {
        name: (ROOT / name).read_text() for name in TOP
    }
    wanted = {
        *TOP,
        *(target for source, text in sources.items() for target in _outside(source, text)),
    }
    for target in sorted(wanted):
        files.append(File.generated(config, _on_site(target), content=_copy(target)))
    return files


def _outside(source: str, text: str) -> set[str]:
    """The repository's files outside of docs/ that the page ``source`` links to."""
    targets = {_target(source, match["path"]) for match in _LINK.finditer(_FENCED.sub("", text))}
    return {
        target
        for target in targets
        if not target.startswith(("docs/", "..")) and (ROOT / target).exists()
    }


def _target(source: str, link: str) -> str:
    """Where a link of the repository's file ``source`` leads, from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _on_site(target: str) -> str:
    """The place on the site of a file of the repository."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return TOP.get(target) or f"repository/{target}.md"


def _copy(target: str) -> str:
    """The text of a page for a file outside of docs/: Markdown as it is, code in a fence, a folder
    as a list.
    """
    path = ROOT / target
    if path.is_dir():
        names = "\n".join(
            sorted(entry.name for entry in path.iterdir() if entry.suffix in (".py", ".md"))
        )
        return f"# {target}\n\n```text\n{names}\n```\n"
    if target.endswith(".md"):
        return path.read_text()
    language = {".py": "python", ".sh": "sh", ".yaml": "yaml", ".json": "json"}.get(
        path.suffix, "text"
    )
    return f"# {target}\n\n````{language}\n{path.read_text()}````\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links for the site, and put in the help texts."""
    uri = page.file.src_uri
    source = {page: name for name, page in TOP.items()}.get(uri, f"docs/{uri}")
    parts, end = [], 0
    for fence in _FENCED.finditer(markdown):
        parts += [_turned(markdown[end : fence.start()], source, uri), fence[0]]
        end = fence.end()
    text = "".join([*parts, _turned(markdown[end:], source, uri)])
    return _HELP.sub(lambda match: f"```text\n{help_text(match['command'].split())}\n```", text)


def _turned(text: str, source: str, uri: str) -> str:
    def turn(match: re.Match[str]) -> str:
        target = _target(source, match["path"])
        return (
            posixpath.relpath(_on_site(target), posixpath.dirname(uri) or ".")
            if _known(target)
            else match["path"]
        )

    return _LINK.sub(turn, text)


def _known(target: str) -> bool:
    return not target.startswith("..") and (ROOT / target).exists()


def help_text(words: list[str]) -> str:
    """What ``conadv WORDS --help`` prints, without colours, 100 characters wide."""
    said = io.StringIO()
    plain = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    with (
        mock.patch.dict(os.environ, plain),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        cli.main([*words, "--help-all" if words[:1] == ["train"] and words[1:] else "--help"])
    lines = (line.rstrip() for line in said.getvalue().splitlines())
    return "\n".join(lines).strip("\n")


_FORMULA = re.compile(
    r'<(?P<tag>div|span) class="arithmatex">\\[\[(](?P<tex>.*?)\\[\])]</(?P=tag)>', re.S
)


def _mathml(match: re.Match[str]) -> str:
    """A formula as MathML, which browsers show without a script."""
    block = match["tag"] == "div"
    made = latex2mathml.converter.convert(
        unescape(match["tex"]), display="block" if block else "inline"
    )
    return f'<div class="formula">{made}</div>' if block else made


# 0.98 [0.95, 1.01]: a narrow cell must not break it
_INTERVAL = re.compile(r"(?<=[\d%]) (\[[+−\-]?[\d.]+,) ([+−\-]?[\d.]+\])")
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):(?=<code>)")  # of docstrings


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Warn of Markdown that was not understood, and of a command that the reference leaves out."""
    html = _INTERVAL.sub("\u00a0\\1\u00a0\\2", _FORMULA.sub(_mathml, _ROLE.sub("", html)))
    prose = re.sub(r"<(pre|code)\b.*?</\1>", "", html, flags=re.S)
    if found := _RAW.search(prose):
        log.warning("%s: Markdown came out as text: %r", page.file.src_uri, found[0][-80:])
    if page.file.src_uri == "cli.md":
        for missing in missing_commands(html):
            log.warning("cli.md has no help of `conadv %s`", missing)
    return html


def missing_commands(html: str) -> list[str]:
    """Commands and benchmarks without a usage line in the page."""
    names = [*cli.COMMANDS, "bench attack-cost", "bench data"]
    return [name for name in names if not re.search(rf"usage: conadv {re.escape(name)}\b", html)]
