"""The optimizers by name. Torch-free: the config and ``--help`` read this table.

A new optimizer is a file with its class, which takes (groups, lr, **settings), and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One optimizer.

    target: "module:Class". defaults: the settings that it takes, with what they are unless given.
    by_variant: other defaults that go with a value of the setting ``variant``.
    """

    target: str
    defaults: Mapping[str, Any]
    by_variant: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings in ``given`` that are not None, and defaults for the rest."""
        chosen = {k: v for k, v in given.items() if k in self.defaults and v is not None}
        variant = str(chosen.get("variant", self.defaults.get("variant")))
        return {**self.defaults, **self.by_variant.get(variant, {}), **chosen}


OPTIMIZERS = {
    "lars": Row(
        "conadv.optim.lars:LARS",
        # the ConAdv authors' weight decay, MLPerf's eta and eps (docs/numerics.md)
        {
            "momentum": 0.9,
            "weight_decay": 5e-5,
            "variant": "tf",
            "trust_coefficient": 0.001,
            "eps": 0.0,
        },
        {"timm": {"eps": 1e-8}, "larc": {"eps": 1e-8}},
    ),
    "lamb": Row(
        "conadv.optim.lamb:LAMB", {"betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-6}
    ),
    "sgd": Row("torch.optim:SGD", {"momentum": 0.9, "nesterov": False, "weight_decay": 5e-4}),
    "adamw": Row("torch.optim:AdamW", {"betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-8}),
}
