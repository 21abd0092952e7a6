"""What a run is made of, built from a resolved config: data, model and step."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from conadv import rng
from conadv.attacks.make import make_attack
from conadv.attacks.space import PixelSpace
from conadv.config.resolve import Derived, accumulation, derive, micro_batch, optimizer_settings
from conadv.config.schema import AttackConfig, Config
from conadv.data.fingerprint import Fingerprint
from conadv.data.loader import Data
from conadv.distributed.comm import Comm
from conadv.distributed.teams import Teams, make_teams
from conadv.engine.execution import Choice, Execution, choose
from conadv.engine.executors import Executor
from conadv.engine.numerics import Numerics
from conadv.engine.step import TrainStep
from conadv.errors import ConadvError
from conadv.methods import METHODS
from conadv.methods.make import make_method
from conadv.models.trial import check_model
from conadv.nn.ema import EMA
from conadv.nn.split_batchnorm import has_batchnorm, split_batchnorm
from conadv.optim.groups import MODEL_RULES, describe, parameter_groups
from conadv.optim.make import build_optimizer
from conadv.optim.schedules import WarmupDecay
from conadv.training.data import load_data, load_model, load_source
from conadv.training.data_guard import check_same_on_ranks
from conadv.training.losses import balanced_weights, make_loss
from conadv.training.observer import Observer
from conadv.training.probe import Probe
from conadv.types import Attack, Method, Schedule

NO_BATCH_NORM = (
    "no batch norm in this model: the routes share its normalisation and every weight, so that "
    "clean and extra images are told apart by their loss alone"
)


@dataclass
class Run:
    """A run on one rank: its data, its model and its step, and how they were chosen.

    ``model`` trains; ``evaluated`` is what evaluation sees. ``teams``: who learns and who attacks.
    ``best``: step and accuracy of the best checkpoint so far, empty without one. ``fingerprint``:
    of the data, on rank 0 of a run that trains.
    """

    config: Config
    derived: Derived
    data: Data
    model: nn.Module
    step: TrainStep
    teams: Teams
    execution: Execution
    choice: Choice
    ema: EMA | None = None
    probe: Probe | None = None
    best: dict[str, Any] = field(default_factory=dict)
    fingerprint: Fingerprint | None = None

    @property
    def comm(self) -> Comm:
        """The learners' ranks; on an attack rank itself alone."""
        return self.teams.comm

    @property
    def evaluated(self) -> nn.Module:
        """The average of the weights where there is one, else the model."""
        return self.model if self.ema is None else self.ema.module

    @property
    def space(self) -> PixelSpace:
        return self.step.space

    @property
    def views(self) -> tuple[str, ...]:
        """The views of a training batch: the clean one, the method's and the third."""
        aug = ("aug",) if self.config.data.aug_view is not None else ()
        return ("clean", *self.step.method.data_views, *aug)


