"""Read files that a stranger may have written, and write files as a whole.

No file's code runs, no link leads out of a run, and memory stays in proportion to the file's size.
"""

from __future__ import annotations

import json
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conadv.errors import ConadvError, printable

YAML_BYTES = 2**18
YAML_DEPTH = 20
YAML_NODES = 25_000  # a sweep of 10,000 runs with one line each, in under 2 s
JSON_BYTES = 2**26
JSON_DEPTH = 32  # readers recurse into values
LINE_BYTES = 2**24
DIGITS = 20  # those of 2^64
NUMBER_CHARACTERS = 100

# YAML


class _Loader(yaml.SafeLoader):
    """Plain values only, without duplicate keys and with bounded nesting.

    No anchors: a few lines of them can expand to a billion values.

    Keys are text. Integers have at most 20 digits, and none is in base 60 (YAML 1.1 reads 1:30 as
    90).
    """

    keys: tuple[type, ...] = (str,)
    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise _error(mark, "anchors and aliases are not supported")
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.depth > YAML_DEPTH:
            raise _error(mark, "nested too deeply")
        if self.nodes > YAML_NODES:
            raise _error(mark, f"more than {YAML_NODES:,} values")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for name, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if name.tag == "tag:yaml.org,2002:merge":
                raise _error(name.start_mark, "merge keys are not supported")
            key = self.construct_object(name, deep=True)
            if isinstance(key, bool) or not isinstance(key, self.keys):
                raise _error(name.start_mark, f"the key {repr(key)[:60]} is not text")
            if key in seen:
                raise _error(name.start_mark, f"the key {repr(key)[:60]} appears twice")
            seen.add(key)
        return super().construct_mapping(node, deep=True)


class _NumbersLoader(_Loader):
    """Keys may be numbers too: a sweep's spec has choices by batch size."""

    keys = (str, int, float)


def _error(mark: yaml.Mark, problem: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {mark.line + 1}: {problem}")


def _number(
    construct: Callable[[yaml.SafeLoader, yaml.ScalarNode], float],
    loader: yaml.SafeLoader,
    node: yaml.ScalarNode,
) -> float:
    text = str(loader.construct_scalar(node))
    if ":" in text:
        raise _error(node.start_mark, f"{text[:40]!r} is in base 60: write it out, or quote it")
    if len(text) > NUMBER_CHARACTERS:
        raise _error(node.start_mark, f"{text[:40]!r}... is longer than any number")
    value = construct(loader, node)
    if isinstance(value, int) and abs(value) >= 10**DIGITS:
        raise _error(node.start_mark, f"{text[:40]!r} has more than {DIGITS} digits")
    return value


for _kind in ("int", "float"):
    _construct = getattr(yaml.SafeLoader, f"construct_yaml_{_kind}")
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", partial(_number, _construct))


def parse_yaml(text: str, *, number_keys: bool = False) -> Any:
    """Plain values of a YAML text. Raises yaml.YAMLError for anything wrong with it."""
    try:
        return yaml.load(text, _NumbersLoader if number_keys else _Loader)
    except (yaml.YAMLError, MemoryError):
        raise
    except Exception as error:  # tags raise anything: impossible dates, !!bool of other text
        raise yaml.YAMLError(f"a value cannot be read ({type(error).__name__}: {error})") from error


def read_yaml(path: Path, what: str = "config", *, number_keys: bool = False) -> Any:
    """Plain values of a YAML file. Raises ConadvError that names ``what`` and the file."""
    try:
        return parse_yaml(read_text(path, YAML_BYTES), number_keys=number_keys)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = printable(" ".join(str(error).split()))[:500]
        raise ConadvError(f"Cannot read the {what} {printable(path)}: {problem}") from error


# Text and JSON


def read_text(path: Path, limit: int) -> str:
    """A text file of at most ``limit`` bytes. Raises OSError and UnicodeDecodeError."""
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(f"it is larger than {limit:,} bytes")
    return content.decode("utf-8")


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a text file. Raises OSError, also for a line of more than LINE_BYTES."""
    check_regular(path)
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, LINE_BYTES + 1), b""), start=1):
            if len(line) > LINE_BYTES:
                raise OSError(f"line {number} is longer than {LINE_BYTES:,} bytes")
            yield number, line


def check_regular(path: Path) -> None:
    """Raise OSError for a folder, pipe, socket or device. Opening a pipe would block forever."""
    if path.exists() and not path.is_file():
        raise OSError("it is not a regular file")


def parse_json(text: str) -> Any:
    """Values of a JSON text, nested at most JSON_DEPTH deep.

    Raises ValueError for anything else: NaN, infinities, floats that overflow, integers beyond 64
    bits.
    """
    try:
        found = json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if text.count("[") + text.count("{") <= JSON_DEPTH:
        return found
    level = [found]
    for _ in range(JSON_DEPTH + 1):
        lists = [value for value in level if isinstance(value, list)]
        lists += [list(value.values()) for value in level if isinstance(value, dict)]
        level = [value for inner in lists for value in inner]
        if not lists:
            return found
    raise ValueError("nested too deeply")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _whole(text: str) -> int:
    if len(text.lstrip("-")) > DIGITS:
        raise ValueError(f"{text[:20]}... has more than {DIGITS} digits")
    return int(text)


class Document(BaseModel):
    """Base of JSON files as their readers need them; fields that nobody reads pass unchecked.

    Strict: text does not become a number, nor true a 1.
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


Number = Annotated[float, Field(ge=-1e100, le=1e100)]  # its square is finite
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=10**15)]
D = TypeVar("D", bound=Document)


