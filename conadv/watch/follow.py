"""A record read as it grows."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conadv.errors import ConadvError, printable
from conadv.safe_io import LINE_BYTES, parse_json

CHUNK = 2**20
TAIL_BYTES = 2**16

Line = dict[str, Any]


class Follower:
    """Hands out the lines that a record has gained since the last call.

    A last line without its end is kept until the rest of it comes. ``broken``: complete lines that were no objects with
    a type. A record that was replaced or cut (a resumed run drops what it will write again) is read from its start:
    ``restarts`` counts that, and whoever has added up its lines must begin anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode: int | None = None
        self._offset, self._rest = 0, b""
        self.broken = self.restarts = 0

    def lines(self) -> Iterator[Line]:
        """The new lines. Raises ConadvError if the record cannot be read; none where there is no record yet."""
        try:
            about = self._path.stat()
            if self._inode not in (None, about.st_ino) or about.st_size < self._offset:
                self._offset, self._rest, self.broken = 0, b"", 0
                self.restarts += 1
            self._inode = about.st_ino
            if not self._path.is_file():
                raise OSError("it is not a regular file")
            yield from self._read(about.st_size)
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConadvError(
                f"Cannot read the record {printable(self._path)}: {error}."
            ) from error

    def _read(self, size: int) -> Iterator[Line]:
        while self._offset < size:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                chunk = file.read(min(CHUNK, size - self._offset))
            if not chunk:
                return
            self._offset += len(chunk)
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            for raw in whole:
                line = parse(raw)
                self.broken += line is None
                if line is not None:
                    yield line
            if len(self._rest) > LINE_BYTES:
                raise OSError(f"a line is longer than {LINE_BYTES:,} bytes")


def parse(raw: bytes) -> Line | None:
    """One line of a record; None for what is none."""
    try:
        line = parse_json(raw.decode("utf-8"))
    except ValueError:  # UnicodeDecodeError is one
        return None
    return line if isinstance(line, dict) and isinstance(line.get("type"), str) else None


def ends(path: Path) -> list[Line]:
    """The first line of a record and its last ones: all within TAIL_BYTES of its end. Cheap for any length."""
    try:
        if not path.is_file():  # a named pipe would wait for a writer
            return []
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            first = file.readline(LINE_BYTES)
            file.seek(max(len(first), size - TAIL_BYTES))
            rest = file.read(TAIL_BYTES)
    except OSError:
        return []
    raws = deque(rest.split(b"\n"))
    if size - TAIL_BYTES > len(first):
        raws.popleft()  # the end of a line
    if raws:
        raws.pop()  # the beginning of one
    found = [parse(raw) for raw in (first, *raws)]
    return [line for line in found if line is not None]
