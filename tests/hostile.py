"""Files that would run code if somebody unpickled or followed them, each a function of the marker that it would make.

A payload that ran has made the marker. ``LIVE`` kinds do run with plain ``pickle.loads``; a test checks it, so that
those which refuse them refuse something.
"""

from __future__ import annotations

import copyreg
import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

P2 = b"\x80\x02"


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


def code(marker: Path) -> bytes:
    return text(f"open({str(marker)!r}, 'w').close()")


def expression(marker: Path) -> bytes:
    return text(f"open({str(marker)!r}, 'w')")


def shell_list(marker: Path) -> bytes:
    return b"](" + text("touch") + text(str(marker)) + b"e"


def _inst(m: Path) -> bytes:
    return P2 + b"(" + touch(m) + b"ios\nsystem\n."


def _obj(m: Path) -> bytes:
    return P2 + b"(csubprocess\nPopen\n" + shell_list(m) + b"o."


def _newobj(m: Path) -> bytes:
    return (
        P2
        + b"csubprocess\nPopen\n("
        + shell_list(m)
        + b"t\x81"
        + b"N0"
        + call("os", "system", touch(m))
        + b"."
    )


def _stack_global(m: Path) -> bytes:
    def short(word: str) -> bytes:
        return b"\x8c" + bytes([len(word)]) + word.encode()

    return b"\x80\x04" + short("os") + short("system") + b"\x93(" + touch(m) + b"tR."


def _extension(m: Path) -> bytes:
    if ("os", "system") not in copyreg._extension_registry:
        copyreg.add_extension("os", "system", 0xF0)
    return P2 + b"\x82\xf0(" + touch(m) + b"tR."


def _getattr(m: Path) -> bytes:
    module = call("importlib", "import_module", text("os"))
    return P2 + b"cbuiltins\ngetattr\n(" + module + text("system") + b"tR(" + touch(m) + b"tR."


def _partial(m: Path) -> bytes:
    return P2 + b"cfunctools\npartial\n(cos\nsystem\n" + touch(m) + b"tR(tR."


def _methodcaller(m: Path) -> bytes:
    caller = call("operator", "methodcaller", text("system"), touch(m))
    return P2 + caller + b"(" + call("importlib", "import_module", text("os")) + b"tR."


def _nested_pickle(m: Path) -> bytes:
    inner = P2 + call("os", "system", touch(m)) + b"."
    encoded = call("_codecs", "encode", text(inner.decode("latin1")), text("latin1"))
    return in_state(call("pickle", "loads", encoded))


