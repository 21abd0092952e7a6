"""Parameter groups by rules that cover every parameter: weights decay and adapt, norm and bias parameters do neither.

The parameters of every batch-norm route are norm parameters like those of the layer itself, since a parameter is
judged by the module that owns it, wherever that module hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from conadv.errors import ConadvError

NORM_LAYERS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Rule:
    """Which parameters form the group ``name``, and whether they get weight decay and the trust ratio.

    ``matches`` takes the owning module, the parameter's own name in it ("weight") and the parameter.
    """

    name: str
    matches: Callable[[nn.Module, str, Tensor], bool]
    decay: bool
    adapt: bool


DEFAULT_RULES = (
    Rule("norm", lambda module, name, p: isinstance(module, NORM_LAYERS), decay=False, adapt=False),
    Rule(
        "bias",
        lambda module, name, p: name == "bias" or name.endswith("_bias"),
        decay=False,
        adapt=False,
    ),
    Rule("weights", lambda module, name, p: p.dim() >= 2, decay=True, adapt=True),
)
"""The first rule that matches decides."""


def _is_vector(module: nn.Module, name: str, p: Tensor) -> bool:
    return p.dim() < 2 or (name != "weight" and p.numel() == max(p.shape))


MODEL_RULES = (
    *DEFAULT_RULES[:2],
    Rule("scale", _is_vector, decay=False, adapt=False),
    DEFAULT_RULES[2],
)
"""What networks by name train with: vectors and scalars of any kind (LayerScale gammas, PReLU slopes, class tokens)
get neither decay nor trust ratio, as in timm and in the large-batch literature for norm and bias."""


def parameter_groups(
    model: nn.Module, *, weight_decay: float, rules: Sequence[Rule] = DEFAULT_RULES
) -> list[dict[str, Any]]:
    """Groups for LARS, LAMB or any torch optimizer: dicts with name, params, weight_decay, adapt.

    Every trainable parameter is in exactly one group (a shared one where it is first met); those with
    ``requires_grad`` off are left out, and so are groups without a parameter. Groups come in the order of the rules.

    Raises: ConadvError if a parameter matches no rule, if two rules of one name differ, or if nothing is trainable.
    """
    groups: dict[str, dict[str, Any]] = {
        name: {
            "name": name,
            "params": [],
            "weight_decay": weight_decay if decay else 0.0,
            "adapt": adapt,
        }
        for name, (decay, adapt) in _settings(rules).items()
    }
    for module, path, name, parameter in _trainable(model):
        rule = next((rule for rule in rules if rule.matches(module, name, parameter)), None)
        if rule is None:
            raise _uncovered(module, path, parameter)
        groups[rule.name]["params"].append(parameter)
    filled = [group for group in groups.values() if group["params"]]
    if not filled:
        raise ConadvError(
            "The model has no trainable parameter: every one has requires_grad=False, or there is none."
        )
    return filled


def describe(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per group for a table or a record: name, tensors, parameters, weight_decay, adapt."""
    return [
        {
            "name": group.get("name", f"group {i}"),
            "tensors": len(group["params"]),
            "parameters": sum(p.numel() for p in group["params"]),
            "weight_decay": group["weight_decay"],
            "adapt": group["adapt"],
        }
        for i, group in enumerate(groups)
    ]


def _settings(rules: Sequence[Rule]) -> dict[str, tuple[bool, bool]]:
    settings: dict[str, tuple[bool, bool]] = {}
    for rule in rules:
        if settings.setdefault(rule.name, (rule.decay, rule.adapt)) != (rule.decay, rule.adapt):
            raise ConadvError(
                f"Two rules named {rule.name!r} differ in decay or adapt. Give one of them another name."
            )
    return settings


def _trainable(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """(owner, dotted name, own name, parameter), each parameter once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, f"{prefix}.{name}" if prefix else name, name, parameter


def _uncovered(module: nn.Module, path: str, parameter: Tensor) -> ConadvError:
    owner, name = type(module).__name__, path.rpartition(".")[2]
    return ConadvError(
        f"No rule covers the parameter {path!r} of shape {tuple(parameter.shape)} in a {owner}, so whether it gets "
        f"weight decay and a trust ratio is undecided. Decide with a rule, for example parameter_groups(model, "
        f"weight_decay=..., rules=(*DEFAULT_RULES, Rule({name!r}, lambda module, name, p: name == {name!r}, "
        f"decay=False, adapt=False)))."
    )
