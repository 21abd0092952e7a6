"""Hessian and sharpness against oracles and by hand; the command from a run to its analysis."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import aslinearoperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from conadv import ConadvError, PixelSpace, strip
from conadv.analysis.equal_loss import step_at_loss
from conadv.analysis.hessian import hessian, spectrum, trace
from conadv.analysis.model import analyze
from conadv.analysis.model import images as images_of
from conadv.analysis.objective import Objective, clean_objective
from conadv.analysis.options import Options
from conadv.analysis.sharpness import keskar_sharpness, sam_sharpness
from conadv.cli.program import main
from conadv.config import recipes
from conadv.config.schema import replace
from conadv.training import checkpoint
from conadv.training.loop import train
from conadv.training.resume import load_run
from conadv.training.run_dir import RunDir
from tests.helpers import images, same, state, tiny_resnet

F64 = torch.float64
CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_net(*_: str) -> nn.Module:
    """141 weights, smooth, without batch norm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 5)
    )


def normed_net(*routes: str) -> nn.Module:
    """A few weights and a batch norm with routes, smooth."""
    from conadv import split_batchnorm

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)
    )
    nn.init.uniform_(net[1].running_mean, -0.5, 0.5)
    return split_batchnorm(net, *routes)


def objective(model: nn.Module, n: int = 10, chunk: int = 4, dtype: torch.dtype = F64) -> Objective:
    x, y = images(n, dtype=dtype)
    return clean_objective(model, x, y, dtype=dtype, chunk=chunk)


def dense_hessian(found: Objective) -> Tensor:
    """torch's own Hessian of the mean loss over all images at once."""

    def loss(theta: Tensor) -> Tensor:
        logits = torch.func.functional_call(found.model, found.named(theta), found.x_NCHW)
        return F.cross_entropy(logits, found.y_N)

    with sdpa_kernel(SDPBackend.MATH):
        dense: Tensor = torch.autograd.functional.hessian(loss, found.theta)
    return dense


def symmetric(size: int = 40) -> np.ndarray:
    """Eigenvalues 100, 30, 10, then a cluster in [-1, 1]."""
    values = np.concatenate([[100.0, 30.0, 10.0], np.linspace(-1, 1, size - 3)])
    q, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((size, size)))
    return q @ np.diag(values) @ q.T


def test_value_and_gradient_by_hand() -> None:
    # Red when: a chunk's loss is its own mean (10 images in chunks of 4, 4, 2), or train mode is
    # kept.
    model = tiny_resnet(dtype=F64).train()
    found, plain = objective(model), tiny_resnet(dtype=F64).eval()
    x, y = images(10, dtype=F64)
    logits = plain(x)
    loss = F.cross_entropy(logits, y)
    assert found.value(found.theta).loss == pytest.approx(loss.item(), rel=1e-12)
    assert found.value(found.theta).accuracy == (logits.argmax(1) == y).double().mean().item()
    gradients = torch.autograd.grad(loss, list(plain.parameters()))
    reached, gradient = found.gradient(found.theta)
    assert reached == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in gradients]))


def test_pixels_are_normalised() -> None:
    # Red when: uint8 images go in without division by 255, or without the space's mean and std.
    x = torch.randint(0, 256, (6, 3, 8, 8), generator=generator(), dtype=torch.uint8)
    space, y = PixelSpace((0.4,), (0.3,)), torch.arange(6) % 5
    one = clean_objective(tiny_resnet(), x, y, space)
    two = clean_objective(tiny_resnet(), space.normalize(x), y)
    assert one.value(one.theta) == two.value(two.theta)


