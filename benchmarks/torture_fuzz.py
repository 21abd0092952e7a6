"""Fuzzing: mutated configs, records, checkpoints, command lines, profiles and specs end in a result or a ConadvError.

With atheris (pip install '.[fuzz]') each target runs guided by coverage, in a process of its own; without it the
same targets get mutations of the same seeds. ``TARGETS`` says how many inputs each gets; all go through the functions
that the program itself calls. A crash is any other exception, a death of the process, or an input that takes longer
than SLOW seconds; its input is kept beside the result.
"""

from __future__ import annotations

import ast
import atexit
import base64
import contextlib
import functools
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from conadv import safe_io
from conadv.analysis.staleness import table, text
from conadv.analysis.timeline import timeline
from conadv.cli import analyze, staleness
from conadv.cli import program as cli
from conadv.cli.watch import View
from conadv.config import recipes
from conadv.config import schema as config
from conadv.distributed.comm import Comm
from conadv.errors import ConadvError, printable
from conadv.report import tables, write_report, write_sweep_report
from conadv.report.comparison import Comparison, compare, read_sweep
from conadv.report.load import load_run
from conadv.report.page import SECTIONS
from conadv.training import checkpoint, record
from conadv.training.build import Run as Parts
from conadv.training.build import build
from conadv.training.card import _constructor, model_card
from conadv.training.export import export, image_shape
from conadv.training.loop import train
from conadv.training.resume import restore
from conadv.training.resume import scatter as _deal
from conadv.training.run_dir import RunDir

from . import fuzz_structure as structure

ROOT = Path(__file__).resolve().parent.parent
SLOW = 10.0
SEED = 20


@dataclass(frozen=True)
class Target:
    """``check`` gets one input; ``full`` and ``short`` inputs make a campaign."""

    check: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    full: int
    short: int


def fuzz_config(data: bytes) -> None:
    """A config file, through every rule, back to text and again."""
    file = _scratch() / "config.yaml"
    file.write_bytes(data)
    found = config.resolve(config.load_yaml(file))
    file.write_text(config.dump_yaml(found))
    assert config.load_yaml(file) == found


def fuzz_spec(data: bytes) -> None:
    """A spec of `conadv sweep`."""
    from conadv.sweep.spec import load_spec

    file = _scratch() / "spec.yaml"
    file.write_bytes(data)
    load_spec(file)


def fuzz_yaml(data: bytes) -> None:
    """Any text as YAML."""
    import yaml

    try:
        safe_io.parse_yaml(data.decode("utf-8", "replace"))
    except yaml.YAMLError as error:  # the one that its callers expect
        raise ConadvError(printable(error)) from error


def fuzz_record(data: bytes) -> None:
    """A record: read, its timeline, cut for a resume."""
    file = _scratch() / "record.jsonl"
    file.write_bytes(data)
    lines = record.read_lines(file)
    json.dumps(lines, allow_nan=False)
    with contextlib.suppress(ConadvError):
        timeline(lines, "record.jsonl")
    record.truncate(file, 2)
    assert record.read_lines(file) == [line for line in lines if line in record.read_lines(file)]


def fuzz_report(data: bytes) -> None:
    """A run whose record and summary are ``data``, through the report's reader and both templates."""
    run = _scratch() / "run"
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(_CONFIG)
    first, _, second = data.partition(b"\0\0")
    (run / "record.jsonl").write_bytes(first)
    (run / "summary.json").write_bytes(second or b"{}")
    write_report([run], _scratch() / "out" / "report.html")


def fuzz_checkpoint(data: bytes) -> None:
    """A checkpoint file with a valid seal, through both gates."""
    import torch

    file = _scratch() / "step_00000001.pt"
    seal = b"\nconadv checkpoint 2 sha256 %s bytes %016d\n" % (
        hashlib.sha256(data).hexdigest().encode(),
        len(data),
    )
    file.write_bytes(data + seal)
    checkpoint.load(file, torch.device("cpu"))


def fuzz_archive(data: bytes) -> None:
    """The first gate alone."""
    file = _scratch() / "archive.pt"
    file.write_bytes(data)
    safe_io.check_archive(file)


