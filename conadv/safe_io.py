"""Reading what somebody else may have written: runs, checkpoints, configs, profiles.

Nothing here runs code of a file, follows a link out of a run, or takes memory out of proportion to the file.
"""

from __future__ import annotations

import json
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from conadv.errors import ConadvError, printable

YAML_BYTES = 2**18
YAML_DEPTH = 20
YAML_NODES = 25_000  # a sweep of 10,000 runs with a line each, in under 2 s
JSON_BYTES = 2**26
JSON_DEPTH = 32
JSON_DIGITS = 20  # those of 2^64
NUMBER_CHARACTERS = 100
LINE_BYTES = 2**24

_ENTRY = re.compile(
    r"[^/\\]+/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|data/\d+|\.data/\w+)"
)
_GLOBAL = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage|torch Size"
)
_OPCODES = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "PERSID"}


class _Loader(yaml.SafeLoader):
    """Plain values only: no anchors (a few lines can stand for a billion), no duplicate keys, no deep nesting.

    Keys are text, or as the reader has it. Whole numbers have at most 20 digits, and none is of base 60 (in YAML 1.1
    1:30 is 90).
    """

    depth = 0
    nodes = 0
    keys: tuple[type, ...] = (str,)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(
                f"line {self.peek_event().start_mark.line + 1}: anchors and aliases are not supported"
            )
        if self.depth >= YAML_DEPTH:
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: nested too deeply")
        self.nodes += 1
        if self.nodes > YAML_NODES:
            raise yaml.YAMLError(f"it has more than {YAML_NODES:,} values")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
        return super().construct_mapping(node, deep=True)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen = set()
        for name, _ in node.value:
            where = f"line {name.start_mark.line + 1}"
            if name.tag == "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"{where}: keys are merged")
            key = self.construct_object(name, deep=True)
            if isinstance(key, bool) or not isinstance(key, self.keys):
                raise yaml.YAMLError(f"{where}: the key {repr(key)[:60]} is not text")
            if key in seen:
                raise yaml.YAMLError(f"{where}: the key {repr(key)[:60]} stands twice")
            seen.add(key)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        self._check_number(node)
        value: int = super().construct_yaml_int(node)
        if abs(value) >= 10**JSON_DIGITS:
            raise yaml.YAMLError(f"{_quoted(node)} has more than {JSON_DIGITS} digits")
        return value

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        self._check_number(node)
        value: float = super().construct_yaml_float(node)
        return value

    def _check_number(self, node: yaml.ScalarNode) -> None:
        text = self.construct_scalar(node)
        if not isinstance(text, str) or not text.strip("+-_ "):
            raise yaml.YAMLError(f"{_quoted(node)} is no number")
        if ":" in text:
            raise yaml.YAMLError(
                f"{_quoted(node)} is a number of base 60: write it out, or in quotes"
            )
        if len(text) > NUMBER_CHARACTERS:
            raise yaml.YAMLError(f"{_quoted(node)} has more than {NUMBER_CHARACTERS} characters")


def _quoted(node: yaml.ScalarNode) -> str:
    return f"line {node.start_mark.line + 1}: {str(node.value)[:40]!r}"


for _kind in ("int", "float"):  # yaml keeps the functions, not their names
    _Loader.add_constructor(
        f"tag:yaml.org,2002:{_kind}", getattr(_Loader, f"construct_yaml_{_kind}")
    )


class _NumbersLoader(_Loader):
    """Numbers are keys as well: a spec has choices by batch size."""

    keys = (str, int, float)


def parse_yaml(text: str, *, number_keys: bool = False) -> Any:
    """Plain values of a YAML text. Raises yaml.YAMLError for all that is wrong with it."""
    try:
        return yaml.load(text, _NumbersLoader if number_keys else _Loader)
    except yaml.YAMLError:
        raise
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # whatever tags make of texts: impossible dates, a !!bool that is none
        raise yaml.YAMLError(f"a value cannot be read ({type(error).__name__}: {error})") from error


