"""How long runs take: from what is known of their arithmetic, and better from the runs that went before them."""

from __future__ import annotations

from collections.abc import Iterable

from conadv.config.schema import Config
from conadv.methods import METHODS


def relative_cost(config: Config) -> float:
    """Roughly how long a run takes beside others on the same network: images times views times passes.

    A gradient of one view counts 1, an input gradient (forward and half of backward) two thirds. Small batches use a
    core less well: about 60 images' worth of work per step is spent on everything else (8x8 images, ResNet-8).
    """
    row, attack = METHODS[config.method], config.attack
    attacked = attack.share if "share" in row.attack else 1.0
    passes = (
        1.0
        + (config.data.aug_view is not None)
        + (attacked if "adv_weight" in row.settings else 0.0)
    )
    if "num_steps" in row.attack:
        passes += 0.67 * attack.num_steps * attacked
    if config.method == "sam":
        passes += 1
    work = (config.epochs or 0.0) * (config.data.train_images or 1000) or (
        config.steps or 0
    ) * config.global_batch_size
    return work * passes * (1 + 60 / config.global_batch_size)


def kind(config: Config) -> str:
    """The same for configs that take the same time: all but the seed and the learning rate."""
    optim = config.optim.model_copy(update={"lr": 1.0})
    return repr(config.model_copy(update={"seed": 0, "optim": optim}))


class Estimate:
    """Seconds that runs take: the mean of finished runs of their kind, else their cost at the speed measured so far.

    Until a run has finished, the ones that are going give the speed.
    """

    def __init__(self) -> None:
        self._kinds: dict[int, tuple[Config, str]] = {}
        self._finished: dict[str, list[float]] = {}
        self._going: dict[str, float] = {}
        self._speed = [0.0, 0.0]  # seconds, cost
        self._early = [0.0, 0.0]

    def finished(self, config: Config, seconds: float) -> None:
        self._finished.setdefault(self._kind(config), []).append(seconds)
        self._add(self._speed, config, seconds)

    def going(self, config: Config, share: float, seconds: float) -> None:
        """A run is ``share`` of its way after ``seconds``."""
        if share > 0.05 and self._kind(config) not in self._finished:
            self._going[self._kind(config)] = seconds / share
            self._early = [seconds / share, relative_cost(config)]

    @property
    def known(self) -> bool:
        return self._speed[1] > 0 or self._early[1] > 0

    def seconds(self, config: Config) -> float:
        """Of one run of ``config``; its cost in units of its own while nothing is known."""
        name = self._kind(config)
        if name in self._finished:
            return sum(self._finished[name]) / len(self._finished[name])
        if name in self._going:
            return self._going[name]
        seconds, cost = self._speed if self._speed[1] else self._early
        return relative_cost(config) * (seconds / cost if cost else 1.0)

    def left(
        self, waiting: Iterable[Config], going: Iterable[tuple[Config, float]], workers: int
    ) -> float:
        """Seconds until all are done: what is waiting, and the rest of what is going with its share done."""
        rest = [self.seconds(config) for config in waiting]
        rest += [self.seconds(config) * (1 - share) for config, share in going]
        return max(sum(rest) / workers, max(rest, default=0.0))

    def _kind(self, config: Config) -> str:
        """Kept, as it is asked for several times a second; with the config, so that its id stays its own."""
        if id(config) not in self._kinds:
            self._kinds[id(config)] = (config, kind(config))
        return self._kinds[id(config)][1]

    @staticmethod
    def _add(speed: list[float], config: Config, seconds: float) -> None:
        speed[0] += seconds
        speed[1] += relative_cost(config)