def fuzz_options(data: bytes) -> None:
    """Options, by the parts of the command line that are our own."""
    args = data.decode("utf-8", "surrogateescape").split("\0")
    given = cli.given_settings(args)
    assert given <= config.flatten(config.Config().model_dump()).keys()
    cli._base_config(args, lambda name: config.Config(steps=1))
    config.override(config.Config(steps=1), config.Config(steps=1), given)


def fuzz_command(data: bytes) -> None:
    """A whole command line of a command that computes nothing."""
    args = [part for part in data.decode("utf-8", "surrogateescape").split("\0") if part]
    command = COMMANDS[len(data) % len(COMMANDS)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = cli.main([command, *args])
        except SystemExit as stop:  # how tyro ends
            code = int(stop.code or 0)
    assert code in (0, cli.EXIT_FOUND, cli.EXIT_USER_ERROR), code


def fuzz_train(data: bytes) -> None:
    """A command line of `conadv train` through tyro and every rule, as far as the config that it asks for."""
    import tyro

    args = [part for part in data.decode("utf-8", "surrogateescape").split("\0") if part]
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        try:
            base, prog, rest = cli._base_config(args, recipes.get)
            found = tyro.cli(
                cli.TrainArgs, default=cli.TrainArgs(base, cli.RunOptions()), args=rest, prog=prog
            )
        except SystemExit as stop:  # how tyro ends
            if stop.code not in (0, 2):
                raise AssertionError(f"exit code {stop.code}") from stop
            raise ConadvError(f"tyro: {printable(said.getvalue())[:200]}") from stop
    config.resolve(config.override(base, found.config, cli.given_settings(rest)))


def fuzz_state(data: bytes) -> None:
    """A genuine checkpoint with a few values changed, sealed again, through export, model card and resume.

    Half of the inputs change what it says of itself, some only numbers; one in 200 is traced as well. A state that is
    taken up has to survive an update. The first error is raised at the end.
    """
    import torch

    run, source = RunDir(_trained()), structure.Bytes(data)
    state, tensor = _state(), torch.zeros(2)
    more = (tensor, tensor.long(), {"a": tensor}, list(range(10)), dict.fromkeys(range(10)), 8.0, 2)
    if sum(data) % 8 == 7:  # nothing but other numbers
        name = list(state["model"])[source.below(len(state["model"]))]
        number = (0.0, -1e30, float("inf"), float("nan"))[source.below(4)]
        filled = state["model"][name].detach().clone()
        broken = {
            **state,
            "model": {
                **state["model"],
                name: filled.fill_(number if filled.is_floating_point() else 1),
            },
        }
    elif source.below(2):
        said = {
            key: state[key] for key in ("step", "channels", "image_size", "class_names", "best")
        }
        broken = {
            key: value for key, value in state.items() if key not in said
        } | structure.changed(said, source, more)
    else:
        broken = structure.changed(state, source, more)
    checkpoint._write(run.checkpoints / "step_00000002.pt", broken)
    loaded, _ = checkpoint.find_newest(run.checkpoints, torch.device("cpu"))
    errors: list[ConadvError] = []
    traced = [lambda: export(run.path, kind="torch-export")] if source.below(200) == 199 else []
    for use in (lambda: _exported(run, loaded), *traced, lambda: _go_on(loaded)):
        try:
            use()
        except ConadvError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _exported(run: RunDir, state: dict[str, Any]) -> None:
    export(run.path)
    image_shape(config.resolve(run.open()), state)  # as the other kinds do


def _go_on(state: dict[str, Any]) -> None:
    """What --resume does with a checkpoint, and an update with it."""
    parts = _parts()
    restore(parts, _deal(state, Comm()))
    for parameter in parts.model.parameters():
        parameter.grad = parameter.detach().clone()
    parts.step.optimizer.step()


@functools.cache
def _parts() -> Parts:
    import torch

    return build(config.resolve(RunDir(_trained()).open()), torch.device("cpu"))


def fuzz_args(data: bytes) -> None:
    """Arguments of a network's constructor (model.args), as far as the call that a model card shows."""
    args = data.decode("utf-8", "replace").split("\0")
    name = ("timm:resnet18", "resnet18")[len(data) % 2]
    found = config.parse({"model": {"name": name, "args": args}}, "args")
    ast.parse(_constructor(found, 3, 10))


def fuzz_fields(data: bytes) -> None:
    """A sweep of which one file has values that cannot be, through all that reads such files.

    One input in 200 is drawn as well. The first error is raised at the end: every reader gets every input.
    """
    out, source = _scratch() / "fields", structure.Bytes(data[1:])
    documents = {
        "runs/a/record.jsonl": structure.record(),
        "runs/a/summary.json": structure.summary(),
    }
    documents |= {"sweep.json": structure.sweep(), "runs/a/analysis.json": structure.analysis()}
    name = list(documents)[data[0] % 4 if data else 0]
    for file, content in {**documents, "runs/b/record.jsonl": structure.record()}.items():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text(
            structure.text(structure.changed(content, source) if file == name else content)
        )
    for run in ("a", "b"):
        (out / "runs" / run / "config.yaml").write_text(_CONFIG)
    errors: list[ConadvError] = []
    for read in (*READERS, *(DRAWERS if source.below(200) == 199 else ())):
        try:
            read(out)
        except ConadvError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _read_report(out: Path) -> None:
    _tables(compare([load_run(out / "runs" / name) for name in "ab"]))


def _read_sweep(out: Path) -> None:
    _tables(read_sweep(out))


def _tables(comparison: Comparison) -> None:
    """Everything of a report but its figures, which are slow."""
    for makers in SECTIONS.values():
        for make in makers:
            if make.__module__ == tables.__name__:
                json.dumps(make(comparison).to_numpy().tolist(), allow_nan=False)


def _read_staleness(out: Path) -> None:
    text(table(staleness._lines(RunDir(out / "runs" / "a"))))


def _read_timeline(out: Path) -> None:
    timeline(record.read_lines(out / "runs" / "a" / "record.jsonl"), "record.jsonl")


def _read_watch(out: Path) -> None:
    """One run, then the folder."""
    console = Console(file=io.StringIO(), width=100)
    for path in (out / "runs" / "a", out):
        view = View(path)
        view.look()
        console.print(view.frame(100, 40))


def _read_card(out: Path) -> None:
    state = {"step": 3, "channels": 1, "class_names": ["a", "b"]}
    model_card(RunDir(out / "runs" / "a"), state)


def _read_analysis(out: Path) -> None:
    analyze.table([(out, analyze.read(out / "runs" / "a"))])


def _draw_report(out: Path) -> None:
    write_report([out / "runs"], _scratch() / "drawn" / "report.html")


def _draw_sweep(out: Path) -> None:
    write_sweep_report(out, _scratch() / "drawn" / "sweep.html")


def _draw_staleness(out: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        staleness.command(staleness.StalenessArgs((out / "runs" / "a",)))


READERS = (
    _read_report,
    _read_sweep,
    _read_staleness,
    _read_timeline,
    _read_watch,
    _read_card,
    _read_analysis,
)
DRAWERS = (_draw_report, _draw_sweep, _draw_staleness)
COMMANDS = (
    "recipes",
    "check",
    "export",
    "eval",
    "report",
    "timeline",
    "staleness",
    "watch",
    "analyze",
    "trian",
)


@functools.cache
def _trained() -> Path:
    """A run of two steps, whose checkpoint has a batch that waits."""
    run = _scratch() / "trained"
    small = config.replace(
        config.Config(method="conadv", steps=2, global_batch_size=8), model__width=2
    )
    train(config.resolve(config.replace(small, eval__robust_images=0, eval__train_images=8)), run)
    return run


@functools.cache
def _state() -> Any:
    import torch

    return checkpoint.load(RunDir(_trained()).checkpoints / "step_00000002.pt", torch.device("cpu"))


def fuzz_profile(data: bytes) -> None:
    """A profile of `conadv plan`."""
    from conadv.planning.profile import load

    file = _scratch() / "profile.json"
    file.write_bytes(data)
    load(file)


def fuzz_image(data: bytes) -> None:
    """An image file."""
    from conadv.data.images import read_rgb

    file = _scratch() / "image.png"
    file.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about damaged tags
        read_rgb(file)


_FOLDER: list[Path] = []


def _scratch() -> Path:
    """A folder of this process, which is removed when it ends."""
    if not _FOLDER:
        _FOLDER.append(Path(tempfile.mkdtemp(dir=_memory())))
        atexit.register(shutil.rmtree, _FOLDER[0], ignore_errors=True)
    return _FOLDER[0]


def _memory() -> str | None:
    """A file system in memory, where there is one; TMPDIR goes before."""
    return "/dev/shm" if "TMPDIR" not in os.environ and os.access("/dev/shm", os.W_OK) else None


_CONFIG = "method: vanilla\nseed: 0\nsteps: 2\n"


def _config_seeds() -> list[bytes]:
    whole = config.dump_yaml(config.resolve(config.Config(method="conadv", steps=3)))
    small = [
        "steps: 1\n",
        "epochs: 0.5\nattack: {eps: 4/255}\n",
        "data:\n  mean: [0.1, 0.2]\n",
        "a: &a [*a]\n",
    ]
    small += [
        'steps: !!int ""\n',
        'epochs: !!float ""\n',
        "steps: !!bool x\n",
        "seed: 0x1f\nsteps: 0b11\nlr: 0o17\n",
    ]
    small += [
        "steps: 1:30:00\n",
        "0xffff: 1\n2024-01-01: 3\n",
        "? [a]\n: !!timestamp x\n",
        "a: {<<: {b: 1}}\n",
    ]
    return [whole.encode(), *(text.encode() for text in small)]


def _spec_seeds() -> list[bytes]:
    return [file.read_bytes() for file in sorted((ROOT / "studies").glob("*.yaml"))]


def _record_seeds() -> list[bytes]:
    lines = structure.record()
    return [structure.text(part).encode() for part in (lines, lines[:2], lines[3:], lines[-9:])]


def _report_seeds() -> list[bytes]:
    return [
        seed + b"\0\0" + structure.text(structure.summary()).encode() for seed in _record_seeds()
    ]


def _checkpoint_seeds() -> list[bytes]:
    import torch

    folder = _scratch() / "seeds"
    state = {
        "model": {"weight": torch.arange(3.0)},
        "optimizer": {"state": {}},
        "class_names": ["a"],
    }
    path = checkpoint.save(folder, 1, {**state, "engine": {"version": 1}, "best": None}, 1)
    archive = path.read_bytes()[: -checkpoint.SEAL_BYTES]
    return [archive, archive[:300]]


def _command_seeds() -> list[bytes]:
    lines = [
        "digits\0--lr\0" + "1",
        "--config\0x.yaml\0--steps=3",
        "--data.dir\0/nowhere\0--no-lookahead",
        "digits\0--method\0conadv\0--staleness\0"
        + "2\0--attack.eps=4/255\0--optim.name=lamb\0--no-lookahead",
        "cifar10\0--data.mean\0" + "0.1\0" + "0.2\0" + "0.3\0--steps=None\0--epochs=0.5\0--out\0x",
        "-h",
        "--debug",
    ]
    return [line.encode() for line in lines]


def _args_seeds() -> list[bytes]:
    lines = [
        "drop_rate=0.1",
        "img_size=64\0act=gelu",
        "a=[1, {b: &c 2}]",
        "a=2024-01-01\0b=",
        "x=1e999\0y=.nan",
        "0",
    ]
    return [line.encode() for line in lines]


def _profile_seeds() -> list[bytes]:
    file = ROOT / "tests" / "golden" / "plan_profile.json"
    return [file.read_bytes()[:4000], file.read_bytes(), b"{}"]


def _image_seeds() -> list[bytes]:
    from PIL import Image

    made = []
    for mode, kind in (
        ("RGB", "PNG"),
        ("L", "JPEG"),
        ("P", "PNG"),
        ("CMYK", "JPEG"),
        ("RGB", "WEBP"),
        ("RGB", "TIFF"),
    ):
        file = io.BytesIO()
        Image.radial_gradient("L").resize((12, 9)).convert(mode).save(file, kind)
        made.append(file.getvalue())
    return [*made, b"P6 3 2 255 " + bytes(18), b"BM" + bytes(60)]


TARGETS = {
    "config": Target(fuzz_config, _config_seeds, 120_000, 800),
    "spec": Target(fuzz_spec, _spec_seeds, 60_000, 500),
    "yaml": Target(fuzz_yaml, _config_seeds, 120_000, 2_000),
    "record": Target(fuzz_record, _record_seeds, 250_000, 2_000),
    "report": Target(fuzz_report, _report_seeds, 1_500, 12),
    "checkpoint": Target(fuzz_checkpoint, _checkpoint_seeds, 150_000, 2_000),
    "archive": Target(fuzz_archive, _checkpoint_seeds, 160_000, 2_000),
    "options": Target(fuzz_options, _command_seeds, 30_000, 200),
    "command": Target(fuzz_command, _command_seeds, 6_000, 60),
    "args": Target(fuzz_args, _args_seeds, 40_000, 1_000),
    "train": Target(fuzz_train, _command_seeds, 2_000, 20),
    "state": Target(fuzz_state, lambda: structure.seeds(40), 400, 60),
    "fields": Target(fuzz_fields, lambda: structure.seeds(60), 500, 100),
    "profile": Target(fuzz_profile, _profile_seeds, 100_000, 1_000),
    "image": Target(fuzz_image, _image_seeds, 150_000, 2_000),
}


def accepted(check: Callable[[bytes], None], data: bytes) -> bool:
    """Whether ``data`` was accepted; False for a ConadvError. Anything else, or taking too long, is an error."""
    begin = time.process_time()  # a busy machine, or the first import, is not the input's fault
    try:
        check(data)
    except ConadvError as error:
        message = str(error)
        message.encode("utf-8", "strict")  # or it could not be written into a record
        return False
    finally:
        assert time.process_time() - begin < SLOW, f"an input took more than {SLOW} s"
    return True


def mutate(data: bytes, seeds: list[bytes], draw: random.Random) -> bytes:
    """A few changes: bytes, pieces cut, repeated or taken from another seed, words that mean something."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randint(0, len(out))
        width = min(draw.choice((1, 1, 2, 4, 8, 64)), len(out) - at)
        what = draw.randrange(6)
        if what == 0:
            out[at : at + width] = draw.randbytes(width)
        elif what == 1:
            del out[at : at + width]
        elif what == 2:
            out[at:at] = out[at : at + width] * draw.choice((1, 2, 50))
        elif what == 3:
            other = draw.choice(seeds)
            begin = draw.randint(0, len(other))
            out[at : at + width] = other[begin : begin + draw.randint(0, 64)]
        elif what == 4:
            out[at : at + width] = draw.choice(WORDS)
        elif at < len(out):
            out[at] ^= 1 << draw.randrange(8)
    return bytes(out)


WORDS = [
    *(
        b"NaN",
        b"1e999",
        b"-1",
        b"0",
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'""',
        b"9" * 400,
        b"\xff\xfe",
        b"\0",
        b"\n",
    ),
    *(
        b"[" * 300,
        b"!!python/name:os.system",
        *(
            b'!!int ""',
            b"!!float x",
            b"!!bool x",
            b"!!binary x",
            b"!!set {a}",
            b"0x" + b"f" * 300,
            b"1:" * 30 + b"1",
        ),
        b"&a",
        b"*a",
        b"<<: ",
        b"../",
        b"--config",
        b"=",
        b"4/0",
        b"\xed\xb2\x80",
    ),
    *(
        b"cos\nsystem\n",
        b"\x93",
        b"R.",
        b"PK\x01\x02",
        b"PK\x05\x06",
        b"\xff\xff\xff\xff",
        b'"type": []',
        b"\xe2\x80\xa8",
    ),
]


def worker(name: str, count: int, seed: int, result: Path, guided: bool) -> None:
    """One target in this process: ``count`` inputs, counts into ``result`` now and then, a crash as well."""
    target = TARGETS[name]
    seeds = target.seeds()
    tally = {"inputs": 0, "accepted": 0}

    def one(data: bytes) -> None:
        try:
            tally["accepted"] += accepted(target.check, data)
        except BaseException as error:
            crash = {
                "error": f"{type(error).__name__}: {error}",
                "input": base64.b64encode(data).decode(),
            }
            result.write_text(json.dumps({**tally, **crash}))
            raise
        tally["inputs"] += 1
        if tally["inputs"] % 500 == 0 or tally["inputs"] >= count:
            result.write_text(json.dumps(tally))

    for data in seeds:
        one(data)
    if guided:
        _guided(one, seeds, count, seed)
    else:
        draw = random.Random(seed)
        while tally["inputs"] < count:
            one(mutate(draw.choice(seeds), seeds, draw))


def _functions() -> list[Any]:
    """What tells libFuzzer of new code: functions and methods of the modules that read what somebody else wrote."""
    from conadv.engine import validate as fits
    from conadv.planning import profile
    from conadv.report import load
    from conadv.sweep import spec
    from conadv.training import documents

    found: list[Any] = []
    for module in (
        safe_io,
        config,
        record,
        checkpoint,
        cli,
        documents,
        fits,
        profile,
        load,
        spec,
    ):
        own = [
            member
            for member in vars(module).values()
            if getattr(member, "__module__", "") == module.__name__
        ]
        methods = [
            method for member in own if isinstance(member, type) for method in vars(member).values()
        ]
        found += [member for member in (*own, *methods) if hasattr(member, "__code__")]
    return found


def _guided(one: Callable[[bytes], None], seeds: list[bytes], count: int, seed: int) -> None:
    """By atheris: libFuzzer's mutations, kept where they reach new code. Ends the process."""
    import atheris

    corpus = _scratch() / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)
    for function in _functions():
        atheris.instrument_func(function)
    options = [
        f"-runs={count}",
        f"-seed={seed}",
        "-max_len=8192",
        "-rss_limit_mb=4096",
        "-print_final_stats=0",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def guided_possible() -> bool:
    try:
        import atheris  # noqa: F401
    except ImportError:
        return False
    return True


def run(short: bool, out: Path) -> dict[str, Any]:
    """All targets, in full each in a process of its own; a finished one is not repeated after a cut."""
    out.mkdir(parents=True, exist_ok=True)
    guided = guided_possible() and not short
    found: dict[str, Any] = {}
    for name, target in TARGETS.items():
        file = out / f"{name}.json"
        count = target.short if short else target.full
        if not file.exists() or json.loads(file.read_text())["inputs"] < count:
            worker(name, count, SEED, file, False) if short else _start(name, count, file, guided)
        found[name] = json.loads(file.read_text())
        assert "error" not in found[name], f"{name}: {found[name]}"
        assert found[name]["inputs"] >= count, (
            f"{name}: only {found[name]['inputs']} inputs of {count}"
        )
        assert found[name]["accepted"], (
            f"{name}: nothing was accepted, so nothing past the first check was reached"
        )
    total = sum(part["inputs"] for part in found.values())
    return {
        "seed": SEED,
        "guided_by_coverage": guided,
        "inputs": total,
        "crashes": 0,
        "targets": found,
    }


def _start(name: str, count: int, file: Path, guided: bool) -> None:
    """A process, so that a death of it is seen and what libFuzzer does to a process stays there."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.torture_fuzz",
        name,
        str(count),
        str(file),
        str(int(guided)),
    ]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(
        dir=_memory()
    ) as folder:  # libFuzzer ends a process without Python's way out
        environment = {**os.environ, "TMPDIR": folder}
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=4 * 3600,
        )
    tally = json.loads(file.read_text()) if file.exists() else {"inputs": 0, "accepted": 0}
    if done.returncode and "error" not in tally:
        tally["error"] = f"exit code {done.returncode}: {done.stderr[-2000:]}"
    file.write_text(json.dumps({**tally, "seconds": round(time.monotonic() - begin, 1)}))


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), SEED, Path(sys.argv[3]), sys.argv[4] == "1")
