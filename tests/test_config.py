"""Config: defaults resolved, mistakes named, options that mean what they say, files of earlier
versions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from conadv.config import recipes
from conadv.config.files import REMOVED, dump_yaml, home, load_yaml, parse
from conadv.config.fractions import parse_fraction
from conadv.config.overrides import given_settings, override, short_names
from conadv.config.resolve import accumulation, derive, micro_batch, resolve, scaled_lr
from conadv.config.schema import DEFAULTS, LARGEST_SEED, Config, differences, replace
from conadv.errors import ConadvError
from conadv.methods import METHODS
from conadv.optim import OPTIMIZERS

BASE = recipes.get("digits")


def test_fractions() -> None:
    for text, value in {
        "4/255": 4 / 255,
        " 8 / 255": 8 / 255,
        "0.5": 0.5,
        "0.5/255": 0.5 / 255,
    }.items():
        assert parse_fraction(text) == value
    for bad in ("4/0", "x", "4//2", "1e999999999", "1" * 61):
        with pytest.raises(ValueError, match=r"4/255"):
            parse_fraction(bad)


RULES: dict[str, tuple[dict[str, Any], str]] = {  # what is set: what is said
    "both durations": ({"steps": 3}, "duration once"),
    "no duration": ({"epochs": None}, "duration once"),
    "staleness": ({"staleness": 1}, "staleness has no effect with method 'vanilla'"),
    "sam": ({"sam_rho": 0.1}, "sam_rho has no effect with method 'vanilla'"),
    "adv route": ({"adv_route": "clean"}, "adv_route has no effect with method 'vanilla'"),
    "share": ({"attack__share": 0.5}, "attack.share has no effect with method 'vanilla'"),
    "recycle": ({"method": "recycle", "attack__route": "clean"}, "attack.route has no effect with"),
    "mix": ({"mix": "replace"}, "mix has no effect with method 'vanilla'"),
    "replace all": (
        {"method": "disadv", "mix": "replace"},
        "leaves no clean image to train the clean route",
    ),
    "replace a part of an image": (
        {"method": "disadv", "mix": "replace", "attack__share": 0.3, "global_batch_size": 64},
        "is not a whole number",
    ),
    "clean twice": (
        {"method": "disadv", "attack__route": "clean", "adv_route": "clean"},
        "goes there anyway",
    ),
    "no image": ({"method": "disadv", "attack__share": 1e-4}, "rounds to zero images"),
    "aug weight": ({"aug_weight": 2.0}, "data.aug_view"),
    "eps": ({"method": "disadv", "attack__eps": 8.0}, "Did you mean 8/255"),
    "step size": ({"method": "disadv", "attack__step_size": 2.0}, "Did you mean 2/255"),
    "robust eps": ({"eval__robust_eps": 8.0}, "Did you mean 8/255"),
    "nesterov": (
        {"optim__name": "sgd", "optim__nesterov": True, "optim__momentum": 0.0},
        "momentum above 0",
    ),
    "betas of lars": ({"optim__betas": (0.9, 0.99)}, "optim.betas has no effect with optimizer"),
    "variant": ({"optim__name": "sgd", "optim__variant": "tf"}, "optim.variant has no effect"),
    "scaling": ({"optim__lr_scaling": "linear"}, "no effect without optim.lr_reference_batch"),
    "reference": ({"optim__lr_reference_batch": 64}, "no effect without optim.lr_scaling"),
    "scaled too far": (
        {"optim__lr": 1e30, "optim__lr_scaling": "linear", "optim__lr_reference_batch": 1},
        r"after optim\.lr_scaling",
    ),
    "micro": ({"micro_batch_size": 100}, "micro-batch that divides 898"),
    "mixing one": ({"micro_batch_size": 1, "data__mixup": 0.2}, "has only one"),
    "subset seed": ({"data__subset_seed": 3}, "data.subset_seed has no effect"),
    "best": ({"checkpoint__keep_best": True}, "data.validation_images"),
    "limit": ({"nonfinite_limit": 3}, "nonfinite_limit has no effect"),
    "probe": ({"probe__images": 3}, "probe.images has no effect without probe.every_epochs"),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_between_settings(name: str) -> None:
    # Red when: the rule's check is taken out of resolve's list.
    changes, message = RULES[name]
    with pytest.raises(ConadvError, match=message):
        resolve(replace(BASE, **changes))


BAD_VALUES = [
    ({"methd": "conadv"}, "Did you mean 'method'"),
    ({"optim": {"learning_rate": 1}}, "optim.learning_rate"),
    ({"global_batch_size": 0}, "greater than or equal to 1"),
    ({"optim": {"lr": 0}}, "greater than 0"),
    ({"optim": {"lr": math.inf}}, "finite"),
    ({"optim": {"lr": 1e31}}, "less than or equal"),
    ({"optim": {"betas": [0.9, 1.0]}}, "optim.betas.1 = 1.0"),
    ({"epochs": 1e308}, "less than or equal"),
    ({"attack": {"eps": -0.1}}, "attack.eps"),
    ({"data": {"mixup": 9e-4}}, "data.mixup.*neither 0 .off. nor 0.001 or more"),
    ({"method": "conad"}, "conadv"),
]


@pytest.mark.parametrize(("values", "message"), BAD_VALUES)
def test_bad_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConadvError, match=message):
        parse(values, "config.yaml")


def counts(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted name, largest value) of every setting that is a whole number."""
    for name, field in section.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from counts(type(field.default), f"{prefix}{name}.")
        schema = section.model_json_schema()["properties"][name]
        for part in (schema, *schema.get("anyOf", []), schema.get("items", {})):
            if part.get("type") == "integer":
                yield prefix + name, part.get("maximum", 2**64)


