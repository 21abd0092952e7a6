"""Mutated configs, records, checkpoints, summaries, specs and profiles end in a result or an error.

Two kinds of targets. READERS get bytes that are changed at random: the functions that read a
stranger's file first. COMMANDS get a whole run of which one file has other values in its places
(with a valid seal, where it is a checkpoint), so that what lies behind the first check is reached.
An error is a ConadvError, or exit code 2. A crash is anything else, or an input that takes longer
than SLOW seconds.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conadv import safe_io
from conadv.cli.program import main
from conadv.config.files import dump_yaml, load_yaml
from conadv.config.resolve import resolve
from conadv.errors import ConadvError
from conadv.models.make import arguments
from conadv.planning.profile import load as load_profile
from conadv.sweep.spec import load_spec
from conadv.training import checkpoint, record

from . import trials

SLOW = 10.0
SEED = 20
EACH = 100  # inputs of a reader in one trial; of a command a 25th
FULL, SHORT = 1_000, 1  # trials of each target
ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    b"NaN 1e999 -1 null true [] {} &a *a <<: = 4/0 !!int !!bool !!set_{a} 1:1 "
    b"0xffffffffffffffffffffff !!python/name:os.system cos\nsystem\n R. PK\x01\x02 PK\x05\x06 "
    b"\0 \n \x93 \xff\xfe \xed\xb2\x80 \xe2\x80\xa8"
).split(b" ")
ODD = (None, -1, 0, True, 1.5, 2, "x", [], {}, ["x"], 2**63, 10**400, float("inf"), float("nan"))


def mutate(data: bytes, seeds: list[bytes], draw: random.Random) -> bytes:
    """A few changes: bytes, pieces cut, repeated or taken from another seed, words that mean
    something.
    """
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, width = draw.randint(0, len(out)), draw.choice((1, 1, 2, 4, 8, 64))
        other = draw.choice(seeds)
        begin = draw.randint(0, len(other))
        parts = (
            draw.randbytes(width),
            b"",
            bytes(out[at : at + width]) * draw.choice((2, 50)),
            other[begin : begin + width],
            draw.choice(WORDS),
        )
        out[at : at + width] = draw.choice(parts)
    return bytes(out)


def changed(value: Any, draw: random.Random) -> Any:
    """A copy of lists, objects and plain values (others stay) of which one to three places became
    ODD or went.
    """
    found = _copied(value)
    for _ in range(draw.randint(1, 3)):
        if places := list(_places(found)):
            holder, key = draw.choice(places)
            if draw.random() < 0.1:
                del holder[key]
            else:
                holder[key] = copy.copy(draw.choice(ODD))
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of everything within ``value``."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def _config(file: Path) -> None:
    found = resolve(load_yaml(file))
    file.write_text(dump_yaml(found))
    assert load_yaml(file) == found


def _record(file: Path) -> None:
    json.dumps(record.read_lines(file), allow_nan=False)
    record.truncate(file, record.read_lines(file), 2)


def _checkpoint(file: Path) -> None:
    import torch

    sealed = io.BytesIO()
    seal = checkpoint._Sealed(sealed)
    seal.write(file.read_bytes())
    seal.seal()
    file.write_bytes(sealed.getvalue())
    checkpoint.load(file, torch.device("cpu"))


def _args(file: Path) -> None:
    arguments(file.read_bytes().decode("utf-8", "replace").split("\0"))


READERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "config": ("run/config.yaml", _config),
    "record": ("run/record.jsonl", _record),
    "checkpoint": ("run/checkpoints/step_00000002.pt", _checkpoint),
    "archive": ("run/checkpoints/step_00000002.pt", safe_io.check_archive),
    "spec": ("spec.yaml", load_spec),
    "profile": ("profile.json", load_profile),
    "args": ("args", _args),
}
"""Target -> the file that is changed, and what reads it."""
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "state": ("run/checkpoints/step_00000002.pt", ("export", "eval", "train")),
    "lines": ("run/record.jsonl", ("report", "timeline", "watch", "export", "train")),
    "summary": ("run/summary.json", ("report", "watch")),
    "settings": ("run/config.yaml", ("report", "export", "train")),
}
"""Target -> the file of a run whose values are changed, and the commands that then get it."""


def _exit_code(args: list[str]) -> bool:
    """Whether a command accepts its input. AssertionError for a code that stands for neither result
    nor error.
    """
    try:
        code = main(args)
    except SystemExit as stop:  # how tyro ends
        code = int(stop.code or 0)
    assert code in (0, 1, 2), f"exit code {code} of {args}"
    return code < 2


def _run_command(name: str, run: Path) -> bool:
    more = {
        "report": ["--out", str(run.parent / "page" / "report.html")],
        "watch": ["--once"],
        "train": ["--config", str(run / "config.yaml"), "--out", str(run), "--resume", "--quiet"],
    }
    args = [name, *([] if name == "train" else [str(run)]), *more.get(name, [])]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return _exit_code(args)


def _write_changed(file: Path, draw: random.Random) -> None:
    """The values of ``file`` with changes, in its own form."""
    if file.suffix == ".pt":
        import torch

        state = torch.load(file, weights_only=True)
        # what it says of itself is a small part, and would hardly be met among all tensors
        said = {
            key: state[key] for key in ("step", "channels", "image_size", "class_names", "best")
        }
        state = changed(state, draw) if draw.random() < 0.5 else {**state, **changed(said, draw)}
        checkpoint._write(file, state)
    elif file.suffix == ".jsonl":
        lines = changed([json.loads(line) for line in file.read_text().splitlines()], draw)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif file.suffix == ".json":
        file.write_text(json.dumps(changed(json.loads(file.read_text()), draw)))
    else:
        file.write_text(json.dumps(changed(safe_io.read_yaml(file), draw)))  # JSON is YAML


def make_base(base: Path) -> None:
    """Genuine files of every kind. The run can go on for one step, so that a state has to survive
    an update.
    """
    shutil.rmtree(base, ignore_errors=True)
    run = base / "run"
    options = (
        "--method conadv --steps 3 --global-batch-size 8 --model.width 2 --quiet "
        "--data.train-images 40 --schedule.warmup-epochs 0 --eval.train-images 8 "
        "--eval.robust-images 0 --checkpoint.every-epochs 0.2"
    )
    assert main(["train", "digits", *options.split(), "--out", str(run)]) == 0
    (run / "checkpoints" / "step_00000003.pt").unlink()
    shutil.copy(min((ROOT / "studies").glob("*.yaml")), base / "spec.yaml")
    shutil.copy(ROOT / "tests" / "golden" / "plan_profile.json", base / "profile.json")
    (base / "args").write_bytes(b"drop_rate=0.1\0act=gelu")


def try_out(check: Callable[[], object], what: str, file: Path) -> bool:
    """Whether an input is accepted. AssertionError, with the input, for a crash."""
    data, begin = file.read_bytes(), time.process_time()
    try:
        accepted = check() is not False
    except ConadvError:
        accepted = False
    except Exception as error:
        raw = base64.b64encode(data).decode()
        raise AssertionError(f"{what}: {type(error).__name__}: {error}; input {raw}") from error
    seconds = time.process_time() - begin
    assert seconds < SLOW, f"{what} took {seconds:.1f} s"
    return accepted


def trial(number: int, folder: Path) -> dict[str, Any]:
    """Inputs of one target. The first of them is the genuine file, which must be accepted."""
    name = [*READERS, *COMMANDS][number % (len(READERS) + len(COMMANDS))]
    draw, base, work = random.Random(f"{SEED}/{number}"), folder / "base", folder / "work"
    inputs, accepted = EACH if name in READERS else EACH // 25, 0
    path, read = READERS[name] if name in READERS else COMMANDS[name]
    genuine = (base / path).read_bytes()
    seeds = [genuine, *((base / other).read_bytes() for other, _ in READERS.values())]
    for count in range(inputs):
        file = work / path
        if callable(read):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(mutate(genuine, seeds, draw) if count else genuine)
            found = try_out(lambda: read(file), name, file)  # noqa: B023
        else:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(base, work)
            if count:
                _write_changed(file, draw)
            run_dir = work / "run"
            codes = [try_out(lambda: _run_command(c, run_dir), f"{name}, {c}", file) for c in read]  # noqa: B023
            found = all(codes)
        assert found or count, f"{name}: the genuine file is refused"
        accepted += found
    return {"target": name, "inputs": inputs, "accepted": accepted}


def run(short: bool, out: Path) -> dict[str, Any]:
    if not (out / "base" / "args").exists():
        make_base(out / "base")
    targets = [*READERS, *COMMANDS]
    done = trials(out, len(targets) * (SHORT if short else FULL), lambda n: trial(n, out))
    found = {
        name: {
            key: sum(made[key] for made in done if made["target"] == name)
            for key in ("inputs", "accepted")
        }
        for name in targets
    }
    total = sum(part["inputs"] for part in found.values())
    return {"seed": SEED, "inputs": total, "crashes": 0, "targets": found}