class Attention(nn.Module):
    """A few weights and a fused attention over the image's rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(24, 8), nn.Linear(8, 5)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        q = self.into(x_NCHW.transpose(1, 2).flatten(2)).unsqueeze(1)
        return self.out(F.scaled_dot_product_attention(q, q, q).mean((1, 2)))


@pytest.mark.parametrize("make", [small_net, lambda: normed_net("adv"), Attention])
def test_eigenvalues_and_trace_are_those_of_the_dense_hessian(make: Any) -> None:
    # Red when: a chunk is weighted by its own size, the loss is summed over images, theta holds the
    # adv route, batch norm takes batch statistics, or attention is the fused one, which has no
    # second derivative.
    found = objective(make())
    dense, operator = dense_hessian(found), hessian(found)
    v = torch.randn(len(found.theta), generator=generator(), dtype=F64)
    np.testing.assert_allclose(operator @ v.numpy(), (dense @ v).numpy(), rtol=1e-10, atol=1e-12)
    true = torch.linalg.eigvalsh(dense).flip(0)
    got = spectrum(operator, 3, 60, generator())
    assert got.eigenvalues == pytest.approx(true[:3].tolist(), rel=1e-10)
    assert max(got.residuals) < 1e-8 * got.eigenvalues[0]
    value, stderr = trace(operator, 20, generator(5), got)
    assert abs(value - torch.trace(dense).item()) < 3 * stderr
    assert 0 < stderr < 0.1 * value


def test_residuals_say_how_far_lanczos_is() -> None:
    # Red when: eigenvalues come in ARPACK's order, or vectors in another order than their
    # eigenvalues.
    matrix = symmetric(200)
    got = spectrum(aslinearoperator(matrix), 3, 6, generator())
    assert got.eigenvalues == sorted(got.eigenvalues, reverse=True)
    u = got.vectors_PK
    np.testing.assert_allclose(u.T @ u, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(np.diag(u.T @ matrix @ u)[:3], got.eigenvalues, rtol=1e-10)
    assert got.captured == pytest.approx(np.trace(u.T @ matrix @ u))
    true = np.linalg.eigvalsh(matrix)
    assert max(got.residuals) > 1e-6  # 6 iterations are few
    for value, residual in zip(got.eigenvalues, got.residuals, strict=True):
        assert np.abs(true - value).min() <= residual * (1 + 1e-9) + 1e-12


def test_a_hessian_of_zero_and_more_eigenvalues_than_there_are() -> None:
    # Red when: ARPACK's refusal of a zero starting vector is a traceback; count >= iterations
    # reaches it.
    assert spectrum(aslinearoperator(np.zeros((9, 9))), 2, 4, generator()).eigenvalues == [0.0, 0.0]
    for count, iterations in ((5, 5), (0, 5), (2, 10)):
        with pytest.raises(ConadvError, match="fewer eigenvalues than iterations"):
            spectrum(aslinearoperator(np.eye(9)), count, iterations, generator())


def test_trace_is_unbiased_and_its_error_is_right() -> None:
    # Red when: entries of z are normal (a larger error), or the error is the spread without 1 /
    # sqrt(n).
    matrix = symmetric(12)
    value, stderr = trace(aslinearoperator(matrix), 3000, generator(2))
    off = matrix - np.diag(np.diag(matrix))
    theory = math.sqrt(2 * (off**2).sum() / 3000)  # Hutchinson's variance: 2 |H - diag H|^2
    assert stderr == pytest.approx(theory, rel=0.08)
    assert abs(value - np.trace(matrix)) < 3 * theory
    assert math.isnan(trace(aslinearoperator(matrix), 1, generator())[1])


def test_trace_with_known_eigenvectors() -> None:
    # Red when: the known eigenvalues are left out, or the probes keep their part in the span.
    matrix = symmetric(60)
    operator = aslinearoperator(matrix)
    known = spectrum(operator, 3, 30, generator(3))
    _, plain = trace(operator, 400, generator(4))
    value, stderr = trace(operator, 400, generator(4), known)
    assert stderr < 0.2 * plain
    assert abs(value - np.trace(matrix)) < 3.5 * stderr


def test_sam_by_hand() -> None:
    # Red when: rho is multiplied by |g|, the step goes down, or the gradient's norm is per tensor.
    model = tiny_resnet(dtype=F64).eval()
    found = objective(model)
    x, y = images(10, dtype=F64)
    before = F.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(before, list(model.parameters()))
    length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients, strict=True):
            p += 0.1 * g / length
        after = F.cross_entropy(model(x), y)
    assert sam_sharpness(found, 0.1) == pytest.approx((after - before).item(), rel=1e-9)
    assert sam_sharpness(found, 1e-6) == pytest.approx(1e-6 * length, rel=1e-3)


def test_keskar_against_all_corners() -> None:
    # Red when: the box is eps |theta| without + 1, L and not 1 + L divides, or a step is never
    # clipped.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3, bias=False)).double()
    x = torch.randn(20, 2, 1, 1, generator=generator(), dtype=F64)
    found = clean_objective(model, x, torch.arange(20) % 3, dtype=F64)
    theta, eps = found.theta, 0.2
    loss = found.value(theta).loss
    width = eps * (theta.abs() + 1)
    # a linear model's loss is convex in its weights: the maximum is at one of the box's 2^6 corners
    signs = [torch.tensor(s, dtype=F64) for s in itertools.product((-1, 1), repeat=6)]
    best = max(found.value(theta + width * s).loss for s in signs)
    exact = 100 * (best - loss) / (1 + loss)
    assert exact > 5
    assert 0.97 * exact <= keskar_sharpness(found, eps, 20) <= exact * (1 + 1e-12)
    assert 0 < keskar_sharpness(found, eps, 1) <= exact


def everything(found: Objective) -> list[float]:
    known = spectrum(hessian(found), 1, 3, generator())
    values = [*known.eigenvalues, *trace(hessian(found), 2, generator(1), known)]
    values += [sam_sharpness(found, 0.05), keskar_sharpness(found, 1e-3, 2)]
    return [*values, found.value(1.1 * found.theta).loss]


def test_the_model_is_left_alone_and_only_its_clean_route_counts() -> None:
    # Red when: the copy is not stripped (theta grows by the adv route), or the model itself is
    # analysed.
    model = tiny_resnet("adv").train()
    next(model.parameters()).requires_grad_(False)
    for p in list(model.parameters())[1:]:
        p.grad = torch.ones_like(p)
    model.get_submodule("bn1").eval()
    before, modes = state(model), [m.training for m in model.modules()]
    frozen = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5)
    random = torch.get_rng_state()
    values = everything(objective(model, dtype=torch.float32))
    assert torch.equal(torch.get_rng_state(), random)
    assert same(state(model), before)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in [*model.parameters()][1:])

    assert everything(objective(strip(tiny_resnet("adv")), dtype=torch.float32)) == values
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if ".routes." in name:
                value.fill_(1)
    assert everything(objective(model, dtype=torch.float32)) == values


class Quantiser(nn.Module):
    """Widens a range and counts its calls in buffers, in eval mode too, as torch's observers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        self.largest.copy_(torch.maximum(self.largest, x_NCHW.detach().abs().max()))
        self.calls += 1
        return x_NCHW * (1 + self.largest)


