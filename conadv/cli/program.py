"""``conadv COMMAND``: the table of commands, and how errors become messages and exit codes.

Every command is a module of this folder with ``Args`` (its options) and ``command(args)``, which
returns False where it found something wrong (exit code 1). A module is imported when its command is
called: ``conadv --help`` does not wait for torch.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from pydantic import ValidationError

import conadv
from conadv.cli.options import parse, say
from conadv.errors import ConadvError, printable_lines, unknown

EXIT_FOUND = 1
EXIT_USER_ERROR = 2
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141  # 128 + SIGPIPE, as a shell reports a program that SIGPIPE ends

COMMANDS: dict[str, tuple[str, str, str]] = {  # name: (module, arguments, summary)
    "train": ("train", "RECIPE|--config FILE", "train; `conadv train` lists the recipes"),
    "eval": ("evaluate", "RUN", "evaluate a trained run, clean and under attack"),
    "export": ("export", "RUN", "the clean route as safetensors, torch.export program or ONNX"),
    "report": ("report", "RUN...", "an HTML and Markdown report about runs or a sweep"),
    "sweep": ("sweep", "SPEC", "a grid of runs: tuned on held-out images, confirmed, reported"),
    "watch": ("watch", "PATH", "a live view of a run, a sweep or a folder of runs"),
    "analyze": ("analyze", "RUN...", "Hessian, sharpness, robust accuracy"),
    "timeline": ("timeline", "RUN", "what ran beside what: a trace, a picture, hidden shares"),
    "staleness": ("staleness", "RUN...", "attacks at stale and at predicted weights"),
    "plan": ("plan", "PROFILE", "step time, cost and best split for machines you do not have"),
    "bench": ("bench", "WHAT", "timings: attack-cost, data"),
    "check": ("check", "DIR", "list the images of a folder that training would stumble over"),
    "doctor": ("doctor", "", "what is installed and seen, and what would be slow or wrong"),
    "demo": ("demo", "", "the main comparison on the embedded digits, a few minutes"),
    "slurm": ("slurm", "", "print a Slurm script for the ImageNet recipes"),
    "recipes": ("recipes", "", "list the recipes"),
}


def help_text() -> str:
    rows = [f"  {f'{name} {args}':<28} {about}" for name, (_, args, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: conadv COMMAND [options]",
            "",
            "Large-batch training with concurrent adversarial learning.",
            "",
            *rows,
            "",
            "  --version, --help            `conadv COMMAND --help` has the details",
            "  --debug                      show tracebacks (also with CONADV_DEBUG=1)",
            "",
            "exit codes: 0 done, 1 check or doctor found something, 2 an error to act on,",
            "70 a bug of conadv, 130 interrupted, 143 terminated (saved), 141 broken pipe",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code.

    An error is one message. With --debug, or CONADV_DEBUG in the environment, the traceback comes
    before it.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("CONADV_DEBUG", "0") not in ("", "0") or "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    _prepare_output()
    try:
        code = _dispatch(args)
        sys.stdout.flush()  # a closed pipe shows here, not when Python ends
    except BrokenPipeError:
        if debug:
            traceback.print_exc()
        with suppress(OSError, ValueError):  # so that Python does not complain when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        code, message = _explain(error)
        if message:
            sys.stderr.write(f"conadv: {printable_lines(message)}\n")
    return code


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        say(help_text())
    elif args[0] == "--version":
        say(conadv.__version__)
    elif args[0] not in COMMANDS:
        raise unknown("command", args[0], COMMANDS)
    else:
        name, rest = args[0], args[1:]
        module = import_module(f"conadv.cli.{COMMANDS[name][0]}")
        if hasattr(module, "main"):  # it parses its own options
            module.main(rest)
        elif module.command(parse(module.Args, rest, f"conadv {name}")) is False:
            return EXIT_FOUND
    return 0


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit code for an error, and its message. What all ranks raise is said once."""
    is_main = os.environ.get("RANK", "0") == "0"
    if isinstance(error, ConadvError):
        return EXIT_USER_ERROR, str(error) if is_main or not error.agreed else ""
    if isinstance(error, ValidationError):
        from conadv.config.files import explain

        return EXIT_USER_ERROR, str(explain(error, "options"))
    if isinstance(error, KeyboardInterrupt):
        if (code := getattr(error, "code", None)) is not None:  # training.signals.Stopped
            return code, f"stopped{error}" if is_main else ""
        return EXIT_INTERRUPTED, f"interrupted{''.join(map(str, error.args))}"
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        advice = "Check the path, its permissions and free space."
        return EXIT_USER_ERROR, f"{error.strerror or error}{where}. {advice}"
    out_of_memory = "out of memory" in str(error) or "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or out_of_memory:
        advice = "Choose a smaller micro_batch_size, image_size or model."
        return EXIT_USER_ERROR, f"Out of memory: {error}. {advice}"
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(conadv.__file__).parent
    ours = [frame for frame in frames if package in Path(frame.filename).parents]
    frame = (ours or list(frames))[-1]
    return EXIT_BUG, (
        f"Unexpected {type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}: "
        f"{error}. This is a bug of conadv: please report it with what --debug shows."
    )


def _prepare_output() -> None:
    """Output that can neither be missing nor refuse a character."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with its output closed (`>&-`)
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII locale must not end a run
