"""A function of the user's own as the network: ``module:function``.

To name it is to run its code, so a name alone is not enough. A config may come from somebody else; the permission
cannot: it is :func:`trust`, which the command line calls for the very name that was typed in this command
(``--model mynets:make``), and which a Python program calls itself.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from conadv.errors import ConadvError, printable
from conadv.models.zoo import TIMM, TORCHVISION, Options

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_trusted: dict[str, Callable[..., Any]] = {}


def is_own(name: str) -> bool:
    """Whether ``name`` has the form module:function."""
    return ":" in name and not name.startswith((TIMM, TORCHVISION))


def trust(name: str) -> None:
    """Import ``module:function`` and let runs of this process use it as a model. A name of another form is left alone.

    The current folder counts as the last place to look for the module. Raises ConadvError where there is no such
    module or function, and where the module itself raises something: that is its cause.
    """
    if not is_own(name):
        return
    if not _NAME.fullmatch(name):
        raise ConadvError(
            f"The model {name!r} is neither timm:NAME, torchvision:NAME nor module:function."
        )
    module_name, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(
            str(Path.cwd())
        )  # last: a file here must not take the place of an installed module
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise ConadvError(
                f"The model {name!r}: there is no module {error.name!r} here or installed."
            ) from error
        raise _failed(f"The module of the model {name!r} cannot be imported", error) from error
    except Exception as error:  # somebody's code, which raises anything
        raise _failed(f"The module of the model {name!r} cannot be imported", error) from error
    factory = getattr(module, function, None)
    if not callable(factory):
        raise ConadvError(f"The model {name!r}: {module_name} has no function {function!r}.")
    _check_signature(name, factory)
    _trusted[name] = factory


def build_own(name: str, in_channels: int, num_classes: int, options: Options) -> nn.Module:
    """What the function returns for num_classes, the channels where it takes them, and ``options``."""
    if name not in _trusted:
        raise ConadvError(
            f"The model {name!r} would import and run code of that name, which a config alone may not do. If it is "
            f"yours or you trust it, say so in this command: --model {name} (in Python: conadv.models.trust({name!r}))."
        )
    factory = _trusted[name]
    accepted = _parameters(factory)
    given = {key: in_channels for key in ("in_channels", "in_chans") if key in accepted}
    unknown = set(options) - set(accepted) if not _takes_any(factory) else set()
    if unknown:
        raise ConadvError(f"model.args: {name} takes no argument {min(unknown)!r}.")
    try:
        model = factory(num_classes=num_classes, **given, **options)
    except Exception as error:  # somebody's code, which raises anything
        raise _failed(f"{name} cannot make a model", error) from error
    if not isinstance(model, nn.Module):
        raise ConadvError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module.")
    return model


def _failed(what: str, error: Exception) -> ConadvError:
    """What somebody's code raised, and where in it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {printable(error)[:500]}"
    return ConadvError(
        f"{what}: {said} ({printable(Path(frame.filename).name)}, line {frame.lineno}). --debug shows the traceback."
    )


def _check_signature(name: str, factory: Callable[..., Any]) -> None:
    if "num_classes" not in _parameters(factory) and not _takes_any(factory):
        raise ConadvError(
            f"{name} must take num_classes: def {name.partition(':')[2]}(num_classes, ...) -> nn.Module."
        )


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What can be given by name."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: p for key, p in _signature(factory).parameters.items() if p.kind in named}


def _takes_any(factory: Callable[..., Any]) -> bool:
    return any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in _signature(factory).parameters.values()
    )


def _signature(factory: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(factory)
    except ValueError as error:  # of some functions in C
        raise ConadvError(
            f"What {factory!r} takes cannot be told: wrap it in a function of your own."
        ) from error