def read_yaml(path: Path, what: str = "config", *, number_keys: bool = False) -> Any:
    """Plain values of a YAML file. Raises ConadvError that names ``what`` and the file."""
    try:
        return parse_yaml(read_text(path, YAML_BYTES), number_keys=number_keys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = " ".join(line.strip() for line in str(error).splitlines())
        raise ConadvError(
            f"Cannot read the {what} {printable(path)}: {printable(problem)[:500]}"
        ) from error


def read_text(path: Path, limit: int) -> str:
    """A text file of at most ``limit`` bytes. Raises OSError and UnicodeDecodeError."""
    if path.exists() and not path.is_file():
        raise OSError("it is not a regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(f"it is larger than {limit:,} bytes")
    return content.decode("utf-8")


def parse_json(text: str) -> Any:
    """Values of a JSON text, as deep as JSON_DEPTH: readers walk through them by recursion, and take floats of them.

    ValueError for NaN, infinities, numbers beyond a float, whole numbers beyond 64 bits, and for what is no JSON.
    """
    try:
        found = json.loads(text, parse_constant=_not_json, parse_float=_finite, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if text.count("[") + text.count("{") > JSON_DEPTH and _depth(found) > JSON_DEPTH:
        raise ValueError("nested too deeply")
    return found


def _depth(value: Any) -> int:
    """How many lists and objects are within one another."""
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, (dict, list))]:
        level = [
            inner for part in level for inner in (part.values() if isinstance(part, dict) else part)
        ]
        depth += 1
    return depth


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def _whole(text: str) -> int:
    if len(text.lstrip("-")) > JSON_DIGITS:
        raise ValueError(f"{text[:20]}... has more than {JSON_DIGITS} digits")
    return int(text)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a file of lines. Raises OSError, for a line of more than LINE_BYTES too."""
    if path.exists() and not path.is_file():
        raise OSError("it is not a regular file")
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            if len(line) > LINE_BYTES:
                raise OSError(f"line {number} is longer than {LINE_BYTES:,} bytes")
            yield number, line


def refuse_links(folder: Path) -> None:
    """Raise ConadvError for a link among the files of a run or of a sweep, or in its folders, and for a pipe or device.

    One from somebody else could have its record written into, or read from, anywhere; whoever opens a pipe waits for
    ever. ``folder`` itself may be a link: its user has chosen that.
    """
    try:
        entries = list(os.scandir(folder)) if folder.is_dir() else []
        for entry in list(entries):
            if entry.is_dir(follow_symlinks=False):
                entries += os.scandir(entry.path)
    except OSError as error:
        raise ConadvError(
            f"Cannot read the folder {printable(folder)}: {error.strerror}."
        ) from error
    for entry in entries:
        if entry.is_symlink():
            raise ConadvError(
                f"{printable(entry.path)} is a link: what belongs to {printable(folder)} must lie in it. "
                "Put the file or folder itself in its place (the folder as a whole may be a link)."
            )
        if not (entry.is_file() or entry.is_dir()):
            raise ConadvError(
                f"{printable(entry.path)} is a pipe, a socket or a device, which is no part of a run. Remove it."
            )


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, a ``name`` from a file. ConadvError unless that is below ``folder``, links followed."""
    path = folder / name
    try:
        below = folder.resolve() in path.resolve().parents
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name with a nul
        below = False
    if not below:
        raise ConadvError(
            f"{printable(name)[:200]} leads out of {printable(folder)}: what a sweep names must lie in it. Take it out."
        )
    return path


def check_archive(path: Path) -> None:
    """Raise ConadvError unless a file is an archive of tensors and plain values as ``torch.save`` writes it.

    The first of two gates, the second is ``torch.load(weights_only=True)``: older formats of torch, scripts,
    compressed entries (a small file could fill the memory) and every global but those of tensors are refused
    before anything is unpickled.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            problem = _problem(archive, path.stat().st_size)
    except Exception as error:  # whatever a damaged or hostile archive makes of its reader
        problem = str(error) or type(error).__name__
    if problem:
        raise ConadvError(
            f"Cannot read the checkpoint {printable(path)}: {printable(problem)[:300]}."
        )


def _problem(archive: zipfile.ZipFile, size: int) -> str | None:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    for entry in entries:
        if not _ENTRY.fullmatch(entry.filename):
            return f"it holds {entry.filename!r}, which is no part of a checkpoint"
        if (
            entry.compress_type != zipfile.ZIP_STORED
            or entry.file_size != entry.compress_size
            or entry.flag_bits & 1
        ):
            return f"its entry {entry.filename!r} is compressed or encrypted"
    if len(set(names)) != len(names) or len({name.partition("/")[0] for name in names}) != 1:
        return "its entries do not form one archive"
    if sum(entry.file_size for entry in entries) > size:
        return "its entries overlap"
    pickles = [name for name in names if name.endswith("/data.pkl")]
    return _pickle_problem(archive.read(pickles[0])) if pickles else "it holds no data.pkl"


def _pickle_problem(content: bytes) -> str | None:
    """What is wrong with a pickle, told from its instructions without following one."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in _OPCODES:
            return f"it holds the instruction {opcode.name}, which tensors and plain values do not need"
        if opcode.name == "GLOBAL" and not _GLOBAL.fullmatch(str(argument)):
            return f"it asks for {argument!r}; only tensors and plain values are read"
    return None
