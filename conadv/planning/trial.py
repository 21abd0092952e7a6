"""Trial steps on random images with a throw-away engine like a run's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conadv import rng
from conadv.config.resolve import resolve
from conadv.config.schema import Config, replace
from conadv.distributed.comm import Comm
from conadv.engine.executors import Executor
from conadv.models.trial import check_model
from conadv.planning.cost_model import step_bytes
from conadv.planning.profile import Sizes
from conadv.training.build import make_model, make_optimizer, make_step, method_of
from conadv.types import Batch, MicroBatch, StepRecord

LEARNING_RATE = 1e-6  # random labels must not blow the weights up


@dataclass(frozen=True)
class Shape:
    """What decides the size of a network and of its images."""

    channels: int
    image_size: int
    num_classes: int


def with_method(config: Config, name: str) -> Config:
    """``config``, not yet resolved, with a plan's method, such as "conadv-lookahead".

    "-replace": half of the images are the method's, in one batch norm with the clean ones.
    """
    method, _, variant = name.partition("-")
    changes = {
        "method": method,
        "lookahead": variant == "lookahead",
        "staleness": config.staleness if method == "conadv" else None,
    }
    if variant == "replace":
        changes |= {"mix": "replace", "attack__share": 0.5, "adv_route": "clean"}
    return resolve(replace(config, **changes))


class Trial:
    """An engine of ``config`` and the same random images in every step.

    Nothing of a run is touched: weights, optimizer and statistics are the engine's own, random
    draws are keyed.

    numbers: this rank's micro-batches by their number in the global batch, each of ``micro_batch``
    clean images.
    Raises ConadvError where the network does not take images of this shape.
    Ranks: collective over ``comm``, and over the executor's ranks.
    """

    def __init__(
        self,
        config: Config,
        shape: Shape,
        comm: Comm,
        micro_batch: int,
        numbers: Iterable[int] = (0,),
        executor: Executor | None = None,
    ) -> None:
        if config.compile:
            torch.compiler.reset()  # other sizes count towards the limit of recompilations
        model = trial_model(config, shape).to(comm.device)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        method = method_of(config)
        optimizer = make_optimizer(config, model, LEARNING_RATE)
        calm = replace(config, on_nonfinite="skip", nonfinite_limit=100)
        self.engine = make_step(calm, model, optimizer, method, None, comm, executor)
        aug = ["aug"] if config.data.aug_view is not None else []
        views = ("clean", *method.data_views, *aug)
        self.config, self.micro_batch = config, micro_batch
        self.micro = tuple(
            random_images(shape, method.num_fresh(micro_batch), number, comm.device, views)
            for number in numbers
        )

    def batch(self, step: int) -> Batch:
        return Batch(step, self.micro)

    def step(self) -> StepRecord:
        """The engine's next step, with the future batch that its method looks at."""
        step, ahead = self.engine.version, self.engine.ahead
        return self.engine(self.batch(step), self.batch(step + ahead) if ahead else None)

    def phases(self) -> dict[str, float]:
        """Seconds per phase of the next step."""
        return self.step().phases

    @cached_property
    def sizes(self) -> Sizes:
        """Bytes of the network, its optimizer and its images. Takes a step where there was none."""
        if not self.engine.optimizer.state:
            self.step()
        x = self.engine.images(self.micro[0], "clean")
        states = [value for of in self.engine.optimizer.state.values() for value in of.values()]
        return Sizes(
            weights=sum(p.nbytes for p in self.engine.model.parameters()),
            optimizer_state=sum(x.nbytes for x in states if isinstance(x, Tensor) and x.dim()),
            image=x[0].nbytes,
            activations_per_image=activations(self.engine.model, x) // len(x),
            memory=1,
        )

    @property
    def held(self) -> float:
        """Images on the device per clean image of the local batch, as float32.

        Those that the method makes for a step, and those that wait for a later one.
        """
        method = self.engine.method
        dtype: torch.dtype = getattr(torch, self.config.pending_dtype or "float32")
        made = method.route is not None and not method.data_views
        waiting = method.ahead or int(method.needs_input_gradient)
        return self.config.attack.share * (made + waiting * dtype.itemsize / 4)

    def run_bytes(
        self, learners: int, attack_ranks: int, micro_batch: int, workspace: float = 1.0
    ) -> int:
        """Bytes that a learner of a run needs at least, by the cost model.

        workspace: factor on the activations, for the workspaces of kernels.
        """
        config, method, sizes = self.config, self.engine.method, self.sizes
        made = round(config.attack.share * micro_batch) if method.route is not None else 0
        clean = micro_batch - made * (method.mix == "replace")
        views = (clean, made, micro_batch * (config.data.aug_view is not None))
        extra = (learners > 1, attack_ranks > 0, method.two_gradients, method.lookahead)
        kept = round(workspace * sizes.activations_per_image)
        return step_bytes(
            sizes.model_copy(update={"activations_per_image": kept}),
            copies=2 + sum(map(bool, extra)) + (config.ema.decay is not None),
            local_batch=config.global_batch_size // learners,
            held=self.held,
            micro_batch=sum(views) if self.engine.network.fuses_views else max(views),
            views_per_pass=1,
        )


def trial_model(config: Config, shape: Shape) -> nn.Module:
    """The network on the CPU, tried on two images. Raises ConadvError where it rejects them."""
    model = make_model(config, shape.channels, shape.num_classes)
    with rng.scope(torch.device("cpu"), config.seed, "trial"):
        check_model(model, shape.channels, shape.image_size, shape.num_classes)
    return model


def random_images(
    shape: Shape, count: int, number: int, device: torch.device, views: Iterable[str] = ("clean",)
) -> MicroBatch:
    """Micro-batch ``number``: uint8 images of every view, and labels, on the device."""
    draws = rng.generator("cpu", 0, "trial", number)
    size = (count, shape.channels, shape.image_size, shape.image_size)
    images = {
        name: torch.randint(0, 256, size, generator=draws, dtype=torch.uint8).to(device)
        for name in views
    }
    y_N = torch.randint(0, shape.num_classes, (count,), generator=draws)
    return MicroBatch(number, y_N.to(device), images)


def activations(model: nn.Module, x_NCHW: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass besides parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(x_NCHW)
        loss = F.cross_entropy(logits, logits.argmax(1))
    del loss  # until here the graph keeps storages alive, so that no address is seen twice
    return sum(size for place, size in kept.items() if place not in own)