def read_document(kind: type[D], path: Path, remedy: str) -> D:
    """The JSON file ``path`` as a ``kind``. Raises ConadvError that ends in ``remedy``."""
    try:
        values = parse_json(read_text(path, JSON_BYTES))
    except (OSError, ValueError) as error:
        problem = printable(error)[:300]
        raise ConadvError(f"Cannot read {printable(path)}: {problem}. {remedy}") from error
    return checked(kind, values, path, remedy)


def checked(kind: type[D], values: Any, path: Path, remedy: str) -> D:
    """``values`` from the JSON file ``path`` as a ``kind``.

    Raises ConadvError that names the file and the first wrong field with its value, and ends in
    ``remedy``.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConadvError(
            f"{printable(path)} is not what conadv writes: {first_problem(error)}. {remedy}"
        ) from error


def first_problem(error: ValidationError) -> str:
    """The first wrong field, its value and what is wrong with it, on one short line."""
    first = error.errors()[0]
    field = printable(".".join(map(str, first["loc"])))[:200]
    if first["type"] == "missing":
        return f"{field} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{field} is {printable(repr(first['input']))[:80]}: {message}" if field else message


# Folders


def refuse_links(folder: Path) -> None:
    """Raise ConadvError for a link, pipe, socket or device in a run or a sweep, two levels deep.

    A stranger's link could have its record read from, or written to, anywhere; opening a pipe
    blocks forever. ``folder`` itself may be a link, since its user chose it.
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
                f"{printable(entry.path)} is a link, but everything in {printable(folder)} must "
                "lie in it. Replace the link by the file or folder itself (the folder as a whole "
                "may be a link)."
            )
        if not (entry.is_file() or entry.is_dir()):
            raise ConadvError(
                f"{printable(entry.path)} is a pipe, a socket or a device. Remove it from the run."
            )


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, for a name read from a file. ConadvError unless it lies below."""
    path = folder / name
    try:
        below = folder.resolve() in path.resolve().parents
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name with a nul
        below = False
    if not below:
        raise ConadvError(
            f"{printable(name)[:200]} leads out of {printable(folder)}: a sweep names only what "
            "lies in it. Remove that entry."
        )
    return path


# Checkpoints

_ENTRY = re.compile(
    r"[^/\\]+/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|data/\d+|\.data/\w+)"
)
_GLOBAL = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage|torch Size"
)
_OPCODES = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "PERSID"}


def check_archive(path: Path) -> None:
    """Raise ConadvError unless ``torch.save`` could have written the file: tensors, plain values.

    The first of two gates; the second is ``torch.load(weights_only=True)``, which would still
    inflate compressed entries and make byte arrays of any size. Old torch formats, scripts,
    compressed entries and every global but those of tensors are refused before anything is
    unpickled.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            problem = _archive_problem(archive, path.stat().st_size)
    except Exception as error:  # zipfile raises anything on a damaged or hostile archive
        problem = str(error) or type(error).__name__
    if problem:
        raise ConadvError(
            f"Cannot read the checkpoint {printable(path)}: {printable(problem)[:300]}."
        )


def _archive_problem(archive: zipfile.ZipFile, size: int) -> str | None:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    for entry in entries:
        if not _ENTRY.fullmatch(entry.filename):
            return f"it holds {entry.filename!r}, which does not belong in a checkpoint"
        if entry.compress_type or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            return f"its entry {entry.filename!r} is compressed or encrypted"
    if len(set(names)) != len(names) or len({name.partition("/")[0] for name in names}) != 1:
        return "its entries do not form one archive"
    if sum(entry.file_size for entry in entries) > size:
        return "its entries overlap"
    # read from its instructions, none of which is carried out
    for opcode, argument, _ in pickletools.genops(
        archive.read(f"{names[0].split('/')[0]}/data.pkl")
    ):
        if opcode.name in _OPCODES:
            return (
                f"it holds the instruction {opcode.name}, which tensors and plain values never need"
            )
        if opcode.name == "GLOBAL" and not _GLOBAL.fullmatch(str(argument)):
            return f"it asks for {argument!r}; only tensors and plain values are read"
    return None


# Writing


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file: a reader or a crash sees the old or the new content, never a part.

    Text that UTF-8 cannot hold (bytes of an odd file name) is written as escapes.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # left by a killed run, or a link that leads elsewhere
    with temporary.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
