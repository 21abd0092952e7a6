"""What of the facts would be slow or wrong, each with what to do. RULES has the rules, functions of the facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from conadv.doctor.facts import Facts
from conadv.errors import install
from conadv.preflight.memory import GIB

Level = Literal["wrong", "slow", "note"]


@dataclass(frozen=True)
class Finding:
    """``level``: "wrong" stops runs or breaks them, "slow" costs time, "note" is good to know. ``todo``: what to do."""

    level: Level
    what: str
    todo: str


Found = Iterator[Finding]


def findings(facts: Facts) -> list[Finding]:
    """All that the rules find, the worst first."""
    found = [finding for rule in RULES for finding in rule(facts)]
    return sorted(found, key=lambda finding: ("wrong", "slow", "note").index(finding.level))


def _versions(facts: Facts) -> Found:
    """torch 2.N belongs to torchvision 0.(N + 15): other pairs fail when an operator is loaded."""
    torch, vision = _numbers(facts.versions["torch"]), _numbers(facts.versions["torchvision"])
    if torch is None or vision is None or torch[0] != 2 or vision[0] != 0:
        return
    if vision[1] != torch[1] + 15:
        yield Finding(
            "wrong",
            f"torch {facts.versions['torch']} and torchvision {facts.versions['torchvision']} are not of one release",
            f"install torchvision 0.{torch[1] + 15}",
        )
    if torch[1] < 9:
        yield Finding(
            "wrong",
            f"torch {facts.versions['torch']} is older than 2.9",
            "install torch 2.9 or newer",
        )


def _numbers(version: str) -> tuple[int, int] | None:
    parts = version.split(".")[:2]
    return (
        (int(parts[0]), int(parts[1]))
        if len(parts) == 2 and all(part.isdigit() for part in parts)
        else None
    )


def _extras(facts: Facts) -> Found:
    missing = [name for name, version in facts.extras.items() if version is None]
    if missing:
        yield Finding(
            "note",
            f"extras that are not installed: {', '.join(missing)}",
            f"{install(*missing)} if you want them",
        )


def _cuda_missing(facts: Facts) -> Found:
    if not facts.nvidia_driver or facts.cuda:
        return
    if facts.variables.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding(
            "note", "CUDA_VISIBLE_DEVICES hides all CUDA devices", "unset it to train on them"
        )
    elif facts.cuda_built is None:
        yield Finding(
            "wrong",
            "an NVIDIA driver is there, and this torch is built without CUDA",
            "install a CUDA build",
        )
    else:
        yield Finding(
            "wrong",
            f"an NVIDIA driver is there, and torch (CUDA {facts.cuda_built}) sees no device",
            "compare the driver's CUDA version (nvidia-smi) with torch's; in a container, pass the devices through",
        )


def _cuda_devices(facts: Facts) -> Found:
    for index, device in enumerate(facts.cuda):
        if device.capability < (8, 0):
            yield Finding(
                "slow",
                f"cuda:{index} ({device.name}) has no bf16 in hardware",
                "use --precision fp16 (capability 7.0 and newer) or fp32",
            )
        if not device.free:
            yield Finding(
                "wrong",
                f"cuda:{index} cannot be used: its memory is full, or another process has it for itself (compute mode)",
                "wait for the other process (nvidia-smi shows it), or choose devices by CUDA_VISIBLE_DEVICES",
            )
        elif device.free < device.memory / 2:
            yield Finding(
                "slow",
                f"cuda:{index} has {device.free / GIB:.1f} of {device.memory / GIB:.1f} GiB free: others use it",
                "wait for them, or choose devices by CUDA_VISIBLE_DEVICES",
            )
    if len({device.name for device in facts.cuda}) > 1:
        yield Finding(
            "slow",
            "the CUDA devices differ: the slowest sets the step time",
            "choose like ones (CUDA_VISIBLE_DEVICES)",
        )
    lonely = [
        index for index, device in enumerate(facts.cuda) if len(facts.cuda) > 1 and not device.peers
    ]
    if lonely:
        yield Finding(
            "slow",
            f"no peer access for cuda:{', cuda:'.join(map(str, lonely))}: what ranks exchange goes through the host",
            "look at nvidia-smi topo -m; in a virtual machine or container, allow peer-to-peer",
        )
    if len(facts.cuda) > 1 and facts.backends == ("gloo",):
        yield Finding(
            "wrong",
            "several CUDA devices and no NCCL in this torch",
            "install a build of torch with NCCL",
        )


def _debugging(facts: Facts) -> Found:
    if facts.variables.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        yield Finding(
            "slow", "CUDA_LAUNCH_BLOCKING is set: every kernel waits for the one before", "unset it"
        )
    if facts.cuda and facts.variables.get("NCCL_P2P_DISABLE", "0") not in ("", "0"):
        yield Finding(
            "slow", "NCCL_P2P_DISABLE is set: devices do not talk directly", "unset it, if they can"
        )


def _threads(facts: Facts) -> Found:
    cores = facts.usable_cores
    if facts.threads > cores + 0.5:
        yield Finding(
            "slow",
            f"torch uses {facts.threads} threads on {cores:g} usable core(s)",
            f"set OMP_NUM_THREADS={max(1, int(cores))} (for several processes on a host: cores / processes)",
        )
    elif not facts.cuda and facts.threads < cores / 2 and "WORLD_SIZE" not in facts.variables:
        yield Finding(
            "note",
            f"torch uses {facts.threads} thread(s) of {cores:g} usable cores",
            "for a single process, --threads or OMP_NUM_THREADS may be as many as there are cores",
        )


def _processor(facts: Facts) -> Found:
    if facts.cuda:
        return
    if not {"avx512_bf16", "amx_bf16", "bf16"} & set(facts.cpu_flags):
        yield Finding(
            "slow", "the processor has no bf16 in hardware", "use --precision fp32 on the CPU"
        )
    if not facts.onednn:
        yield Finding(
            "slow",
            "torch is built without oneDNN: convolutions on the CPU are slow, and channels_last gains nothing",
            "install the usual wheel of torch, and leave --channels-last out",
        )


def _allocator(facts: Facts) -> Found:
    if facts.allocator == "other":
        yield Finding(
            "slow",
            "the system's allocator is not glibc's, and conadv cannot tell it to keep freed memory",
            "on the CPU, preload jemalloc or tcmalloc (LD_PRELOAD)",
        )


def _shared_memory(facts: Facts) -> Found:
    """A worker hands over two micro-batches at a time: 128 photographs of 3 x 224 x 224 are 19 MB, for each view."""
    if facts.shm is None:
        yield Finding(
            "wrong",
            "there is no /dev/shm: loader processes cannot hand images over",
            "--data.num-workers 0",
        )
    elif facts.shm[1] < GIB // 2:
        yield Finding(
            "wrong",
            f"/dev/shm has {facts.shm[1] / 2**20:.0f} MiB free: loader processes end with a bus error",
            "in a container give it more (docker run --shm-size 8g), or use --data.num-workers 0",
        )


def _room(facts: Facts) -> Found:
    if facts.disk_free < 2 * GIB:
        yield Finding(
            "wrong" if facts.disk_free < GIB // 10 else "slow",
            f"{facts.disk_free / GIB:.2f} GiB of disk are free here",
            "free some, or give --out on another disk; conadv train --dry-run says what a run needs",
        )
    if facts.memory_free is not None and facts.memory_free < 2 * GIB:
        yield Finding(
            "slow",
            f"{facts.memory_free / GIB:.2f} GiB of memory are free",
            "end other programs, or use --micro-batch-size auto",
        )
    if facts.open_files is not None and facts.open_files < 1024:
        yield Finding(
            "slow",
            f"a process may open {facts.open_files} files: many loader processes need more",
            "ulimit -n 65536",
        )


def _network(facts: Facts) -> Found:
    names = {interface.name for interface in facts.interfaces}
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        asked = facts.variables.get(variable, "")
        plain = asked and not asked.startswith(("^", "="))  # NCCL: all but, and exactly
        if plain and not any(name.startswith(part) for part in asked.split(",") for name in names):
            yield Finding(
                "wrong",
                f"{variable} names {asked}, and there is no such interface",
                f"choose of {', '.join(sorted(names))}",
            )
    slow = [
        i
        for i in facts.interfaces
        if i.up and i.name != "lo" and i.speed is not None and i.speed < 10_000
    ]
    if slow and all(i in slow or i.name == "lo" or not i.up for i in facts.interfaces):
        fastest = max(i.speed or 0 for i in slow)
        yield Finding(
            "note",
            f"the fastest interface has {fastest / 1000:g} Gbit/s",
            "conadv plan tells what that costs on several hosts",
        )
    if not facts.backends:
        yield Finding(
            "wrong",
            "this torch has neither gloo nor NCCL: only one process can train",
            "install another build",
        )


RULES: tuple[Callable[[Facts], Found], ...] = (
    _versions,
    _cuda_missing,
    _cuda_devices,
    _debugging,
    _threads,
    _processor,
    _allocator,
    _shared_memory,
    _room,
    _network,
    _extras,
)