def build(
    config: Config,
    device: torch.device,
    observer: Observer | None = None,
    world: Comm | None = None,
    execution: Execution | None = None,
) -> Run:
    """Data, model, optimizer and step of a resolved config.

    Raises ConadvError for whatever does not fit together. Ranks: collective; an error on one rank
    is raised by all.
    """
    world = world or Comm(device=device)
    observer, execution = observer or Observer(), execution or Execution()
    with world.agreed():
        method = method_of(config)
        choice = choose(execution, method)
    teams = make_teams(world, execution.attack_ranks, execution.may_lose)
    with world.agreed():
        data = _load_data(config, method, teams, observer)
    check_same_on_ranks(data, world)
    with world.agreed():
        derived = derive(config, data.train_size, len(teams.learners))
        model = _checked_model(config, data)
        model = model.to(device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        ema = None
        if config.ema.decay is not None and not teams.attacking:
            ema = EMA(model, config.ema.decay)
        schedule = make_schedule(config, derived)
        optimizer = make_optimizer(config, model, schedule(0))
    executor = choice.make(teams, execution.late)
    weights = derived.view_weights
    balanced = None
    if config.class_weights is not None:
        balanced = balanced_weights(data.source.train.labels, data.num_classes).to(device)
    step = make_step(
        config, model, optimizer, method, schedule, teams.comm, executor, weights, balanced
    )
    run = Run(config, derived, data, model, step, teams, execution, choice, ema)
    with world.agreed():
        # rank 0 of the learners measures; the weights are the same on all
        if derived.probe_every is not None and teams.comm.is_main and not teams.attacking:
            attack = attack_of(config.attack, step.space)
            run.probe = Probe(config, attack, step, data, derived, schedule)
    return run


def _load_data(config: Config, method: Method, teams: Teams, observer: Observer) -> Data:
    mine = teams.micro_batches(accumulation(config, len(teams.learners)))
    comm, source = teams.comm, load_source(config, observer.loading)
    read = method.num_fresh(micro_batch(config))
    return load_data(config, rank=comm.rank, ranks=comm.ranks, mine=mine, read=read, source=source)


def make_model(config: Config, channels: int, num_classes: int) -> nn.Module:
    """The network on the CPU, initialised by the seed alone, with the routes of the views."""
    with rng.scope(torch.device("cpu"), config.seed, "init"):
        model = load_model(config.model, channels, num_classes)
    split_batchnorm(model.train(), *(["aug"] if config.data.aug_view is not None else []))
    route = pkgutil.resolve_name(METHODS[config.method].target).route
    if route is None or config.adv_route == "clean":
        return model
    return split_batchnorm(model, route, share_affine=config.adv_route == "statistics")


def _checked_model(config: Config, data: Data) -> nn.Module:
    """The model, after one look at it: a network that cannot take these images says so before
    training.
    """
    model = make_model(config, data.channels, data.num_classes)
    attacked = max(1, round(config.attack.share * data.micro_batch_size))
    probed = config.probe.images if config.probe.every_epochs is not None else 2
    with rng.scope(torch.device("cpu"), config.seed, "trial"):
        # two images stand for more: batch norm over a map of one pixel needs them
        images = min(2, attacked, probed)
        check_model(model, data.channels, data.image_size, data.num_classes, images)
    if config.eval.precise_bn_images is not None and not has_batchnorm(model):
        raise ConadvError(
            "eval.precise_bn_images has no effect: this model has no batch norm. Leave it out."
        )
    return model


def space_of(config: Config) -> PixelSpace:
    return PixelSpace(config.data.mean, config.data.std)


def attack_of(attack: AttackConfig, space: PixelSpace) -> Attack:
    """The attack of a resolved config; settings that it does not have are at their defaults."""
    default = AttackConfig()
    names = ("norm", "num_steps", "targeted", "random_start")
    given = {n: getattr(attack, n) for n in names if getattr(attack, n) != getattr(default, n)}
    if attack.step_size != attack.eps:
        given["step_size"] = attack.step_size
    assert attack.name is not None
    return make_attack(attack.name, eps=attack.eps, space=space, **given)


def method_of(config: Config) -> Method:
    """The method of a resolved config."""
    space = space_of(config)
    own = {name: getattr(config, name) for name in METHODS[config.method].settings}
    attack = config.attack
    return make_method(
        config.method,
        attack=attack_of(attack, space),
        noise_eps=attack.eps,
        space=space,
        share=attack.share,
        attack_route=attack.route,
        attack_statistics=attack.statistics,
        **own,
    )


def make_schedule(config: Config, derived: Derived) -> WarmupDecay:
    return WarmupDecay(
        peak=derived.lr,
        total_steps=derived.steps,
        warmup_steps=derived.warmup_steps,
        decay=config.schedule.decay,
        power=config.schedule.power,
        end=config.schedule.end_lr,
    )


def make_optimizer(config: Config, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    decay = config.optim.weight_decay or 0.0
    groups = parameter_groups(model, weight_decay=decay, rules=MODEL_RULES)
    return build_optimizer(config.optim.name, groups, lr, **optimizer_settings(config.optim))


def make_step(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    schedule: Schedule | None,
    comm: Comm,
    executor: Executor | None = None,
    view_weights: Mapping[str, float] | None = None,
    class_weights: Tensor | None = None,
) -> TrainStep:
    """The engine of a resolved config. Ranks: collective over ``comm``."""
    return TrainStep(
        model,
        optimizer,
        method,
        loss=make_loss(config.loss, config.label_smoothing, class_weights),
        lr_at=schedule,
        numerics=Numerics(
            precision=config.precision,
            clip_norm=config.optim.clip_norm,
            on_nonfinite=config.on_nonfinite,
            nonfinite_limit=config.nonfinite_limit,
            channels_last=config.channels_last,
            pending_dtype=config.pending_dtype,
            compile=config.compile,
        ),
        view_weights=view_weights,
        adv_route="clean" if config.adv_route == "clean" else "adv",
        space=space_of(config),
        seed=config.seed,
        comm=comm,
        executor=executor,
    )


def title(config: Config) -> str:
    tau = f" tau={config.staleness}" if config.staleness is not None else ""
    return f"{config.recipe} {config.method}{tau}" + (" + look-ahead" if config.lookahead else "")


def overview(run: Run) -> Iterator[str]:
    """What is about to be trained: the sizes that decide the mathematics, then the parameter
    groups.
    """
    config, derived, ranks = run.config, run.derived, run.comm.ranks
    attackers = len(run.teams.attackers)
    more = f" (and {attackers} attack rank(s))" if attackers else ""
    normed = has_batchnorm(run.model)
    sees = f"batch norm sees {derived.micro_batch_size} images per route; " if normed else ""
    yield (
        f"global batch {config.global_batch_size} = micro-batch {derived.micro_batch_size} x "
        f"accumulation {derived.accumulation} x ranks {ranks}{more}; {sees}{derived.steps} steps "
        f"of {derived.steps_per_epoch} per epoch; {config.optim.name} lr {derived.lr:g}"
    )
    if not normed:
        yield NO_BATCH_NORM
    if ranks > 1 or run.choice.name != "inline":
        yield f"executor {run.choice.name}: {run.choice.why}"
    yield f"{'group':<10}{'tensors':>9}{'parameters':>14}{'decay':>10}  trust ratio"
    for row in describe(run.step.optimizer.param_groups):
        adapt = "yes" if row["adapt"] else "no"
        size = f"{row['tensors']:>9}{row['parameters']:>14,}{row['weight_decay']:>10.2g}"
        yield f"{row['name']:<10}{size}  {adapt}"