def test_no_pass_changes_a_buffer() -> None:
    # Red when: functional_call gets the weights alone: what L(theta) is depends on earlier calls.
    model = nn.Sequential(Quantiser(), nn.Flatten(), nn.Linear(192, 5))
    x, y = images(8)
    found = clean_objective(model, x, y)
    # the widest image comes last: a range that stayed wide would change the first one's logits
    first = clean_objective(model, x[:1], y[:1])
    wide = clean_objective(model, 2 * x[:1], y[:1])
    alone = first.value(first.theta)
    both = clean_objective(model, torch.cat([2 * x[:1], x[:1]]), y[:1].repeat(2), chunk=1)
    two = both.value(both.theta).loss
    assert two == pytest.approx((alone.loss + wide.value(wide.theta).loss) / 2)
    assert everything(found) == everything(found)
    for one in (model, found.model):
        assert one[0].calls == 0  # type: ignore[index]
        assert one[0].largest == 0  # type: ignore[index]


def test_chunks_do_not_matter() -> None:
    # Red when: a chunk's gradient is divided by the chunk's size.
    values = [everything(objective(tiny_resnet(), chunk=chunk)) for chunk in (3, 10)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_nothing_to_analyse() -> None:
    x, y = images(4)
    with pytest.raises(ConadvError, match="at least one image"):
        clean_objective(nn.Flatten(), x, y)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    nn.init.constant_(broken[1].weight, math.nan)  # type: ignore[arg-type]
    with pytest.raises(ConadvError, match="loss is nan"):
        clean_objective(broken, x, y)


RUN = {"model__width": 4, "epochs": None, "steps": 24, "schedule__warmup_epochs": 0}
RUN |= {"global_batch_size": 256, "eval__every_epochs": None}
FAST = ["--images", "48", "--eigenvalues", "2", "--iterations", "4", "--probes", "2"]
FAST += ["--keskar-steps", "2", "--robust-images", "64", "--threads", "1"]
KEYS = ["version", "newest_step", "at_loss", "options", "step", "split", "images", "loss"]
KEYS += ["accuracy", "hessian", "sharpness", "robust", "seconds"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adversarial route, and beside it one without a checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "a"
    more = {"eval__train_images": 48, "eval__robust_images": 64, "eval__robust_steps": 10}
    more |= {"checkpoint__every_epochs": 1, "checkpoint__keep": 99}
    train(replace(recipes.get("digits"), **RUN, **more, method="disadv"), out)
    (out.parent / "empty").mkdir()
    (out.parent / "empty" / "config.yaml").write_text((out / "config.yaml").read_text())
    return out


def test_command(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: the images differ from evaluation's, PGD is left out, or the second call computes
    # again.
    assert main(["analyze", str(trained), *FAST]) == 0
    assert "analysis.json: written" in capsys.readouterr().out
    found, summary = (
        json.loads((trained / f"{name}.json").read_text()) for name in ("analysis", "summary")
    )
    assert list(found) == KEYS
    assert (found["step"], found["split"], found["images"]) == (24, "train", 48)
    assert found["loss"] == pytest.approx(summary["train_loss"], rel=1e-5)
    assert found["accuracy"] == summary["train_accuracy"]
    robust = {"eps": 0.1, "steps": 10, "accuracy": summary["robust_accuracy"], "images": 64}
    assert found["robust"] == robust
    spectral = found["hessian"]
    assert spectral["eigenvalues"] == sorted(spectral["eigenvalues"], reverse=True)
    counts = (len(spectral["residuals"]), spectral["iterations"], spectral["probes"])
    assert counts == (2, 4, 2)
    assert spectral["trace_stderr"] > 0
    assert found["sharpness"]["keskar"]["value"] > 0

    written = (trained / "analysis.json").stat().st_mtime_ns
    assert main(["analyze", str(trained), *FAST]) == 0
    assert "had it already" in capsys.readouterr().out
    assert (trained / "analysis.json").stat().st_mtime_ns == written
    fewer = ["analyze", str(trained), *FAST, "--robust-images", "0"]
    assert main(fewer) == 2
    assert "robust_images: 64 -> 0). Add --overwrite" in " ".join(capsys.readouterr().err.split())
    assert main([*fewer, "--overwrite"]) == 0
    again = json.loads((trained / "analysis.json").read_text())
    assert (again["robust"], again["hessian"]) == (None, spectral)


def test_at_equal_loss(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: the newest checkpoint is analysed; nearest is taken by the difference, not the
    # ratio; a damaged one ends the search; another target's analysis is kept.
    out = shutil.copytree(trained, tmp_path / "run")
    (out / "analysis.json").unlink(missing_ok=True)
    kept, at = checkpoint.steps(out / "checkpoints"), {}
    for step in kept:
        parts = load_run(out, CPU, step=step)
        found = clean_objective(parts.model, *images_of(parts.data, "train", 48), parts.space)
        at[step] = found.value(found.theta).loss
    pairs = itertools.pairwise(sorted(at.values()))
    low, high = max(pairs, key=lambda pair: pair[1] / pair[0])
    target = ((low * high) ** 0.5 + (low + high) / 2) / 2  # nearer to the low one by the difference
    (nearest,) = (step for step in kept if at[step] == high)
    assert nearest != kept[-1]
    options = [*FAST, "--robust-images", "0"]
    assert main(["analyze", str(out), *options, "--at-loss", f"{target}"]) == 0
    got = json.loads((out / "analysis.json").read_text())
    assert (got["step"], got["newest_step"], got["at_loss"]) == (nearest, 24, target)
    assert got["loss"] == pytest.approx(at[nearest], rel=1e-5)
    assert main(["analyze", str(out), *options]) == 2
    assert f"at_loss: {target} -> None)" in " ".join(capsys.readouterr().err.split())
    damaged = out / "checkpoints" / f"step_{nearest:08d}.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert step_at_loss(out, at[nearest], 48, CPU) in (set(kept) - {nearest})


BAD = {
    "zero loss": ("RUN", ["--at-loss", "0"], "must be 1e-09 or more"),
    "far from all": ("RUN", ["--at-loss", "1e-9"], "factor of 2 of 1e-09"),
    "no checkpoint": ("empty", ["--seed", "9"], "empty holds no checkpoint"),
    "no images": ("RUN", ["--images", "0"], "--images 0 must be 1 or more"),
    "negative": ("RUN", ["--probes", "-1"], "--probes -1 must be 0 or more"),
    "infinite": ("RUN", ["--rho", "inf"], "--rho inf must be a finite number"),
    "no box": ("RUN", ["--keskar-eps", "0"], "--keskar-eps 0.0 must be 1e-12 or more"),
    "too few": ("RUN", ["--iterations", "2"], "2 eigenvalues by 2 iterations"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: the check that the message belongs to is taken out; the first run is analysed before
    # the second is looked at.
    other, options, message = BAD[name]
    before = sorted(trained.iterdir())
    runs = [str(trained), str(trained.parent / other)] if other == "empty" else [str(trained)]
    assert main(["analyze", *runs, *FAST, "--overwrite", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(trained.iterdir()) == before


def test_parts_can_be_left_out(trained: Path) -> None:
    # Red when: a part that was switched off is computed, or nan goes into the file.
    off = {"images": 16, "eigenvalues": 0, "robust_images": 0, "keskar_steps": 1}
    parts, said = load_run(trained, CPU), list[str]()
    before = state(parts.model)
    whole = (parts.model, parts.data, parts.space, parts.config)
    found = analyze(*whole, Options(**off, probes=0), said.append)  # type: ignore[arg-type]
    assert [found[key] for key in ("hessian", "robust")] == [None] * 2
    assert said == list(found["seconds"]) == ["hessian", "sharpness", "robust"]
    some = analyze(*whole, Options(**off, probes=1, dtype="float64"))["hessian"]  # type: ignore[arg-type]
    assert (some["eigenvalues"], some["trace_stderr"]) == (None, None)
    assert math.isfinite(some["trace"])
    assert same(state(parts.model), before)


def test_a_new_run_drops_the_analysis(trained: Path, tmp_path: Path) -> None:
    # Red when: RunDir leaves analysis.json of the run that it deletes: it would pass for the new
    # run's.
    run = tmp_path / "a"
    run.mkdir()
    shutil.copy(trained / "config.yaml", run)
    (run / "analysis").mkdir()  # version 0.1 had pictures there
    (run / "analysis.json").write_text("{}")
    RunDir(run).start(RunDir(run).open())
    assert not list(run.glob("analysis*"))