def test_every_whole_number_has_a_largest_value() -> None:
    # Red when: a setting is a plain int (eval.batch_size 2^63 got as far as the loader).
    found = dict(counts(Config))
    seeds = {name: most for name, most in found.items() if most > 10**9}
    assert seeds == {"seed": LARGEST_SEED, "data.subset_seed": LARGEST_SEED}
    assert found.keys() > {"eval.batch_size", "micro_batch_size", "probe.staleness", "model.width"}


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "method": st.sampled_from(list(METHODS)),
            "seed": st.integers(0, 2**40),
            "optim__name": st.sampled_from(list(OPTIMIZERS)),
            "optim__lr": st.floats(1e-8, 1e8),
            "attack__eps": st.floats(0, 0.99),
            "precision": st.sampled_from(["fp32", "bf16"]),
        }
    )
)
def test_resolving_is_idempotent_and_yaml_keeps_every_bit(
    tmp_path_factory: Any, changes: dict[str, Any]
) -> None:
    # Red when: a float is written with fewer digits than it has.
    config = resolve(replace(BASE, **changes))
    assert resolve(config) == config
    path: Path = tmp_path_factory.mktemp("c") / "config.yaml"
    path.write_text(dump_yaml(config))
    assert load_yaml(path) == config


def test_resolved_defaults_belong_to_the_choice() -> None:
    conadv = resolve(replace(BASE, method="conadv"))
    assert (conadv.staleness, conadv.lookahead, conadv.pending_dtype) == (1, False, "float32")
    plain = resolve(BASE)
    assert (plain.staleness, plain.micro_batch_size, plain.attack.name) == (None, 898, "fgsm")
    assert plain.eval.robust_eps == 0.1  # attack.eps is 0.2
    assert resolve(replace(BASE, eval__robust_eps=None)).eval.robust_eps == 0.2
    pgd = resolve(replace(BASE, method="disadv", attack__num_steps=4)).attack
    assert (pgd.name, pgd.step_size) == ("pgd", pytest.approx(0.125))
    for changes in ({"attack__random_start": 0.5}, {"attack__step_size": 0.1}):
        assert resolve(replace(BASE, **changes)).attack.name == "pgd"


