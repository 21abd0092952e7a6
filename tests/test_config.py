"""Config: defaults resolved, mistakes named, overrides that mean what they say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from conadv.config import recipes
from conadv.config.schema import (
    SMALLEST_ALPHA,
    Config,
    DataConfig,
    accumulation,
    differences,
    dump_yaml,
    home,
    load_yaml,
    override,
    parse,
    parse_fraction,
    replace,
    resolve,
    scaled_lr,
)
from conadv.data.mix import Mix
from conadv.errors import ConadvError
from conadv.training.data import load_source

BASE = recipes.get("digits")


def test_fractions() -> None:
    assert parse_fraction("4/255") == 4 / 255
    assert parse_fraction(" 8 / 255") == 8 / 255
    assert parse_fraction("0.5") == 0.5
    assert parse_fraction("0.5/255") == 0.5 / 255
    for bad in ("4/0", "x", "4//2"):
        with pytest.raises(ValueError, match=r"4/255"):
            parse_fraction(bad)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "both durations": ({"steps": 3}, "Give the duration once"),
    "no duration": ({"epochs": None}, "Give the duration once"),
    "staleness": ({"staleness": 1}, "staleness has no effect with method 'vanilla'"),
    "lookahead": ({"method": "disadv", "lookahead": True}, "lookahead has no effect"),
    "lookahead at 0": (
        {"method": "conadv", "staleness": 0, "lookahead": True},
        "weights are current",
    ),
    "pending": ({"method": "noise", "pending_dtype": "uint8"}, "pending_dtype has no effect"),
    "sam": ({"sam_rho": 0.1}, "sam_rho has no effect with method 'vanilla'"),
    "adv route": ({"adv_route": "clean"}, "adv_route has no effect with method 'vanilla'"),
    "plan": ({"attack__share": 0.5}, "attack.share has no effect with method 'vanilla'"),
    "plan of noise": (
        {"method": "noise", "attack__route": "clean"},
        "attack.route has no effect with method 'noise'",
    ),
    "plan of recycle": (
        {"method": "recycle", "attack__share": 0.5},
        "attack.share has no effect with method 'recycle'",
    ),
    "clean twice": (
        {"method": "disadv", "attack__route": "clean", "adv_route": "clean"},
        "goes there anyway",
    ),
    "no image": ({"method": "disadv", "attack__share": 1e-4}, "zero images"),
    "adv weight": ({"adv_weight": 2.0}, "adv_weight has no effect"),
    "aug weight": ({"aug_weight": 2.0}, "data.aug_view"),
    "recycle pgd": ({"method": "recycle", "attack__num_steps": 3}, "one gradient"),
    "recycle targeted": ({"method": "recycle", "attack__targeted": True}, "one gradient"),
    "recycle step": ({"method": "recycle", "attack__step_size": 0.01}, "one gradient"),
    "eps": ({"method": "disadv", "attack__eps": 8.0}, "Did you mean 8/255"),
    "eps of the whole range": ({"method": "disadv", "attack__eps": 1.0}, "Did you mean 1/255"),
    "nesterov": (
        {"optim__name": "sgd", "optim__nesterov": True, "optim__momentum": 0.0},
        "needs momentum",
    ),
    "step size": ({"method": "disadv", "attack__step_size": 2.0}, "Did you mean 2/255"),
    "robust eps": ({"eval__robust_eps": 8.0}, "Did you mean 8/255"),
    "betas for lars": (
        {"optim__betas": (0.9, 0.99)},
        "optim.betas has no effect with optimizer 'lars'",
    ),
    "variant for sgd": (
        {"optim__name": "sgd", "optim__variant": "tf"},
        "optim.variant has no effect",
    ),
    "betas range": ({"optim__name": "lamb", "optim__betas": (0.9, 1.0)}, r"\[0, 1\)"),
    "scaling": ({"optim__lr_scaling": "linear"}, "belong together"),
    "micro": ({"micro_batch_size": 100}, "micro-batch that divides 898"),
    "micro too large": ({"micro_batch_size": 1000}, "micro-batch that divides 898"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rules(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ConadvError, match=message):
        resolve(replace(BASE, **changes))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methd": "conadv"}, "Did you mean 'method'"),
        ({"optim": {"learning_rate": 1}}, "optim.learning_rate"),
        ({"global_batch_size": 0}, "greater than or equal to 1"),
        ({"global_batch_size": -8}, "global_batch_size"),
        ({"optim": {"lr": 0}}, "greater than 0"),
        ({"optim": {"lr": math.inf}}, "finite"),
        ({"attack": {"eps": -0.1}}, "attack.eps"),
        ({"attack": {"random_start": 1.5}}, "attack.random_start"),
        ({"method": "conad"}, "conadv"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConadvError, match=message):
        parse(values, "config.yaml")


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "method": st.sampled_from(["vanilla", "noise", "disadv", "conadv", "recycle"]),
            "seed": st.integers(0, 2**40),
            "optim__name": st.sampled_from(["lars", "lamb", "sgd", "adamw"]),
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
    assert differences(config, load_yaml(path)) == []


def test_resolved_defaults_belong_to_the_choice() -> None:
    conadv = resolve(replace(BASE, method="conadv"))
    assert (conadv.staleness, conadv.lookahead, conadv.pending_dtype) == (1, False, "float32")
    assert resolve(BASE).staleness is None
    assert resolve(replace(BASE, optim__variant="timm")).optim.eps == 1e-8
    assert resolve(
        replace(BASE, method="disadv", attack__num_steps=4)
    ).attack.step_size == pytest.approx(0.125)
    assert resolve(BASE).micro_batch_size == 898
    assert resolve(BASE).eval.robust_eps == 0.1  # attack.eps is 0.2
    assert resolve(replace(BASE, eval__robust_eps=None)).eval.robust_eps == 0.2


def test_differences_are_named() -> None:
    # Red when: nested settings are not compared (a run is then resumed with another learning rate).
    other = replace(BASE, optim__lr=7.0, seed=1)
    assert differences(BASE, other) == ["seed: 0 -> 1", f"optim.lr: {BASE.optim.lr} -> 7.0"]


def edit(base: Config, **changes: Any) -> Config:
    """``base`` with options that the user gave, as the command line does it."""
    given = {name.replace("__", ".") for name in changes}
    return override(base, replace(base, **changes), given)


def test_options_replace_what_belongs_to_the_old_choice() -> None:
    # Red when: override keeps epochs beside steps, or a base's staleness beside another method.
    assert edit(BASE, steps=5).epochs is None
    by_steps = replace(BASE, epochs=None, steps=5)
    assert edit(by_steps, epochs=2).steps is None
    saved = resolve(replace(BASE, method="conadv", staleness=3, optim__name="lamb"))
    other = resolve(edit(saved, method="noise"))
    assert (other.staleness, other.pending_dtype) == (None, None)
    assert resolve(edit(saved, method="recycle")).pending_dtype == "float32"
    assert resolve(edit(saved, attack__eps=0.1)).attack.step_size == 0.1
    assert resolve(edit(BASE, optim__name="sgd", optim__lr=0.1)).optim.variant is None
    assert edit(BASE, method="noise", attack__eps=0.1).attack.eps == 0.1
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
    for base in (BASE, resolve(BASE)):
        assert resolve(edit(base, optim__name="sgd", optim__lr=0.1)).optim.variant is None
    for name, method in (("eps", "vanilla"), ("num_steps", "noise"), ("eps", "multiview")):
        with pytest.raises(ConadvError, match=f"attack.{name} has no effect"):
            edit(BASE, method=method, **{f"attack__{name}": getattr(BASE.attack, name)})


def test_accumulation_and_scaling() -> None:
    # Red when: accumulation forgets the ranks, or the square root is taken of the lr.
    config = replace(BASE, global_batch_size=4096, micro_batch_size=64)
    assert [accumulation(config, ranks) for ranks in (1, 8, 64)] == [64, 8, 1]
    with pytest.raises(ConadvError, match=r"3 rank\(s\)"):
        accumulation(config, 3)
    with pytest.raises(ConadvError, match=r"128 rank\(s\)"):
        accumulation(config, 128)
    optim = replace(
        BASE, optim__lr=0.5, optim__lr_scaling="linear", optim__lr_reference_batch=256
    ).optim
    assert scaled_lr(optim, 4096) == 8.0
    assert scaled_lr(replace(optim, lr_scaling="sqrt"), 4096) == 2.0


def test_unreadable_configs(tmp_path: Path) -> None:
    for text, message in (
        ("a: [", "Cannot read"),
        ("- 1\n", "not a mapping"),
        ("seed: 1\nsed: 2\n", "Did you mean 'seed'"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConadvError, match=message):
            load_yaml(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConadvError, match="Cannot read"):
        load_yaml(tmp_path / "c.yaml")
    with pytest.raises(ConadvError, match="Cannot read"):
        load_yaml(tmp_path / "nothing.yaml")


def test_optimizer_defaults_are_the_documented_ones() -> None:
    # A change here changes every run that does not set the value: say so in CHANGELOG.md under "Numerics".
    made = {
        n: resolve(replace(BASE, optim={"name": n, "lr": 1.0})).optim
        for n in ("lars", "lamb", "sgd", "adamw")
    }
    lars, lamb, sgd, adamw = (made[n] for n in ("lars", "lamb", "sgd", "adamw"))
    assert (lars.momentum, lars.weight_decay, lars.variant, lars.trust_coefficient) == (
        0.9,
        5e-5,
        "tf",
        0.001,
    )
    assert (lamb.betas, lamb.weight_decay, lamb.eps) == ((0.9, 0.999), 0.01, 1e-6)
    assert (sgd.momentum, sgd.nesterov, sgd.weight_decay) == (0.9, False, 5e-4)
    assert (adamw.betas, adamw.weight_decay, adamw.eps) == ((0.9, 0.999), 0.01, 1e-8)


def test_default_config_needs_a_duration_only() -> None:
    assert resolve(Config(steps=1)).steps == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim__weight_decay", 1e300),
        ("optim__lr", 1e31),
        ("checkpoint__every_epochs", 1e308),
        ("eval__every_epochs", 1e308),
        ("schedule__warmup_epochs", 1e308),
        ("epochs", 1e308),
        ("data__mixup", 1e7),
    ],
)
def test_numbers_that_nothing_can_be_computed_with_are_refused(name: str, value: float) -> None:
    # Red when: that field has no upper bound.
    with pytest.raises(ValueError, match="less than or equal"):
        replace(BASE, **{name: value})


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
    assert found.keys() > {
        "seed",
        "eval.batch_size",
        "micro_batch_size",
        "probe.staleness",
        "model.width",
    }
    assert [name for name, most in found.items() if most > 10**9] == ["seed", "data.subset_seed"]
    assert found["seed"] == 2**63 - 1
    for name, most in found.items():
        value = [most + 1] if name == "probe.staleness" else most + 1
        section, _, key = name.rpartition(".")
        with pytest.raises(ConadvError, match=f"{name}.*less than or equal to"):
            parse({section: {key: value}} if section else {key: value}, "x")


@pytest.mark.parametrize("folder", ["~nobodyhere", "~nobodyhere/data"])
def test_the_home_of_nobody_is_an_error(folder: str) -> None:
    # Red when: expanduser's RuntimeError goes through.
    with pytest.raises(ConadvError, match=r"~nobodyhere.*Write the folder out"):
        home(Path(folder))
    with pytest.raises(ConadvError, match="~nobodyhere"):
        load_source(Config(data=DataConfig(source="folder", dir=folder)))


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_draws_of_a_mix_are_numbers_from_the_smallest_alpha_on(name: str) -> None:
    # Red when: alpha has no lower bound but 0 (1e-300 is 0 in float32, and torch refused it in the first step).
    for bad in (1e-300, 9e-4):
        with pytest.raises(ConadvError, match=f"data.{name}.*neither 0 .off. nor 0.001 or more"):
            parse({"data": {name: bad}}, "x")
    smallest = parse({"data": {name: SMALLEST_ALPHA}}, "x").data
    mix = Mix(smallest.mixup, smallest.cutmix, 2, 0)
    y_N = torch.tensor([0, 1, 0, 1])
    for step in range(200):
        _, y_NK = mix({"clean": torch.zeros(4, 1, 4, 4, dtype=torch.uint8)}, y_N, step, 0)
        assert torch.isfinite(y_NK).all()


def test_the_bound_on_the_learning_rate_holds_after_scaling() -> None:
    # Red when: _check_optimizer looks at optim.lr alone.
    scaled = {"optim__lr": 1e30, "optim__lr_scaling": "linear", "optim__lr_reference_batch": 1}
    with pytest.raises(ConadvError, match=r"after optim\.lr_scaling"):
        resolve(replace(BASE, **scaled))
