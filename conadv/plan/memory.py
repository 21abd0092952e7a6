"""What a step needs of a device's memory: lower bounds, without the allocator's reserve and kernels' workspaces."""

from __future__ import annotations

from conadv.plan.model import Layout, Planner, kind_of
from conadv.plan.profile import Sizes


def step_bytes(
    sizes: Sizes,
    *,
    copies: int,
    local_batch: int,
    held: float,
    micro_batch: int,
    views_per_pass: int,
) -> int:
    """Bytes that a learner's step needs at least.

    copies: of the weights (themselves, gradients, buckets, ...); held: images kept at a time per clean image of the
    local batch, its views and those that wait, as float32; views_per_pass: of a micro-batch in one forward pass.
    """
    images = int(local_batch * held * sizes.image)
    in_pass = micro_batch * views_per_pass
    return (
        sizes.weights * copies
        + sizes.optimizer_state
        + images
        + in_pass * sizes.activations_per_image
    )


def learner_bytes(planner: Planner, method: str, layout: Layout) -> int:
    """weights + gradients + buckets + optimizer state + look-ahead copy + send buffer + activations + images.

    Activations are those of one forward pass: of one view, or of all where views are fused. Images: the batch's views
    and the tau batches that wait (as float32).
    """
    sizes, kind, measured = planner.profile.sizes, kind_of(method), planner.measured(method)
    views = 1 if method == "vanilla" else 2
    copies = 2 + (layout.learners > 1) + kind.lookahead + (layout.attack_ranks > 0)
    waiting = planner.staleness if kind.stale else int(method == "recycle")
    return step_bytes(
        sizes,
        copies=copies,
        local_batch=layout.local_batch,
        held=views + waiting,
        micro_batch=layout.micro_batch,
        views_per_pass=views // measured.passes or 1,
    )


def attacker_bytes(planner: Planner, layout: Layout) -> int:
    """weights, two buffers to receive them, one micro-batch's activations, a share's images before and after."""
    sizes = planner.profile.sizes
    images = 2 * layout.share * layout.micro_batch * sizes.image
    return 3 * sizes.weights + images + layout.micro_batch * sizes.activations_per_image


def device_bytes(planner: Planner, method: str, layout: Layout) -> int:
    """The most that any rank of the layout needs."""
    learner = learner_bytes(planner, method, layout)
    return max(learner, attacker_bytes(planner, layout)) if layout.attack_ranks else learner
