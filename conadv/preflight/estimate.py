"""What a run will need: memory, disk, gradients, time. Numbers only; ``show`` puts them into words."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from conadv.config.schema import Config, accumulation, micro_batch
from conadv.nn.split_batchnorm import has_batchnorm
from conadv.plan.measure import activations
from conadv.plan.memory import step_bytes
from conadv.plan.profile import Sizes
from conadv.preflight.memory import GIB
from conadv.preflight.rehearsal import Rehearsal
from conadv.training.trainer import Parts

_STATE = {"sgd": 1, "lars": 1, "lamb": 2, "adamw": 2}
"""Buffers of the size of the weights that each optimizer keeps."""
_ROUTE = re.compile(r"\.routes\.(\w+)\.")


@dataclass(frozen=True)
class Group:
    """A row of the parameter-group table. ``patterns``: the names with numbers as *; ``routes``: whose they are."""

    name: str
    patterns: tuple[str, ...]
    tensors: int
    parameters: int
    weight_decay: float
    adapted: bool
    routes: tuple[str, ...]


def groups(parts: Parts) -> list[Group]:
    """The parameter groups as the optimizer has them. ``adapted``: LARS or LAMB scales their step by a trust ratio."""
    names = {id(p): name for name, p in parts.model.named_parameters(remove_duplicate=False)}
    ratio = parts.config.optim.name in ("lars", "lamb")
    return [
        Group(
            group["name"],
            tuple(dict.fromkeys(_pattern(names[id(p)]) for p in group["params"])),
            len(group["params"]),
            sum(p.numel() for p in group["params"]),
            group["weight_decay"],
            ratio and group["adapt"],
            tuple(dict.fromkeys(_route(names[id(p)]) for p in group["params"]))
            if has_batchnorm(parts.model)
            else (),
        )
        for group in parts.groups
    ]


def _pattern(name: str) -> str:
    """Without route and numbers: "layer1.0.bn1.routes.adv.weight" is "layer*.*.bn*.weight"."""
    return re.sub(r"\d+", "*", _ROUTE.sub(".", name))


def _route(name: str) -> str:
    found = _ROUTE.search(name)
    return found[1] if found else "clean"


LOOKED_AT = 300_000
"""Steps whose cost is added up: more would take longer than the look ahead is worth."""


@dataclass(frozen=True)
class Cost:
    """Gradient images: forward-backward passes of an image of any view, and input gradients (docs/record.md)."""

    steps: int
    epochs: float
    per_clean_image: float
    total: float


def cost(parts: Parts) -> Cost:
    """What the whole run computes."""
    config, steps = parts.config, parts.num_steps
    per_image = parts.method.gradient_images(_views(parts), micro_batch(config))
    return Cost(
        steps,
        steps / parts.data.order.steps_per_epoch,
        per_image,
        per_image * steps * config.global_batch_size,
    )


def _views(parts: Parts) -> tuple[str, ...]:
    """The views that a step trains on, as its record will name them."""
    aug = ("aug",) if parts.config.data.aug_view is not None else ()
    extra = ("adv",) if parts.method.route is not None else ()
    return ("clean", *aug, *extra)


def sizes(parts: Parts, rehearsal: Rehearsal, free: int) -> Sizes:
    """Bytes of this run's network, optimizer and images. ``free``: of the device."""
    engine = rehearsal.engine()
    x = engine.images(rehearsal.batch(engine, 0, 2).micro[0], "clean")
    weights = sum(p.nbytes for p in parts.model.parameters())
    state = 0 if parts.config.optim.momentum == 0 else weights * _STATE[parts.config.optim.name]
    return Sizes(
        weights=weights,
        optimizer_state=state,
        image=x[0].nbytes,
        activations_per_image=activations(engine, x) // len(x),
        memory=max(free, 1),
    )


def memory_needed(parts: Parts, found: Sizes) -> int:
    """Bytes of a learner's step at least, by the model of ``conadv plan``: no reserve, no workspaces of kernels."""
    config, method = parts.config, parts.method
    views = 1 + (method.route is not None) + (config.data.aug_view is not None)
    lookahead, attackers = bool(getattr(method, "lookahead", False)), bool(parts.teams.attackers)
    averaged = config.ema.decay is not None
    copies = (
        2 + (parts.comm.ranks > 1) + lookahead + attackers + (config.method == "sam") + averaged
    )
    waiting = (method.ahead or int(method.needs_input_gradient)) * _pending_bytes(config) / 4
    return step_bytes(
        found,
        copies=copies,
        local_batch=micro_batch(config) * accumulation(config, len(parts.teams.learners)),
        held=views + waiting,
        micro_batch=micro_batch(config),
        views_per_pass=views if parts.engine.views_fused else 1,
    )


def _pending_bytes(config: Config) -> int:
    return {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}[
        config.pending_dtype or "float32"
    ]


def waiting_bytes(parts: Parts, found: Sizes) -> int:
    """The images, with labels, that wait on all ranks between two steps: every checkpoint holds them."""
    config, method = parts.config, parts.method
    batches = method.ahead or int(method.needs_input_gradient)
    pixels = found.image // 4 * _pending_bytes(config)
    return int(config.global_batch_size * batches * (config.attack.share * (pixels + 8)))


def checkpoint_bytes(parts: Parts, found: Sizes) -> int:
    """One checkpoint: weights and buffers, their average, optimizer state, and the images that wait."""
    model = sum(
        value.nbytes for value in parts.model.state_dict().values() if isinstance(value, Tensor)
    )
    averaged = parts.config.ema.decay is not None
    return model * (1 + averaged) + found.optimizer_state + waiting_bytes(parts, found)


@dataclass(frozen=True)
class Disk:
    """Bytes for the checkpoints of a run and what is free where they go. ``files``: how many lie there at a time;
    ``waiting``: what of a checkpoint is images that wait."""

    checkpoint: int
    files: int
    free: int
    waiting: int

    @property
    def needed(self) -> int:
        return self.checkpoint * self.files


def disk(parts: Parts, found: Sizes, out: Path) -> Disk:
    """A checkpoint is complete before older ones go, so that one more lies there for a while."""
    settings = parts.config.checkpoint
    existing = next(
        folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists()
    )
    planned = 1
    if settings.every_epochs is not None:
        period = max(1, round(settings.every_epochs * parts.data.order.steps_per_epoch))
        planned = -(-parts.num_steps // period)
    files = min(settings.keep + 1, planned) + settings.keep_best
    free = shutil.disk_usage(existing).free
    return Disk(checkpoint_bytes(parts, found), files, free, waiting_bytes(parts, found))


@dataclass(frozen=True)
class Time:
    """Seconds of a step and where they come from. ``notes``: how the estimate may differ from the run."""

    step: float
    source: str
    notes: tuple[str, ...] = ()


def rehearsed_time(parts: Parts, rehearsal: Rehearsal) -> Time:
    """From a few steps of one micro-batch on this device, times the accumulation. Ranks: each for itself."""
    config = parts.config
    count = accumulation(config, len(parts.teams.learners))
    seconds = rehearsal.steps(micro_batch(config))
    notes = ["without loading images"]
    if parts.teams.world.ranks > 1:
        notes.append("without communication between ranks")
    if count > 1:
        notes.append("the optimizer's update is counted once per micro-batch")
    return Time(seconds * count, "of synthetic images on this device", tuple(notes))


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