def test_optimizer_defaults_are_the_documented_ones() -> None:
    # A change here changes every run that does not set the value: say so in CHANGELOG.md under
    # "Numerics".
    documented = {
        "lars": {
            "momentum": 0.9,
            "weight_decay": 5e-5,
            "variant": "tf",
            "trust_coefficient": 1e-3,
            "eps": 0.0,
        },
        "lamb": {"betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-6},
        "sgd": {"momentum": 0.9, "nesterov": False, "weight_decay": 5e-4},
        "adamw": {"betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-8},
    }
    for name, values in documented.items():
        made = resolve(replace(BASE, optim={"name": name, "lr": 1.0})).optim
        assert {key: getattr(made, key) for key in values} == values
    for name, eps in {"tf": 0, "no-wd-ratio": 0, "nus": 0, "timm": 1e-8, "larc": 1e-8}.items():
        assert resolve(replace(BASE, optim__variant=name)).optim.eps == eps


def test_differences_are_named() -> None:
    # Red when: nested settings are not compared (a run is then resumed with another learning rate).
    other = replace(BASE, optim__lr=7.0, seed=1)
    assert differences(BASE, other) == ["seed: 0 -> 1", f"optim.lr: {BASE.optim.lr} -> 7.0"]


# ---- what follows from a config


def test_accumulation_and_scaling() -> None:
    # Red when: accumulation forgets the ranks, or the square root is taken of the lr.
    config = replace(BASE, global_batch_size=4096, micro_batch_size=64)
    assert [accumulation(config, ranks) for ranks in (1, 8, 64)] == [64, 8, 1]
    for ranks in (3, 128):
        with pytest.raises(ConadvError, match=rf"{ranks} rank\(s\)"):
            accumulation(config, ranks)
    scaled = {"optim__lr_scaling": "linear", "optim__lr_reference_batch": 256}
    optim = replace(BASE, optim__lr=0.5, **scaled).optim
    assert scaled_lr(optim, 4096) == 8.0
    assert scaled_lr(replace(optim, lr_scaling="sqrt"), 4096) == 2.0
    with pytest.raises(ConadvError, match="found by trial"):
        micro_batch(replace(BASE, micro_batch_size="auto"))


def test_derived_numbers() -> None:
    # Red when: a period is counted in another unit, or an epoch is rounded up.
    changes = {"global_batch_size": 100, "micro_batch_size": 25, "epochs": 1.7, "adv_weight": 2.0}
    periods = {
        "eval__every_epochs": 1,
        "checkpoint__every_epochs": 0.01,
        "probe__every_epochs": 0.5,
    }
    config = replace(BASE, method="conadv", **changes, **periods, schedule__warmup_epochs=0.5)
    found = derive(resolve(replace(config, probe__staleness=(1,))), train_images=899, learners=2)
    assert (found.steps_per_epoch, found.steps, found.warmup_steps) == (8, 14, 4)
    assert (found.micro_batch_size, found.accumulation, found.epochs) == (25, 2, 1.75)
    assert (found.evaluate_every, found.checkpoint_every, found.probe_every) == (8, 1, 4)
    assert found.view_weights == {"aug": 1.0, "adv": 2.0}
    assert [step for step in range(1, 15) if found.due(found.evaluate_every, step)] == [8]
    assert not found.due(None, 8)


SHORT = {
    "batch": ({"global_batch_size": 900}, "larger than the training set"),
    "epochs": ({"epochs": 0.4}, "less than one step"),
    "staleness": (
        {"method": "conadv", "staleness": 5, "steps": 5},
        "staleness 5 has no effect in 5",
    ),
    "probe": ({"steps": 5, "probe__every_epochs": 9.0}, "last one measured is step 0"),
    "tau": ({"steps": 5, "probe__every_epochs": 2.0}, "probe.staleness 8 has no effect"),
}


@pytest.mark.parametrize("name", SHORT)
def test_durations_too_short_for_what_is_asked(name: str) -> None:
    changes, message = SHORT[name]
    duration = {"epochs": None} if "steps" in changes else {}
    with pytest.raises(ConadvError, match=message):
        derive(resolve(replace(BASE, **duration, **changes)), train_images=899)


# ---- options on top of a recipe


def edit(base: Config, **changes: Any) -> Config:
    """``base`` with options that the user gave, as the command line does it."""
    given = {name.replace("__", ".") for name in changes}
    return override(base, replace(base, **changes), given)


def test_options_replace_what_belongs_to_the_old_choice() -> None:
    # Red when: override keeps epochs beside steps, or a base's staleness beside another method.
    assert edit(BASE, steps=5).epochs is None
    assert edit(replace(BASE, epochs=None, steps=5), epochs=2).steps is None
    saved = resolve(replace(BASE, method="conadv", staleness=3, optim__name="lamb"))
    other = resolve(edit(saved, method="noise"))
    assert (other.staleness, other.pending_dtype) == (None, None)
    assert resolve(edit(saved, method="recycle")).pending_dtype == "float32"
    assert resolve(edit(saved, attack__eps=0.1)).attack.step_size == 0.1
    assert resolve(edit(saved, attack__num_steps=2)).attack.name == "pgd"
    assert resolve(edit(BASE, optim__name="sgd", optim__lr=0.1)).optim.variant is None
    assert resolve(edit(saved, global_batch_size=64)).micro_batch_size == 64
    halves = resolve(replace(saved, micro_batch_size=449))
    assert resolve(edit(halves, global_batch_size=1796)).micro_batch_size == 449
    with pytest.raises(ConadvError, match="micro_batch_size 449"):
        resolve(edit(halves, global_batch_size=64))


def test_options_count_as_given_whatever_their_value() -> None:
    # Red when: override compares values instead of asking what was given.
    rate = BASE.optim.lr
    assert resolve(edit(BASE, optim__name="sgd", optim__lr=rate)).optim.lr == rate
    with pytest.raises(ConadvError, match=r"belongs to lars\. Give --lr"):
        edit(BASE, optim__name="sgd")
    with pytest.raises(ConadvError, match="duration once"):
        resolve(edit(BASE, epochs=BASE.epochs, steps=10))
    saved = resolve(replace(BASE, method="conadv", staleness=2, attack__step_size=0.05))
    with pytest.raises(ConadvError, match="staleness has no effect"):
        resolve(edit(saved, method="disadv", staleness=2))
    assert resolve(edit(saved, attack__eps=0.1, attack__step_size=0.05)).attack.step_size == 0.05
    for name, method in (("eps", "vanilla"), ("num_steps", "noise"), ("eps", "multiview")):
        with pytest.raises(ConadvError, match=f"attack.{name} has no effect"):
            edit(BASE, method=method, **{f"attack__{name}": getattr(BASE.attack, name)})


def test_given_settings() -> None:
    # Red when: short names are not looked up in the schema, or a flag that is switched off is not
    # seen.
    names = {
        "optim.lr",
        "optim.weight_decay",
        "lookahead",
        "data.dir",
        "data.aug_view",
        "model.name",
    }
    args = (
        "--lr 1 --optim.weight-decay=3 --no-lookahead --data D --aug-view basic --out x --model m"
    )
    assert given_settings(args.split()) == names
    more = "--optimizer sgd --eps 1/255 --augment basic --download --data.no-download"
    assert given_settings(more.split()) == {
        "optim.name",
        "attack.eps",
        "data.augment",
        "data.download",
    }
    assert set(short_names().values()) <= DEFAULTS.keys()


# ---- files


def test_unreadable_configs(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text, message in {
        b"a: [": "Cannot read",
        b"- 1\n": "not a mapping",
        b"seed: 1\nsed: 2\n": "Did you mean 'seed'",
        b"\xff\xfe\x00": "Cannot read",
    }.items():
        path.write_bytes(text)
        with pytest.raises(ConadvError, match=message):
            load_yaml(path)
    with pytest.raises(ConadvError, match="Cannot read"):
        load_yaml(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("name", REMOVED)
def test_settings_of_version_0_1(name: str) -> None:
    # Red when: REMOVED is not looked at (an unknown setting), or any value is dropped.
    section, _, key = name.rpartition(".")

    def values(value: Any) -> dict[str, Any]:
        return {section: {key: value}} if section else {key: value}

    for harmless in REMOVED[name]:
        assert parse(values(harmless), "config.yaml") == Config()
    with pytest.raises(ConadvError, match=f"config.yaml: {name} = 17 is a setting of conadv 0.1"):
        parse(values(17), "config.yaml")
    with pytest.raises(ConadvError, match=r"is a setting of conadv 0\.1"):
        given_settings([f"--{name.replace('_', '-')}", "2"])


@pytest.mark.parametrize("folder", ["~nobodyhere", "~nobodyhere/data"])
def test_the_home_of_nobody_is_an_error(folder: str) -> None:
    # Red when: expanduser's RuntimeError goes through.
    with pytest.raises(ConadvError, match=r"~nobodyhere.*Write the folder out"):
        home(Path(folder))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_resolves_for_every_method(name: str) -> None:
    for method in METHODS:
        resolved = resolve(replace(recipes.get(name), method=method))
        assert resolve(resolved) == resolved
    assert recipes.summary(name)
