"""The engine on a CUDA device: same numbers as on the CPU, phases measured by events,
repeatable.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from conadv import (
    FGSM,
    LARS,
    Concurrent,
    Inline,
    Stream,
    TrainStep,
    split_batchnorm,
    windows,
)
from conadv.models.small import SmallResNet
from conadv.training.loop import train

from .helpers import same, state, tiny_resnet, train_step
from .test_methods import CASES, EPS, SEED, SPACE, as_batch, sgd
from .test_training import config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def engine_on(device: str, name: str = "conadv", fuse: bool | None = None) -> TrainStep:
    model = tiny_resnet("adv", dtype=torch.float64).to(device)
    return train_step(model, sgd(model), CASES[name](), seed=SEED, space=SPACE, fuse_views=fuse)


@pytest.mark.parametrize("name", ["vanilla", "multiview", "recycle"])
@pytest.mark.parametrize("fuse", [False, True])
def test_cuda_equals_cpu_in_float64(name: str, fuse: bool) -> None:
    # Methods whose random draws are made on the device differ by those draws, so they are not
    # compared.
    losses = []
    for device in ("cpu", "cuda"):
        engine = engine_on(device, name, fuse)
        losses.append([engine(as_batch(t, dtype=torch.float64)).loss for t in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_phases_are_device_times() -> None:
    record = engine_on("cuda")(as_batch(0, dtype=torch.float64), as_batch(1, dtype=torch.float64))
    assert set(record.phases) == {"attack", "gradient", "update"}
    assert all(seconds > 0 for seconds in record.phases.values())


def test_spans_lie_on_the_hosts_clock() -> None:
    # Red when: the device's clock is not tied to the host's, or is tied once and drifts with
    # float32.
    engine = engine_on("cuda")
    for t in range(3):
        before = time.monotonic()
        record = engine(as_batch(t, dtype=torch.float64), as_batch(t + 1, dtype=torch.float64))
        after = time.monotonic()
        assert all(before - 2e-3 <= begin <= end <= after + 2e-3 for _, begin, end in record.spans)


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("pending_dtype", [None, "float16"])
def test_the_second_stream_computes_what_inline_computes(
    lookahead: bool, pending_dtype: str | None
) -> None:
    # Red when: the side stream does not wait for the update (stale weights), the update does not
    # wait for the side stream, or images are freed while the other stream reads them. Large enough
    # that kernels of both overlap.
    torch.backends.cudnn.deterministic = True
    runs = []
    for executor in (Inline(), Stream()):
        torch.manual_seed(0)
        model = split_batchnorm(SmallResNet(20, 32, 3, 5), "adv").cuda()
        method = Concurrent(FGSM(EPS, space=SPACE), 1, lookahead=lookahead)
        options = {"space": SPACE, "executor": executor, "pending_dtype": pending_dtype}
        engine = train_step(model, LARS(model.parameters(), 1.0), method, **options)
        stream = [as_batch(t, size=64) for t in range(30)]
        losses = [engine(batch, future).losses for batch, future in windows(stream, 1)]
        runs.append((losses, state(model)))
    (a, x), (b, y) = runs
    assert a == b
    assert same(x, y)


def test_stream_without_a_future_batch_or_an_attack() -> None:
    model = tiny_resnet("adv").cuda()
    engine = train_step(model, sgd(model), CASES["noise"](), space=SPACE, executor=Stream())
    assert engine(as_batch(0)).loss > 0


def test_random_streams_are_left_alone_and_runs_repeat() -> None:
    # Red when: rng.scope does not fork the CUDA generator.
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    engines = [engine_on("cuda") for _ in range(2)]
    torch.backends.cudnn.deterministic = True
    for engine in engines:
        for t in range(3):
            engine(as_batch(t, dtype=torch.float64), as_batch(t + 1, dtype=torch.float64))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    a, b = (state(engine.model) for engine in engines)
    assert all(torch.allclose(a[key], b[key], rtol=1e-10) for key in a)


def test_a_run_trains_evaluates_and_resumes(tmp_path: Path) -> None:
    settings = config(method="conadv", lookahead=True, precision="bf16", channels_last=True)
    summary = train(settings, tmp_path, device="cuda")
    assert summary["attack_seconds_share"] > 0
    (tmp_path / "checkpoints" / "step_00000006.pt").unlink()
    assert train(settings, tmp_path, device="cuda", resume=True)["steps"] == 6


def test_fp16_trains() -> None:
    model = tiny_resnet("adv").cuda()
    engine = train_step(
        model, sgd(model), CASES["conadv"](), space=SPACE, precision="fp16", clip_norm=1.0
    )
    stream = [as_batch(t) for t in range(6)]
    assert all(torch.isfinite(torch.tensor(engine(*pair).loss)) for pair in windows(stream, 1))