def _hooks(m: Path) -> bytes:
    hook = b"(" + text("hook") + call("os", "system", touch(m)) + b"t"
    hooks = b"ccollections\nOrderedDict\n(](" + hook + b"etR"
    return in_state(b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89" + hooks + b"tR")


def _set_state(m: Path) -> bytes:
    return in_state(
        b"ccollections\nOrderedDict\n)R}("
        + text("x")
        + call("builtins", "eval", expression(m))
        + b"ub"
    )


def _dict_key(m: Path) -> bytes:
    return P2 + b"}(" + call("builtins", "exec", code(m)) + b"K\x01u."


def _map(m: Path) -> bytes:
    return P2 + b"cbuiltins\nlist\n(" + b"cbuiltins\nmap\n(cos\nsystem\n](" + touch(m) + b"etRtR."


def _from_type(m: Path) -> bytes:
    func = (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncbuiltins\nint\n("
        + touch(m)
        + b"tNtR"
    )
    return in_state(func)


def _function(m: Path) -> bytes:
    source = compile(f"open({str(m)!r}, 'w').close()", "x", "exec")
    import marshal

    raw = call("_codecs", "encode", text(marshal.dumps(source).decode("latin1")), text("latin1"))
    function = b"ctypes\nFunctionType\n(" + call("marshal", "loads", raw) + b"}" + b"tR"
    return P2 + function + b"(tR."


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda m: in_state(call("os", "system", touch(m))),
    "posix.system": lambda m: in_state(call("posix", "system", touch(m))),
    "eval": lambda m: in_state(call("builtins", "eval", expression(m))),
    "exec": lambda m: in_state(call("builtins", "exec", code(m))),
    "eval of Python 2": lambda m: in_state(call("__builtin__", "eval", expression(m))),
    "open": lambda m: in_state(call("builtins", "open", text(str(m)), text("w"))),
    "os.mkdir": lambda m: in_state(call("os", "mkdir", text(str(m)))),
    "subprocess": lambda m: in_state(call("subprocess", "check_call", shell_list(m))),
    "pty": lambda m: in_state(call("pty", "spawn", shell_list(m))),
    "timeit": lambda m: in_state(call("timeit", "timeit", text("pass"), code(m))),
    "runpy": lambda m: in_state(call("runpy", "_run_code", code(m), b"}")),
    "import and getattr": _getattr,
    "partial": _partial,
    "methodcaller": _methodcaller,
    "map": _map,
    "code object": _function,
    "pickle in a pickle": _nested_pickle,
    "key of a dictionary": _dict_key,
    "state of an OrderedDict": _set_state,
    "hooks of a tensor": _hooks,
    "type of a tensor": _from_type,
    "INST": _inst,
    "OBJ": _obj,
    "NEWOBJ": _newobj,
    "STACK_GLOBAL": _stack_global,
    "registered extension": _extension,
    "torch.load": lambda m: in_state(call("torch.serialization", "load", text(str(m)))),
    "torch.hub": lambda m: in_state(call("torch.hub", "load", text("evil/evil"), text("x"))),
    "numpy object": lambda m: in_state(call("numpy", "load", text(str(m)), b"N\x88")),
    "persistent id in text": lambda m: P2 + b"Pos.system\n.",
    "unknown persistent id": lambda m: in_state(
        b"(" + text("module") + call("os", "system", touch(m)) + b"tQ"
    ),
}
NOT_LIVE = {
    "torch.load",
    "torch.hub",
    "numpy object",
    "persistent id in text",
    "unknown persistent id",
}
LIVE = tuple(name for name in PICKLES if name not in NOT_LIVE)


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
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as entries:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = PICKLES["os.system"](m)
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


def _script(m: Path) -> bytes:
    return archive(
        P2 + b"}.", **{"archive/constants.pkl": PICKLES["os.system"](m), "archive/code/a.py": b"x"}
    )


def _overlap(m: Path) -> bytes:
    """Two entries of the directory that lead to the same bytes."""
    content = bytearray(
        archive(P2 + b"}.", **{"archive/data/0": bytes(4096), "archive/data/1": b""})
    )
    raw = bytes(content)
    one = raw.rindex(b"archive/data/0") - 46
    two = raw.rindex(b"archive/data/1") - 46
    content[two + 16 : two + 28] = raw[one + 16 : one + 28]
    content[two + 42 : two + 46] = raw[one + 42 : one + 46]
    return bytes(content)


def _huge(m: Path) -> bytes:
    """A directory that claims a terabyte."""
    content = bytearray(archive(P2 + b"}.", **{"archive/data/0": bytes(8)}))
    at = bytes(content).rindex(b"archive/data/0") - 46
    content[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    return bytes(content)


def _whole(module: types.ModuleType, m: Path) -> bytes:
    file = io.BytesIO()
    with module.open(file, "wb") as out:  # type: ignore[attr-defined]
        out.write(PICKLES["os.system"](m))
    return file.getvalue()


FILES: dict[str, Callable[[Path], bytes]] = {
    "bare pickle": PICKLES["os.system"],
    "bare pickle of protocol 0": lambda m: b"cos\nsystem\n(S'touch " + str(m).encode() + b"'\ntR.",
    "legacy torch file": _legacy,
    "legacy tar file": _tar,
    "gzip": lambda m: _whole(gzip, m),
    "compressed entries": _compressed,
    "an entry twice": _twice,
    "TorchScript": _script,
    "a path that leads out": lambda m: archive(P2 + b"}.", **{"../../escaped": b"x"}),
    "an absolute path": lambda m: archive(P2 + b"}.", **{str(m): b"x"}),
    "a path with backslashes": lambda m: archive(P2 + b"}.", **{"archive\\..\\..\\escaped": b"x"}),
    "two archives in one": lambda m: archive(
        P2 + b"}.", **{"other/data.pkl": PICKLES["os.system"](m)}
    ),
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


def tensors() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(3.0)}
