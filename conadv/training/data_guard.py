"""Whether the data of a run are still those of its checkpoint."""

from __future__ import annotations

from typing import Any

from conadv.data.fingerprint import Fingerprint, changes
from conadv.data.loader import Data
from conadv.distributed.comm import Comm
from conadv.errors import ConadvError, printable
from conadv.training.checkpoint import restoring


def check_same_on_ranks(data: Data, comm: Comm) -> None:
    """Every host reads data of its own: all must have the classes and numbers of images of rank 0.

    Else ranks would take other numbers of steps, or call one class by two numbers. Raises
    ConadvError. Ranks: collective.
    """
    source = data.source
    sizes = {"training": len(source.train.labels), "test": len(source.test.labels)}
    theirs, names = comm.broadcast_object((sizes, source.class_names))
    with comm.agreed():
        for split, count in sizes.items():
            if count != theirs[split]:
                raise ConadvError(
                    f"This rank has {count} {split} images, rank 0 has {theirs[split]}. Give every "
                    "host the same data."
                )
        if names != source.class_names:
            raise ConadvError(
                "The classes of this rank are not those of rank 0, or in another order: "
                f"{_first_difference(names, source.class_names)}. Give every host the same data."
            )


def changed_data(
    state: dict[str, Any], now: Fingerprint, *, accept: bool, other_classes: bool, remedy: str
) -> list[str]:
    """What has changed in the data since the checkpoint ``state``, one sentence each.

    Raises ConadvError with ``remedy`` unless nothing has, or ``accept`` takes it; other classes
    only with ``other_classes``, and never another number of them, which the network cannot have.
    """
    with restoring(state):
        before = state.get("data")
        names = list(state.get("class_names") or now["classes"])
        if before is not None:
            found = changes(before, now)
        elif names == now["classes"]:  # a checkpoint of version 0.1 says no more
            found = []
        else:
            found = [f"Classes: {_first_difference(names, now['classes'])}."]
    same_names = names == now["classes"]
    possible = same_names or (other_classes and len(names) == len(now["classes"]))
    if not found or (accept and possible):
        return found
    advice = remedy if possible else "The network's outputs stand for the classes that it had."
    listed = "\n  ".join(found)
    raise ConadvError(
        f"The data have changed since the checkpoint of step {state['step']}:\n  {listed}\n"
        f"Bring them back, or start a new run. {advice}"
    )


def _first_difference(before: Any, now: Any) -> str:
    pairs = zip(before, now, strict=False)
    for place, (old, new) in enumerate(pairs):
        if old != new:
            return f"number {place} was {printable(old)}, it is {printable(new)} now"
    return f"there were {len(before)}, there are {len(now)} now"
