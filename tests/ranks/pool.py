"""A few processes on this machine as the ranks of one run (gloo over loopback).

The processes stay and run one function after another, since importing torch takes longer than most
tests. They come from a fork server that has imported torch and has run nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

HANGS = 150.0  # seconds: far beyond any timeout of a test, on a busy machine too
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.ranks.jobs"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(pipe: Connection, environment: dict[str, str], timeout: float) -> None:
    """A rank: run the functions that come through the pipe, send back what they return or raise."""
    import torch

    from conadv import Comm

    os.environ.update(environment)
    torch.set_num_threads(1)
    comm = Comm.from_environment("cpu", timeout)
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send(("value", function(comm, *args)))
        except Exception as error:
            pipe.send(("error", (type(error).__name__, str(error), traceback.format_exc())))
    comm.close()


class Ranks:
    """N processes; ``run`` has all of them run one function; answers are in rank order."""

    def __init__(self, ranks: int, timeout: float = 30.0) -> None:
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks),
        }
        common |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(ranks):
            here, there = CONTEXT.Pipe()
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = CONTEXT.Process(target=serve, args=(there, environment, timeout), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        for pipe in self.pipes:
            pipe.send((function, args))

    def answers(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """("value", ...), ("error", (type, message, traceback)) or ("ended", code) of each rank."""
        self.start(function, *args)
        return [self.answer(rank) for rank in range(len(self.pipes))]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(comm, *args)`` returns on every rank; the test fails if one raises."""
        found = self.answers(function, *args)
        failed = [
            f"rank {n}: {kind} {what[2] if kind == 'error' else what}"
            for n, (kind, what) in enumerate(found)
            if kind != "value"
        ]
        if failed:
            self.close()
            pytest.fail("\n".join(failed))
        return [value for _, value in found]

    def errors(self, function: Callable[..., Any], *args: Any) -> list[str]:
        """The message of the ConadvError that ``function(comm, *args)`` raises on every rank."""
        found = self.answers(function, *args)
        assert [(kind, what[0]) for kind, what in found] == [("error", "ConadvError")] * len(found)
        return [what[1] for _, what in found]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def answer(self, rank: int, timeout: float = HANGS) -> Any:
        if not self.pipes[rank].poll(timeout):
            self.close()
            pytest.fail(f"rank {rank} hangs: no answer after {timeout:g} s")
        try:
            return self.pipes[rank].recv()
        except EOFError:
            self.processes[rank].join()
            return "ended", self.processes[rank].exitcode
