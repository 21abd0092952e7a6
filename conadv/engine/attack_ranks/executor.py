"""Attack ranks: some ranks of the world do nothing but attack, the others train.

Step t of a learner: send the weights for the attack on B_{t + tau} (theta_t, or the look-ahead's
prediction), take the adversarial images of B_t, which were made at step t - tau, then gradient,
wait, update. An attack rank: read the batch of the next step, wait for weights, attack, send the
images. Both read the same data order, so no clean images travel.
conadv.engine.attack_ranks.messages says what does.

Where attack ranks may fail (``Teams.may_lose``), learners keep what they need to make the images
themselves: the weights of every request until its images are there. What a failed attack rank owes
is made on the critical path, what it would have had to make later beside the sums, all of it at the
same weights and with the same draws: the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable

from conadv.distributed.teams import Teams
from conadv.engine.attack_ranks.attacker import Attacker
from conadv.engine.attack_ranks.failed import FailedRank
from conadv.engine.attack_ranks.learner import Learner
from conadv.engine.attack_ranks.messages import Channels
from conadv.engine.executors import Executor, Served, Step, check_future_attack
from conadv.errors import ConadvError
from conadv.types import Batch, StepRecord


class Ranks(Executor):
    """Learners train, attack ranks attack for them.

    ``late``: what a learner does with adversarial images that are not there when their step begins:
    "wait" (the bits are those of :class:`Inline`) or "skip" (the step goes without them, on all
    learners, and its record says ``late``; which steps that hits depends on timing).
    Raises ConadvError without attack ranks, or for a method that attacks no future batch.
    Ranks: ``step(batch, future)`` on learners, ``step.serve(batches)`` on attack ranks, ``close``
    on all.
    In flight: see :class:`Learner` and :class:`Attacker`.
    """

    def __init__(self, teams: Teams, late: str = "wait") -> None:
        if late not in ("wait", "skip"):
            raise ConadvError(f"late {late!r} is not 'wait' or 'skip'.")
        if not teams.attackers or (teams.may_lose and late == "skip"):
            raise ConadvError(
                "The ranks executor needs attack ranks, make_teams(comm, attack_ranks=1) or more, "
                "and late 'wait' where they may be lost."
            )
        self.teams = teams
        self._skip = late == "skip"
        self._side: Learner | Attacker | None = None

    @property
    def attack_only(self) -> bool:
        return self.teams.attacking

    def attach(self, engine: Step) -> None:
        """Collective over the world: all ranks take rank 0's weights."""
        check_future_attack(engine.method, "Attack ranks")
        # Each learner has running statistics of its own, of its own images.
        if engine.method.attack_statistics == "running":
            raise ConadvError(
                "Attack ranks have no running statistics: use attack.statistics batch, or no "
                "attack ranks."
            )
        # Sums over the world would wait for attack ranks, which sum nothing.
        if engine.comm is not self.teams.comm:
            raise ConadvError(
                "With attack ranks learners sum gradients among themselves: give TrainStep "
                "comm=teams.comm."
            )
        # Frozen parameters and batch norm's statistics do not travel later: the same from the
        # start.
        world = self.teams.world
        world.broadcast([*engine.model.parameters(), *engine.model.buffers()])
        kind = Attacker if self.teams.attacking else Learner
        self._side = kind(self.teams, engine, Channels.open(world), self._skip)

    def __call__(self, engine: Step, batch: Batch, future: Batch | None) -> StepRecord:
        if not isinstance(self._side, Learner):
            raise ConadvError("An attack rank has no steps of its own: call step.serve(batches).")
        # Weights leave first of all, so that attack ranks work while this rank has its gradient.
        late = self._side.begin(batch, future)
        engine.gradient(batch)
        self._side.prepare()
        engine.wait()
        record = engine.update()
        record.late = late
        return record

    def settle(self) -> None:
        if isinstance(self._side, Learner):
            self._side.settle()

    def failed_ranks(self) -> list[FailedRank]:
        return self._side.failed.take() if isinstance(self._side, Learner) else []

    def serve(self, batches: Iterable[Batch], served: Served | None = None) -> None:
        if not isinstance(self._side, Attacker):
            raise ConadvError("serve() is for attack ranks; a learner calls step(batch, future).")
        self._side.serve(batches, served)

    def close(self, *, failed: bool = False) -> bool:
        """End the exchange: a learner tells its attack ranks, an attack rank waits to be told.

        ``failed``: training has ended with an error. Returns whether all went well, on attack ranks
        too.
        """
        side, self._side = self._side, None
        return side.close(failed) if side is not None else not failed
