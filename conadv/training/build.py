"""The parts that a resolved config names."""

from __future__ import annotations

from conadv.attacks.make import make_attack
from conadv.attacks.space import PixelSpace
from conadv.config.schema import AttackConfig, Config
from conadv.methods import METHODS
from conadv.methods.base import Method
from conadv.methods.make import make_method
from conadv.types import Attack


def space_of(config: Config) -> PixelSpace:
    return PixelSpace(config.data.mean, config.data.std)


def attack_of(attack: AttackConfig, space: PixelSpace) -> Attack:
    """FGSM for one plain step, PGD otherwise."""
    step_size = attack.eps if attack.step_size is None else attack.step_size
    common = {"eps": attack.eps, "norm": attack.norm, "targeted": attack.targeted, "space": space}
    if attack.num_steps == 1 and not attack.random_start and step_size == attack.eps:
        return make_attack("fgsm", **common)
    return make_attack(
        "pgd",
        num_steps=attack.num_steps,
        step_size=step_size,
        random_start=attack.random_start,
        **common,
    )


def method_of(config: Config) -> Method:
    """The method of a resolved config."""
    attack, space = config.attack, space_of(config)
    return make_method(
        config.method,
        attack=attack_of(attack, space),
        noise_eps=attack.eps,
        space=space,
        share=attack.share,
        attack_route=attack.route,
        attack_statistics=attack.statistics,
        **{name: getattr(config, name) for name in METHODS[config.method].settings},
    )
