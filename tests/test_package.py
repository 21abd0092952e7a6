"""What `pip install` gives: wheel and source distribution have all they need, and run from another
folder.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from conadv import __version__

ROOT = Path(__file__).parent.parent
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # the first build changes argv
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""


def run(*words: str | Path, cwd: Path, path: Path | str = "") -> str:
    """The output of a command; the test fails with its error output."""
    around = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path)}
    done = subprocess.run(words, cwd=cwd, env=around, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source distribution, wheel), built from a copy of what is committed or would be."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools 77 or newer (pip install '.[test]')")
    source = tmp_path_factory.mktemp("source") / "conadv"
    ignored = shutil.ignore_patterns(
        *(".*", "runs", "site", "build", "dist", "*.egg-info", "__pycache__", "results")
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-c", BUILD, str(out), cwd=source)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def modules() -> set[str]:
    """Every file of the package that is not a by-product of running it."""
    files = [path for path in (ROOT / "conadv").rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_has_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    # Red when: package-data leaves out *.css, *.sh or py.typed, or packages.find takes tests along.
    with zipfile.ZipFile(built[1]) as wheel:
        names, info = set(wheel.namelist()), f"conadv-{__version__}.dist-info"
        metadata = wheel.read(f"{info}/METADATA").decode()
        assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert {name for name in names if not name.startswith(info)} == modules()
    assert re.search(r"^License-Expression: Apache-2.0$", metadata, re.M)
    assert re.search(r"^Requires-Python: >=3.10$", metadata, re.M)


def test_the_sdist_builds_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    # Red when: MANIFEST.in prunes conadv/report, or a file that the build reads is not in the
    # sdist.
    sdist, wheel = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    top = {path.name for path in source.iterdir() if path.suffix != ".egg-info"}
    assert top == {
        *("conadv", "CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md"),
        *("pyproject.toml", "setup.cfg"),
    }
    run(sys.executable, "-c", BUILD, str(tmp_path), cwd=source)
    with zipfile.ZipFile(tmp_path / wheel.name) as again, zipfile.ZipFile(wheel) as first:
        for name in modules():
            assert again.read(name) == first.read(name)


def test_it_runs_from_where_it_is_installed(built: tuple[Path, Path], tmp_path: Path) -> None:
    # Red when: package-data leaves out report/*.j2 (TemplateNotFound), or the entry point is gone.
    # Without dependencies: the tests download nothing. The next test is about what is declared.
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    pip = "-m pip --disable-pip-version-check install --quiet --no-index --no-deps --target".split()
    run(sys.executable, *pip, site, built[1], cwd=here)
    where = run(sys.executable, "-c", "import conadv; print(conadv.__file__)", cwd=here, path=site)
    assert Path(where.strip()).is_relative_to(site)
    conadv = site / "bin" / "conadv"
    assert run(conadv, "--version", cwd=here, path=site).strip() == __version__
    script = ROOT / "conadv" / "config" / "recipes" / "slurm_imagenet.sh"
    assert run(conadv, "slurm", cwd=here, path=site) == script.read_text()
    train = "train digits --steps 2 --schedule.warmup-epochs 0 --model.width 4 --out run --quiet"
    run(conadv, *train.split(), cwd=here, path=site)
    run(conadv, "report", "run", "--out", "report.html", cwd=here, path=site)
    assert "<svg" in (here / "report.html").read_text()


def imported(tree: ast.AST, always: bool = True) -> Iterator[tuple[str, bool]]:
    """(top-level module, whether importing the file imports it) for every import statement below
    ``tree``.

    Not always: within functions, under TYPE_CHECKING, and where an ImportError is caught.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], always) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0], always
        text = ast.unparse(node).partition("\n")[0] if isinstance(node, ast.stmt) else ""
        caught = isinstance(node, ast.Try) and "except ImportError" in ast.unparse(node)
        later = isinstance(node, ast.FunctionDef) or text == "if TYPE_CHECKING:" or caught
        yield from imported(node, always and not later)


def distribution(requirement: str) -> str:
    """``"Torch>=2.9"`` -> ``"torch"``, as indexes spell it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


OWNERS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
}
"""Whose modules have another name than their distribution."""


def test_the_declared_dependencies_are_what_the_package_imports() -> None:
    # Red when: a module is imported whose distribution is not in pyproject.toml's dependencies (in
    # its extras, for imports within functions), or a dependency is imported nowhere.
    text = (ROOT / "pyproject.toml").read_text()  # tomllib is not in Python 3.10
    dependencies, extra = re.findall(
        r"^dependencies = (\[.*?^\])|^\[project.optional-dependencies\]\n(.*?)^\[",
        text,
        re.M | re.S,
    )
    declared = {distribution(each) for each in re.findall(r'"(.*?)"', dependencies[0])}
    extras = {distribution(each) for each in re.findall(r'"(.*?)"', extra[1])}
    seen: dict[str, set[str]] = {}
    for path in (ROOT / "conadv").rglob("*.py"):
        for module, always in imported(ast.parse(path.read_text())):
            owner = OWNERS.get(module, module).lower()
            if module != "conadv" and module not in sys.stdlib_module_names:
                seen.setdefault(owner, set()).add(path.name)
                assert owner in (declared if always else declared | extras), (
                    f"{path.name} imports {module}"
                )
    assert declared <= seen.keys(), declared - seen.keys()


def test_extras_are_installed_from_the_checkout_everywhere() -> None:
    # Red when: a page, a message or a comment installs an extra from an index, or one that
    # pyproject.toml has not.
    project = (ROOT / "pyproject.toml").read_text()
    section = project.split("[project.optional-dependencies]")[1].split("[project.")[0]
    known = set(re.findall(r"^(\w+) = \[", section, re.M))
    folders = ("conadv", "docs", "tests", "benchmarks", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in (*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        if path.suffix not in (".py", ".md"):
            continue
        source = path.read_text(encoding="utf-8")
        for what, extras in re.findall(r"pip install[\w -]* '?([\w.]+)\[([\w,]+)\]", source):
            assert what == ".", path
            assert set(extras.split(",")) <= known, path
        for extra in re.findall(r"\binstall\('(\w+)'\)", source):
            assert extra in known, path


def test_the_changes_say_what_changes_numbers() -> None:
    # Red when: the newest version in CHANGELOG.md is not the package's, or has no part "Numerics".
    text = (ROOT / "CHANGELOG.md").read_text()
    parts = re.split(r"^## (\d+\.\d+\.\d+) ", text, flags=re.M)
    versions, bodies = parts[1::2], parts[2::2]
    assert versions[0] == __version__
    for number, body in zip(versions, bodies, strict=True):
        assert re.search(r"^### Numerics$", body, re.M), f"{number} has no Numerics"
