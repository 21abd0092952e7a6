"""A function of the user's own as the network: ``module:function``.

To name it is to run its code, so a name alone is not enough. A config may come from somebody else;
the permission cannot: it is :func:`trust`, which the command line calls for the very name that was
typed in this command (``--model mynets:make``), and which a Python program calls itself.
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
from conadv.models import family
from conadv.models.make import Options

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_trusted: dict[str, Callable[..., Any]] = {}


def trust(name: str) -> None:
    """Import ``module:function`` and let runs of this process use it as a model.

    A name of another form is left alone. The current folder is the last place to look for the
    module. Raises ConadvError where there is no such module or function, and where the module
    itself raises something: that is its cause.
    """
    if family(name) != "own":
        return
    if not _NAME.fullmatch(name):
        raise ConadvError(
            f"The model {name!r} is neither timm:NAME, torchvision:NAME nor module:function."
        )
    module_name, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:  # last: a file here must not replace an installed module
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's code raises anything
        raise _failed(f"The module of the model {name!r} cannot be imported", error) from error
    factory = getattr(module, function, None)
    if not callable(factory):
        raise ConadvError(f"The model {name!r}: {module_name} has no function {function!r}.")
    _trusted[name] = factory


def build_own(name: str, in_channels: int, num_classes: int, options: Options) -> nn.Module:
    """What the function makes of num_classes, the channels where it takes them, and ``options``."""
    if name not in _trusted:
        raise ConadvError(
            f"The model {name!r} would import and run code of that name, which a config alone may "
            f"not do. If it is yours or you trust it, say so in this command: --model {name} (in "
            f"Python: conadv.models.own.trust({name!r}))."
        )
    factory = _trusted[name]
    try:
        taken = inspect.signature(factory).parameters
        channels = {key: in_channels for key in ("in_channels", "in_chans") if key in taken}
        model = factory(**{"num_classes": num_classes, **channels, **options})
    except Exception as error:  # the user's code raises anything
        raise _failed(f"{name} cannot make a model", error) from error
    if not isinstance(model, nn.Module):
        raise ConadvError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module.")
    return model


def _failed(what: str, error: Exception) -> ConadvError:
    """What the user's code raised, and where in it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {printable(error)[:500]}"
    where = f"{printable(Path(frame.filename).name)}, line {frame.lineno}"
    return ConadvError(f"{what}: {said} ({where}). --debug shows the traceback.")
