"""Files that would run code if somebody unpickled or followed them, each a function of the marker
that it would make.

A payload that ran has made the marker. ``LIVE`` kinds do run with plain ``pickle.loads``; a test
checks it, so that those which refuse them refuse something.
"""

from __future__ import annotations

import copyreg
import hashlib
import io
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

P2 = b"\x80\x02"
Make = Callable[[Path], bytes]


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def call(module: str, name: str, *args: bytes) -> bytes:
    """Instructions for module.name(*args)."""
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(args) + b"tR"


def in_state(value: bytes) -> bytes:
    """A state like that of a checkpoint with ``value`` in it."""
    return P2 + b"}(" + text("format") + b"K\x01" + text("model") + value + b"u."


def touch(marker: Path) -> bytes:
    return text(f"touch {marker}")


def expression(marker: Path) -> bytes:
    return text(f"open({str(marker)!r}, 'w')")


def shell_list(marker: Path) -> bytes:
    return b"](" + text("touch") + text(str(marker)) + b"e"


def _newobj(m: Path) -> bytes:
    new = b"csubprocess\nPopen\n(" + shell_list(m) + b"t\x81N0"
    return P2 + new + call("os", "system", touch(m)) + b"."


def _stack_global(m: Path) -> bytes:
    words = [b"\x8c" + bytes([len(word)]) + word for word in (b"os", b"system")]
    return b"\x80\x04" + b"".join(words) + b"\x93(" + touch(m) + b"tR."


def _extension(m: Path) -> bytes:
    if ("os", "system") not in copyreg._extension_registry:
        copyreg.add_extension("os", "system", 0xF0)
    return P2 + b"\x82\xf0(" + touch(m) + b"tR."


def _nested_pickle(m: Path) -> bytes:
    inner = (P2 + call("os", "system", touch(m)) + b".").decode("latin1")
    encoded = call("_codecs", "encode", text(inner), text("latin1"))
    return in_state(call("pickle", "loads", encoded))


def _hooks(m: Path) -> bytes:
    hooks = b"ccollections\nOrderedDict\n(](("
    hooks += text("hook") + call("os", "system", touch(m)) + b"tetR"
    return in_state(b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89" + hooks + b"tR")


def _set_state(m: Path) -> bytes:
    value = text("x") + call("builtins", "eval", expression(m))
    return in_state(b"ccollections\nOrderedDict\n)R}(" + value + b"ub")


def _from_type(m: Path) -> bytes:
    made = b"(cos\nsystem\ncbuiltins\nint\n(" + touch(m) + b"tNtR"
    return in_state(b"ctorch._tensor\n_rebuild_from_type_v2\n" + made)


# The gate has a list of what is allowed, so a kind here is a way to get at a function, not a
# function.
PICKLES: dict[str, Make] = {
    "os.system": lambda m: in_state(call("os", "system", touch(m))),
    "pickle in a pickle": _nested_pickle,
    "state of an OrderedDict": _set_state,
    "hooks of a tensor": _hooks,
    "type of a tensor": _from_type,
    "INST": lambda m: P2 + b"(" + touch(m) + b"ios\nsystem\n.",
    "OBJ": lambda m: P2 + b"(csubprocess\nPopen\n" + shell_list(m) + b"o.",
    "NEWOBJ": _newobj,
    "STACK_GLOBAL": _stack_global,
    "registered extension": _extension,
    "torch.load": lambda m: in_state(call("torch.serialization", "load", text(str(m)))),
    "bytes of any number": lambda m: in_state(b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR"),
    "persistent id in text": lambda m: P2 + b"Pos.system\n.",
}
LIVE = tuple(PICKLES)[:-3]


def archive(content: bytes, **more: bytes) -> bytes:
    """A checkpoint file with ``content`` as its pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as entries:
        entries.writestr("archive/data.pkl", content)
        entries.writestr("archive/byteorder", b"little")
        for name, value in more.items():
            entries.writestr(name, value)
        entries.writestr("archive/version", b"3\n")
    return file.getvalue()


def _legacy(m: Path) -> bytes:
    """torch's format before 1.6: pickles one after another."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    evil = PICKLES["os.system"](m)
    return b"".join(pickle.dumps(part, 2) for part in parts) + evil + pickle.dumps([], 2)


def _tar(m: Path) -> bytes:
    """torch's format before 0.1.10."""
    file, content = io.BytesIO(), PICKLES["os.system"](m)
    with tarfile.open(fileobj=file, mode="w") as entries:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            entries.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _compressed(m: Path) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as entries:
        entries.writestr("archive/data.pkl", P2 + b"}.")
        entries.writestr("archive/data/0", bytes(10**7))
    return file.getvalue()


def _twice(m: Path) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as entries:
        warnings.simplefilter("ignore")
        entries.writestr("archive/data.pkl", P2 + b"}.")
        entries.writestr("archive/data.pkl", PICKLES["os.system"](m))
    return file.getvalue()


def _overlap(m: Path) -> bytes:
    """Two entries of the directory that lead to the same bytes."""
    more = {"archive/data/0": bytes(4096), "archive/data/1": b""}
    content = bytearray(archive(P2 + b"}.", **more))
    one, two = (bytes(content).rindex(name.encode()) - 46 for name in more)
    content[two + 16 : two + 28] = content[one + 16 : one + 28]
    content[two + 42 : two + 46] = content[one + 42 : one + 46]
    return bytes(content)


def _huge(m: Path) -> bytes:
    """A directory that claims a terabyte."""
    content = bytearray(archive(P2 + b"}.", **{"archive/data/0": bytes(8)}))
    at = bytes(content).rindex(b"archive/data/0") - 46
    content[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    return bytes(content)


def _with(name: str) -> Make:
    return lambda m: archive(P2 + b"}.", **{name: PICKLES["os.system"](m)})


FILES: dict[str, Make] = {
    "bare pickle": PICKLES["os.system"],
    "bare pickle of protocol 0": lambda m: b"cos\nsystem\n(S'touch " + str(m).encode() + b"'\ntR.",
    "legacy torch file": _legacy,
    "legacy tar file": _tar,
    "compressed entries": _compressed,
    "an entry twice": _twice,
    "TorchScript": _with("archive/constants.pkl"),
    "a path that leads out": _with("../../escaped"),
    "an absolute path": _with("/tmp/escaped"),
    "a path with backslashes": _with("archive\\..\\..\\escaped"),
    "two archives in one": _with("other/data.pkl"),
    "overlapping entries": _overlap,
    "a terabyte": _huge,
    "no pickle": lambda m: b"PK\x05\x06" + bytes(18),
    "nothing": lambda m: b"",
    "a program": lambda m: b"#!/bin/sh\ntouch " + str(m).encode() + b"\n",
}


def files(marker: Path) -> dict[str, bytes]:
    """Every kind as the content of a checkpoint file."""
    made = {name: archive(make(marker)) for name, make in PICKLES.items()}
    return made | {name: make(marker) for name, make in FILES.items()}


def sealed(content: bytes) -> bytes:
    """With the checksum that a checkpoint ends with: a stranger can make one as well."""
    digest = hashlib.sha256(content).hexdigest().encode()
    return content + b"\nconadv checkpoint 2 sha256 %s bytes %016d\n" % (digest, len(content))
