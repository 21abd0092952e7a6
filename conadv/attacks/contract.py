"""What an attack of one's own may get wrong, and what to do about it.

Each of these would otherwise change what is trained without a word, or end in an error of torch's
far from its cause.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from conadv.errors import ConadvError
from conadv.types import Attack, Forward


def check_attack(attack: Any) -> None:
    """ConadvError unless ``attack`` can be called with (forward, x_NCHW, y_N, generator)."""
    if isinstance(attack, type):  # a class may take four arguments too
        raise ConadvError(f"{attack.__name__} is a class: pass an attack, {attack.__name__}(...).")
    try:
        inspect.signature(attack).bind(None, None, None, None)
    except ValueError:  # Python knows no signature, as of some built-in functions
        return
    except TypeError as error:
        raise ConadvError(
            f"{_name(attack)} is no attack: it is called with (forward, x_NCHW, y_N, generator), "
            f"and Python says: {error}. A generator that is not needed is taken all the same."
        ) from error


def run_attack(
    attack: Attack,
    forward: Forward,
    x_NCHW: Tensor,
    y_N: Tensor,
    generator: torch.Generator,
    parameters: Iterable[Tensor] = (),
) -> Tensor:
    """The images that ``attack`` makes, detached.

    Raises ConadvError where they are not like ``x_NCHW``, or where the attack has changed
    ``x_NCHW`` or the gradients of ``parameters``.
    """
    watched = list(parameters)
    before, gradients = _version(x_NCHW), [_gradient(p) for p in watched]
    made: Any = attack(forward, x_NCHW, y_N, generator)
    if not isinstance(made, Tensor):
        found = type(made).__name__
    else:
        found = f"{made.dtype} of shape {tuple(made.shape)} on {made.device}"
    wanted = f"{x_NCHW.dtype} of shape {tuple(x_NCHW.shape)} on {x_NCHW.device}"
    if found != wanted:
        raise ConadvError(f"{_name(attack)} returned {found}, not images like its own: {wanted}.")
    if _version(x_NCHW) != before:
        # They may be the caller's own tensor, and the clean view trains on them afterwards.
        raise ConadvError(
            f"{_name(attack)} changed the clean images in place. Start with x = x_NCHW.clone()."
        )
    if [_gradient(p) for p in watched] != gradients:
        # The attack may run between backward and update: the next update would take them in.
        raise ConadvError(
            f"{_name(attack)} left gradients in the model's parameters. Use "
            "torch.autograd.grad(loss, x) in place of loss.backward()."
        )
    images: Tensor = made.detach()
    return images


def _name(attack: Any) -> str:
    return f"The attack {getattr(attack, '__name__', type(attack).__name__)}"


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # torch counts writes, but not to such tensors


def _gradient(p: Tensor) -> tuple[int, int]:
    return id(p.grad), 0 if p.grad is None else p.grad._version
