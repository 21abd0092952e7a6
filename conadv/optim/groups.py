"""Parameter groups: weights decay and adapt, norm and bias parameters do neither.

The parameters of every batch-norm route are norm parameters like those of the layer itself, since a
parameter is judged by the module that owns it, wherever that module hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from conadv.errors import ConadvError

NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,  # batch norm (synchronised or not) and instance norm, 1d to 3d
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Rule:
    """Which parameters form the group ``name``, and whether they decay and adapt.

    ``matches`` takes the owning module, the parameter's own name in it ("weight") and the
    parameter.
    """

    name: str
    matches: Callable[[nn.Module, str, Tensor], bool]
    decay: bool = False
    adapt: bool = False


def _is_vector(module: nn.Module, name: str, p: Tensor) -> bool:
    return p.dim() < 2 or (name != "weight" and p.numel() == max(p.shape))


_NORM = Rule("norm", lambda module, name, p: isinstance(module, NORM_LAYERS))
_BIAS = Rule("bias", lambda module, name, p: name == "bias" or name.endswith("_bias"))
_WEIGHTS = Rule("weights", lambda module, name, p: p.dim() >= 2, decay=True, adapt=True)
DEFAULT_RULES = (_NORM, _BIAS, _WEIGHTS)
"""The first rule that matches decides."""
MODEL_RULES = (_NORM, _BIAS, Rule("scale", _is_vector), _WEIGHTS)
"""What networks by name train with: vectors and scalars of any kind (LayerScale gammas, PReLU
slopes, class tokens) get neither decay nor trust ratio, as in timm and in the large-batch
literature for norm and bias.
"""


def parameter_groups(
    model: nn.Module, *, weight_decay: float, rules: Sequence[Rule] = DEFAULT_RULES
) -> list[dict[str, Any]]:
    """Groups for LARS, LAMB or any torch optimizer: dicts with name, params, weight_decay, adapt.

    Every trainable parameter is in exactly one group (a shared one where it is first met); those
    with ``requires_grad`` off are left out. Groups come in the order of the rules; rules that agree
    in all but ``matches`` form one group.

    Raises ConadvError if a parameter matches no rule, or if nothing is trainable.
    """
    groups: dict[tuple[str, bool, bool], list[Tensor]] = {
        (rule.name, rule.decay, rule.adapt): [] for rule in rules
    }
    seen: set[Tensor] = set()
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(prefix, recurse=False):
            if not p.requires_grad or p in seen:
                continue
            seen.add(p)
            # By the module that owns it: a route's batch norm hangs below another layer.
            own = name.rpartition(".")[2]
            rule = next((rule for rule in rules if rule.matches(module, own, p)), None)
            # Whatever a network has beyond the rules must be decided by somebody, not by a default.
            if rule is None:
                raise _uncovered(module, name, p)
            groups[rule.name, rule.decay, rule.adapt].append(p)
    if not seen:
        raise ConadvError(
            "The model has no trainable parameter: all have requires_grad=False, or there is none."
        )
    return [
        {
            "name": name,
            "params": params,
            "weight_decay": weight_decay if decay else 0.0,
            "adapt": adapt,
        }
        for (name, decay, adapt), params in groups.items()
        if params
    ]


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


def _uncovered(module: nn.Module, path: str, p: Tensor) -> ConadvError:
    owner, name = type(module).__name__, path.rpartition(".")[2]
    return ConadvError(
        f"No rule covers the parameter {path!r} of shape {tuple(p.shape)} in a {owner}, so whether "
        f"it gets weight decay and a trust ratio is undecided. Decide with a rule, for example "
        f"parameter_groups(model, weight_decay=..., rules=(*DEFAULT_RULES, "
        f"Rule({name!r}, lambda module, name, p: name == {name!r})))."
    )
