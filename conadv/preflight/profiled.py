"""The time of a run by a profile of ``conadv plan``, and where the run is not what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from conadv.config.schema import accumulation, micro_batch
from conadv.distributed.environment import processes_here
from conadv.errors import ConadvError
from conadv.models.small import WIDTH
from conadv.plan.command import link_of
from conadv.plan.model import KINDS, Layout, Planner, Prediction
from conadv.plan.profile import Profile
from conadv.plan.rows import extrapolated
from conadv.preflight.estimate import Time
from conadv.training.trainer import Parts


def predicted_time(
    parts: Parts, profile: Profile, link_gbit: float | None = None, latency_us: float | None = None
) -> Time:
    """By ``conadv plan``'s model of a measured profile, for as many ranks as there are now.

    ``link_gbit``, ``latency_us``: of the link between the ranks, in place of the measured one. Raises ConadvError for
    what a profile cannot predict, and for several ranks without a link.
    """
    config = parts.config
    method = config.method + ("-lookahead" if config.lookahead else "")
    if method == "conadv" and config.staleness == 0:
        method = "disadv"
    if method not in KINDS:
        raise ConadvError(
            f"A profile cannot predict {method}, only {', '.join(KINDS)}. Leave --profile out."
        )
    learners = len(parts.teams.learners)
    layout = Layout(
        learners, len(parts.teams.attackers), micro_batch(config), accumulation(config, learners)
    )
    planner = Planner(profile, link_of(profile, link_gbit, latency_us), config.staleness or 1)
    prediction = planner.predict(method, layout)
    given = link_gbit is not None or latency_us is not None
    notes = (
        *_differences(parts, profile),
        *_outside(planner, prediction, given),
        *_not_counted(parts),
    )
    return Time(prediction.step, "predicted from the profile", notes)


def _differences(parts: Parts, profile: Profile) -> Iterator[str]:
    """Where the profile was measured on something else than this run."""
    config, work = parts.config, profile.workload
    pairs: Sequence[tuple[str, Any, Any]] = (
        ("model", work.model, config.model.name),
        ("model width", _width(work.width), _width(config.model.width)),
        ("model.args", _args(work.args), _args(config.model.args)),
        ("classes", work.num_classes, parts.data.num_classes),
        ("image size", work.image_size, parts.data.image_size),
        ("channels", work.channels, parts.data.channels),
        ("precision", work.precision, config.precision),
        ("optimizer", work.optimizer, config.optim.name),
        ("channels_last", work.channels_last, config.channels_last),
        ("device", profile.device, parts.engine.device.type),
        ("processes per host", profile.processes, processes_here()),
    )
    for name, measured, mine in pairs:
        if measured != mine:
            yield f"the profile is of {name} {measured}, the run has {mine}: measure one of its own"
    if config.compile:
        yield "the run compiles, and a profile is measured without torch.compile"


def _width(width: int | None) -> str:
    return "as it is by default" if width in (None, WIDTH) else str(width)


def _args(args: Sequence[str]) -> str:
    return " ".join(sorted(args)) or "none"


def _outside(planner: Planner, prediction: Prediction, link_given: bool) -> Iterator[str]:
    """What of the prediction lies outside of what was measured: B, R and L in the table of ``conadv plan``."""
    points, layout, link = (
        planner.measured(prediction.method).points,
        prediction.layout,
        planner.link,
    )
    first, last = points[0].micro_batch, points[-1].micro_batch
    words = {
        "batch": f"the micro-batch {layout.micro_batch} (measured: {first} to {last})",
        "ranks": f"{layout.learners} ranks (the link is of {link.ranks if link else 1})",
        "link": "the link, as given",
    }
    found = [words[name] for name in extrapolated(planner, prediction, link_given)]
    if found:
        yield f"extrapolated: {', '.join(found)}"


def _not_counted(parts: Parts) -> Iterator[str]:
    config = parts.config
    yield "without loading images"
    plain = config.attack.num_steps == 1 and config.attack.share == 1
    if not plain or config.data.aug_view is not None:
        yield "a profile knows FGSM on every image and no third view: this run's step takes another time"
