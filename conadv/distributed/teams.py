"""Who learns and who attacks among the ranks of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise

from conadv.distributed.comm import Comm
from conadv.distributed.environment import processes_here
from conadv.errors import ConadvError


@dataclass(frozen=True)
class Teams:
    """The ranks of ``world`` by what they do, as its numbers.

    ``comm``: on a learner that of the learners; on an attack rank a Comm of one, since attack ranks
    reduce nothing. ``may_lose``: learners go on without attack ranks that fail, so nothing that is
    collective over ``world`` comes after the first step.
    """

    world: Comm
    comm: Comm
    learners: tuple[int, ...]
    attackers: tuple[int, ...]
    may_lose: bool = False

    @property
    def attacking(self) -> bool:
        """Whether this process is an attack rank."""
        return self.world.rank in self.attackers

    def feeder(self, number: int) -> int:
        """The learner that sends weights to ``attackers[number]``: it has its first micro-batch."""
        return self.learners[number * len(self.learners) // len(self.attackers)]

    def micro_batches(self, accumulation: int) -> range:
        """The global numbers of the micro-batches that this process reads in a step.

        A learner's own ``accumulation`` of them, or an attack rank's share of all. Raises
        ConadvError if attack ranks are left without any.
        """
        if not self.attacking:
            return range(self.comm.rank * accumulation, (self.comm.rank + 1) * accumulation)
        parts = shares(len(self.learners) * accumulation, len(self.attackers))
        return parts[self.attackers.index(self.world.rank)]


def shares(micro_batches: int, attackers: int) -> list[range]:
    """Which of a step's micro-batches each attack rank attacks: contiguous and even.

    A micro-batch is not divided: batch norm in the attack sees what it sees in training.
    """
    if attackers > micro_batches:
        raise ConadvError(
            f"{attackers} attack ranks for {micro_batches} micro-batch(es) per step: some would "
            "have nothing to do. Choose a smaller --micro-batch-size, or fewer attack ranks."
        )
    edges = [number * micro_batches // attackers for number in range(attackers + 1)]
    return [range(first, last) for first, last in pairwise(edges)]


def roles(
    ranks: int, attack_ranks: int, ranks_per_host: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(learners, attackers): every host gives its last ranks, if that divides, else the world.

    Images then stay on their host as far as possible: learners and attack ranks share out
    micro-batches in rank order. Raises ConadvError where no learner would be left.
    """
    if not 0 <= attack_ranks < ranks:
        raise ConadvError(
            f"{attack_ranks} attack rank(s) of {ranks} rank(s) in all: at least one rank must be "
            "left to learn. Start more processes (torchrun --nproc-per-node), or ask for fewer."
        )
    hosts, rest = divmod(ranks, ranks_per_host)
    if rest or attack_ranks % hosts:
        hosts, ranks_per_host = 1, ranks
    first_attacker = ranks_per_host - attack_ranks // hosts
    attackers = tuple(rank for rank in range(ranks) if rank % ranks_per_host >= first_attacker)
    return tuple(rank for rank in range(ranks) if rank not in attackers), attackers


def make_teams(world: Comm, attack_ranks: int, may_lose: bool = False) -> Teams:
    """Divide ``world``. Collective; every rank asks for the same.

    ``may_lose``: the world's last ranks attack, so that they can have launchers of their own, and
    they must have them: a torchrun agent that loses one process ends all of its own.
    """
    # rank 0's answer for all: hosts may have different numbers of ranks
    per_host = world.broadcast_object(processes_here(world.ranks))
    with world.agreed():
        if may_lose and world.device.type == "cuda":
            raise ConadvError(
                "--on-attack-loss continue is for the CPU: NCCL ends every process whose peer has "
                "failed. Use --on-attack-loss stop, and start all ranks again with --resume."
            )
        learners, attackers = roles(
            world.ranks, attack_ranks, world.ranks if may_lose else per_host
        )
    if may_lose:
        _check_launchers(world, learners)
    if not attackers:
        return Teams(world, world, learners, attackers)
    # every rank of the world takes part in making a group, its members or not
    group = world.new_group(learners) if len(learners) > 1 else None
    is_learner = world.rank in learners
    comm = world.team(learners, group) if is_learner else world.team([world.rank])
    return Teams(world, comm, learners, attackers, may_lose)


def _check_launchers(world: Comm, learners: tuple[int, ...]) -> None:
    """Raise ConadvError if one torchrun agent has both learners and attack ranks. Collective."""
    agent = os.environ.get("GROUP_RANK") if "TORCHELASTIC_RUN_ID" in os.environ else None
    found = world.gather_objects((world.rank in learners, agent))
    with world.agreed():
        agents = [{agent for learns, agent in found if learns is kind} for kind in (True, False)]
        if (agents[0] & agents[1]) - {None}:
            raise ConadvError(
                "--on-attack-loss continue has no effect where one torchrun starts learners and "
                "attack ranks: when one of its processes dies, it ends all others. Start the "
                "attack ranks by a torchrun of their own, with the higher --node-rank "
                "(docs/concurrency.md)."
            )
