"""Hessian, sharpness and landscape against oracles and by hand; the command from a run to its pictures."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from conadv import ConadvError, PixelSpace, strip
from conadv.analysis.equal_loss import step_at_loss
from conadv.analysis.hessian import Spectrum, lanczos, trace
from conadv.analysis.landscape import filter_normalised, grid, line, plane
from conadv.analysis.model import analyze
from conadv.analysis.model import images as images_of
from conadv.analysis.objective import Objective, clean_objective
from conadv.analysis.options import Options
from conadv.analysis.sharpness import keskar_sharpness, sam_sharpness
from conadv.analysis.surface import plane_figure
from conadv.analysis.watch import Watch
from conadv.cli.analyze import _Progress, read
from conadv.cli.program import main
from conadv.config import recipes
from conadv.config.schema import replace
from conadv.training import checkpoint
from conadv.training.trainer import load_run, train
from tests.helpers import images, no_norm_net, same, state, tiny_resnet

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_net() -> nn.Module:
    """135 weights, smooth, without batch norm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1, bias=False),
        nn.Tanh(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def objective(model: nn.Module, n: int = 10, chunk: int = 4, dtype: torch.dtype = F64) -> Objective:
    x, y = images(n, dtype=dtype)
    return clean_objective(model, x, y, dtype=dtype, chunk=chunk)


def explicit_hessian(found: Objective) -> Tensor:
    """torch's own Hessian of the mean loss over all images at once."""

    def loss(theta: Tensor) -> Tensor:
        return F.cross_entropy(
            torch.func.functional_call(found.model, found.named(theta), found.x_NCHW), found.y_N
        )

    hessian: Tensor = torch.autograd.functional.hessian(loss, found.theta)
    return hessian


def symmetric(size: int = 40, dtype: torch.dtype = F64) -> Tensor:
    """Eigenvalues 100, 30, 30, then a cluster in [-1, 1]."""
    values = torch.cat([torch.tensor([100.0, 30.0, 30.0]), torch.linspace(-1, 1, size - 3)]).to(F64)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator(1), dtype=F64))
    return (q @ values.diag() @ q.T).to(dtype)


def test_value_and_gradient_by_hand() -> None:
    # Red when: a chunk's loss is its own mean (10 images in chunks of 4, 4, 2), or train mode is kept.
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


@pytest.mark.parametrize("make", [small_net, lambda: tiny_resnet("adv")], ids=["plain", "split"])
def test_hvp_is_the_hessian_times_v(make: Any) -> None:
    # Red when: create_graph's gradient is detached, a chunk is not weighted by its size, or theta holds the adv route.
    found = objective(make())
    v = torch.randn(len(found.theta), generator=generator(), dtype=F64)
    small = len(found.theta) < 300
    expected = explicit_hessian(found) @ v if small else by_differences(found, v)
    torch.testing.assert_close(
        found.hvp(found.theta, v), expected, rtol=1e-9 if small else 1e-5, atol=1e-6
    )


def by_differences(found: Objective, v: Tensor, h: float = 1e-6) -> Tensor:
    ahead, behind = (found.gradient(found.theta + s * h * v)[1] for s in (1, -1))
    return (ahead - behind) / (2 * h)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_lanczos_finds_the_largest(dtype: torch.dtype) -> None:
    # Red when: _without is left out (copies of 100 appear), or residuals take the first component of the vectors.
    matrix = symmetric(dtype=dtype)
    found = lanczos(lambda v: matrix @ v, matrix[0], 5, 40, generator(), tolerance=0.0)
    true = torch.linalg.eigvalsh(matrix.double()).flip(0)
    simple = (
        [0, 1] if dtype == F64 else [0]
    )  # of a double eigenvalue Lanczos sees one copy, but for rounding
    accuracy = 1e-9 if dtype == F64 else 1e-5
    for i in simple:
        assert found.eigenvalues[i] == pytest.approx(true[i].item(), rel=accuracy)
    assert sum(abs(value - 100) < 1 for value in found.eigenvalues) == 1
    basis = torch.stack(found.basis).double()
    torch.testing.assert_close(
        basis @ basis.T, torch.eye(len(basis), dtype=F64), rtol=0, atol=1e-12 + accuracy
    )
    assert found.captured == pytest.approx(
        torch.trace(basis @ matrix.double() @ basis.T).item(), rel=1e-4
    )


def test_lanczos_residuals_are_true_and_it_ends_early() -> None:
    # Red when: the loop ends at the first eigenvalue's residual, or the residual lacks its factor beta.
    matrix = symmetric(200)
    found = lanczos(lambda v: matrix @ v, matrix[0], 2, 60, generator(), tolerance=1e-3)
    assert found.iterations < 30
    assert max(found.residuals) <= 1e-3 * 100
    cut = lanczos(lambda v: matrix @ v, matrix[0], 2, 5, generator(), tolerance=0.0)
    q = torch.stack(cut.basis)
    values, vectors = torch.linalg.eigh(q @ matrix @ q.T)
    for i in (0, 1):
        ritz = q.T @ vectors[:, -1 - i]
        assert cut.eigenvalues[i] == pytest.approx(values[-1 - i].item())
        assert cut.residuals[i] == pytest.approx(
            (matrix @ ritz - values[-1 - i] * ritz).norm().item(), rel=1e-6
        )


def test_lanczos_of_an_exhausted_space() -> None:
    # Red when: the vector after the last is normalised all the same (nan), or 3 weights get 5 eigenvalues.
    identity = lanczos(lambda v: 2 * v, torch.zeros(50), 3, 10, generator())
    assert identity.eigenvalues == pytest.approx([2.0])
    tiny = lanczos(
        lambda v: torch.tensor([3.0, 2.0, 1.0]) * v,
        torch.zeros(3),
        5,
        10,
        generator(),
        tolerance=0.0,
    )
    assert tiny.eigenvalues == pytest.approx([3.0, 2.0, 1.0], rel=1e-5)
    zero = lanczos(lambda v: 0 * v, torch.zeros(9), 2, 4, generator())
    assert (zero.eigenvalues, zero.iterations) == ([0.0], 1)
    with pytest.raises(ConadvError, match="5 eigenvalues in 4"):
        lanczos(lambda v: v, torch.zeros(9), 5, 4, generator())


def test_trace_is_unbiased_and_its_error_is_right() -> None:
    # Red when: entries of z are normal (a larger error), or the error is the spread without its square root of n.
    matrix = symmetric(12)
    found = trace(lambda v: matrix @ v, matrix[0], 3000, generator(2))
    true = torch.trace(matrix).item()
    off = matrix - matrix.diag().diag()
    theory = math.sqrt(
        2 * off.square().sum().item() / 3000
    )  # Hutchinson's variance: 2 |H - diag H|^2
    assert found.stderr == pytest.approx(theory, rel=0.08)
    assert abs(found.value - true) < 3 * theory
    assert math.isnan(trace(lambda v: matrix @ v, matrix[0], 1, generator()).stderr)
    with pytest.raises(ConadvError, match="at least 1"):
        trace(lambda v: v, matrix[0], 0, generator())


def test_trace_with_known_eigenvectors() -> None:
    # Red when: captured is left out, or the probes keep their part in the span (the large eigenvalues count twice).
    matrix = symmetric(60)
    known = lanczos(lambda v: matrix @ v, matrix[0], 3, 12, generator(3), tolerance=0.0)
    true, plain = (
        torch.trace(matrix).item(),
        trace(lambda v: matrix @ v, matrix[0], 400, generator(4)),
    )
    found = trace(lambda v: matrix @ v, matrix[0], 400, generator(4), known)
    assert found.stderr < 0.5 * plain.stderr
    assert abs(found.value - true) < 3.5 * found.stderr
    whole = Spectrum([], [], 60, list(torch.eye(60, dtype=F64)), true)
    assert trace(lambda v: matrix @ v, matrix[0], 2, generator(), whole).value == pytest.approx(
        true, rel=1e-12
    )


def test_eigenvalues_and_trace_of_a_network() -> None:
    # Red when: the Hessian of a sum, not a mean, over images is taken.
    found = objective(small_net())
    theta, hessian = found.theta, explicit_hessian(found)
    got = lanczos(lambda v: found.hvp(theta, v), theta, 3, 60, generator(), tolerance=1e-8)
    assert got.eigenvalues == pytest.approx(
        torch.linalg.eigvalsh(hessian).flip(0)[:3].tolist(), rel=1e-6
    )
    estimate = trace(lambda v: found.hvp(theta, v), theta, 20, generator(5), got)
    assert abs(estimate.value - torch.trace(hessian).item()) < 3 * estimate.stderr
    assert 0 < estimate.stderr < 0.1 * estimate.value


@pytest.mark.parametrize(
    "make", [no_norm_net, lambda: tiny_resnet("adv", dtype=F64)], ids=["plain", "split"]
)
def test_against_curvlinops(make: Any) -> None:
    """curvlinops computes the same products and, by its own eigensolver and estimator, the same numbers."""
    # Red when: the running statistics are not used, or the loss is summed.
    curvlinops = pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch")
    found = objective(make())
    theta = found.theta
    model = strip(make()).double().eval()
    data = [(found.x_NCHW[:6], found.y_N[:6]), (found.x_NCHW[6:], found.y_N[6:])]
    weights = list(model.parameters())
    oracle = curvlinops.HessianLinearOperator(
        model, nn.CrossEntropyLoss(), weights, data, check_deterministic=False
    )
    v = torch.randn(len(theta), generator=generator(), dtype=F64)
    torch.testing.assert_close(found.hvp(theta, v), oracle @ v, rtol=1e-7, atol=1e-9)
    got = lanczos(lambda u: found.hvp(theta, u), theta, 2, 40, generator(), tolerance=1e-7)
    from scipy.sparse.linalg import eigsh

    values = eigsh(oracle.to_scipy(), k=2, which="LA", return_eigenvectors=False)
    assert got.eigenvalues == pytest.approx(sorted(values.tolist(), reverse=True), rel=1e-5)


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
    with pytest.raises(ConadvError, match="rho"):
        sam_sharpness(found, 0.0)


def test_keskar_against_all_corners() -> None:
    # Red when: the box is eps |theta| without + 1, the loss is divided by L and not 1 + L, or a step is never clipped.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3, bias=False)).double()
    x, y = torch.randn(20, 2, 1, 1, generator=generator(), dtype=F64), torch.arange(20) % 3
    found = clean_objective(model, x, y, dtype=F64)
    theta, eps = found.theta, 0.2
    loss = found.value(theta).loss
    width = eps * (theta.abs() + 1)
    # a linear model's loss is convex in its weights: the maximum over the box is at one of its 2^6 corners
    corners = [
        theta + width * torch.tensor(signs, dtype=F64)
        for signs in itertools.product((-1, 1), repeat=6)
    ]
    best = max(found.value(corner).loss for corner in corners)
    exact = 100 * (best - loss) / (1 + loss)
    assert exact > 5
    got = keskar_sharpness(found, eps, 20)
    assert 0.97 * exact <= got <= exact * (1 + 1e-12)
    assert 0 < keskar_sharpness(found, eps, 1) <= exact
    with pytest.raises(ConadvError, match="num_steps"):
        keskar_sharpness(found, eps, 0)


def test_keskar_grows_with_the_box() -> None:
    found = objective(tiny_resnet())
    small, large = (keskar_sharpness(found, eps) for eps in (1e-4, 1e-3))
    assert 0 < small < large


def test_directions_are_filter_normalised() -> None:
    # Red when: the whole tensor is scaled at once, or biases and batch norm move.
    found = objective(tiny_resnet())
    direction = found.named(filter_normalised(found, generator()))
    for name, weight in found.model.named_parameters():
        d, w = direction[name], weight.detach()
        if w.dim() < 2:
            assert not d.any(), name
        else:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1))
            assert not torch.allclose(d, w)
    again = filter_normalised(found, generator())
    assert torch.equal(again, filter_normalised(found, generator()))
    assert not torch.equal(again, filter_normalised(found, generator(1)))


def test_line_and_plane_by_hand() -> None:
    # Red when: the plane's rows and columns are swapped, or the test curve is made on training images.
    found = objective(small_net())
    test = found.on(*images(6, seed=9, dtype=F64))
    a, b = (filter_normalised(found, generator(seed)) for seed in (0, 1))
    assert grid(5) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    along, square = line(found, test, a, grid(5)), plane(found, a, b, grid(3))
    assert along.train[2] == found.value(found.theta)
    assert along.test[2] == test.value(found.theta)
    assert along.train[3] == found.value(found.theta + 0.5 * a)
    assert square.loss[1] == [along.train[i].loss for i in (0, 2, 4)]
    assert square.loss[2][0] == pytest.approx(found.value(found.theta - a + b).loss, rel=1e-12)
    with pytest.raises(ConadvError, match="odd number"):
        grid(4)


def everything(found: Objective) -> list[float]:
    theta = found.theta
    spectrum = lanczos(lambda v: found.hvp(theta, v), theta, 1, 2, generator(), 0.0)
    values = [*spectrum.eigenvalues, sam_sharpness(found, 0.05), keskar_sharpness(found, 1e-3, 2)]
    return [
        *values,
        *(v.loss for v in line(found, found, filter_normalised(found, generator()), grid(3)).train),
    ]


def test_the_model_is_left_alone_and_only_its_clean_route_counts() -> None:
    # Red when: the copy is not stripped (the weight space grows by the adv route), or the model itself is analysed.
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
    assert all(
        p.grad is not None and bool((p.grad == 1).all()) for p in list(model.parameters())[1:]
    )

    assert everything(objective(strip(tiny_resnet("adv")), dtype=torch.float32)) == values
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if ".routes." in name:
                value.fill_(1)
    assert everything(objective(model, dtype=torch.float32)) == values


def test_chunks_do_not_matter() -> None:
    # Red when: a chunk's gradient is divided by the chunk's size.
    values = [everything(objective(tiny_resnet(), chunk=chunk)) for chunk in (3, 10)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_nothing_to_analyse() -> None:
    x, y = images(4)
    with pytest.raises(ConadvError, match="at least one image"):
        clean_objective(nn.Flatten(), x, y)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    with torch.no_grad():
        broken[1].weight.fill_(math.nan)  # type: ignore[operator]
    with pytest.raises(ConadvError, match="loss of the trained model is nan"):
        clean_objective(broken, x, y)


SETTINGS = {
    "model__width": 4,
    "epochs": None,
    "steps": 3,
    "schedule__warmup_epochs": 0,
    "global_batch_size": 256,
}
FAST = [
    *(
        "--images",
        "48",
        "--eigenvalues",
        "2",
        "--iterations",
        "4",
        "--probes",
        "2",
        "--keskar-steps",
        "2",
    ),
    *("--grid", "5", "--robust-images", "64", "--threads", "1"),
]
KEYS = [
    "version",
    "newest_step",
    "at_loss",
    "options",
    "step",
    "split",
    "images",
    "loss",
    "accuracy",
    "hessian",
]
KEYS += ["sharpness", "landscape_1d", "landscape_2d", "robust", "seconds"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adversarial route, and beside it one without a checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "a"
    more = {
        "eval__train_images": 48,
        "eval__robust_images": 64,
        "eval__robust_steps": 10,
        "eval__every_epochs": None,
    }
    train(replace(recipes.get("digits"), **{**SETTINGS, "steps": 24}, **more, method="disadv"), out)
    (out.parent / "empty").mkdir()
    (out.parent / "empty" / "config.yaml").write_text((out / "config.yaml").read_text())
    return out


def colours(path: Path) -> int:
    return len(np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0))


def test_command(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: the images differ from evaluation's, PGD is left out, the second call computes again, or a picture is
    # left over from an analysis that had one.
    assert main(["analyze", str(trained), *FAST, "--landscape", "2d"]) == 0
    out = capsys.readouterr().out
    assert "hessian" in out
    assert "% done, left" in out
    assert "analysis.json: written" in out
    found, summary = read(trained), json.loads((trained / "summary.json").read_text())
    assert list(found) == KEYS
    assert (found["step"], found["split"], found["images"]) == (24, "train", 48)
    assert found["loss"] == pytest.approx(summary["train_loss"], rel=1e-5)
    assert (found["accuracy"], found["robust"]["accuracy"]) == (
        summary["train_accuracy"],
        summary["robust_accuracy"],
    )
    assert found["robust"] == {
        "eps": 0.1,
        "steps": 10,
        "accuracy": summary["robust_accuracy"],
        "images": 64,
    }
    hessian, one, two = found["hessian"], found["landscape_1d"], found["landscape_2d"]
    assert hessian["eigenvalues"] == sorted(hessian["eigenvalues"], reverse=True)
    assert (len(hessian["residuals"]), hessian["iterations"], hessian["probes"]) == (2, 4, 2)
    assert hessian["trace_stderr"] > 0
    assert one["train_loss"][2] == two["loss"][2][2] == found["loss"]
    assert one["alphas"] == two["alphas"] == two["betas"] == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert one["train_loss"][0] == pytest.approx(two["loss"][2][0])
    assert one["train_loss"] != one["test_loss"]
    assert found["sharpness"]["keskar"]["value"] > 0
    assert colours(trained / "analysis" / "landscape_1d.png") > 50
    assert colours(trained / "analysis" / "landscape_2d.png") > 200

    written = (trained / "analysis.json").stat().st_mtime_ns
    assert main(["analyze", str(trained), *FAST, "--landscape", "2d"]) == 0
    assert "had it already" in capsys.readouterr().out
    assert (trained / "analysis.json").stat().st_mtime_ns == written
    assert main(["analyze", str(trained), *FAST]) == 2
    assert "landscape: 2d -> 1d). Add --overwrite" in capsys.readouterr().err
    assert main(["analyze", str(trained), *FAST, "--overwrite"]) == 0
    assert read(trained)["landscape_2d"] is None
    assert read(trained)["hessian"] == hessian
    assert [path.name for path in (trained / "analysis").iterdir()] == ["landscape_1d.png"]


def test_at_equal_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: the newest checkpoint is analysed; nearest is taken by the difference, not the ratio; a damaged one ends
    # the search; another target's analysis is kept.
    out = tmp_path / "run"
    more = {
        "eval__robust_images": 0,
        "eval__every_epochs": None,
        "checkpoint__every_epochs": 1,
        "checkpoint__keep": 99,
    }
    train(replace(recipes.get("digits"), **{**SETTINGS, "steps": 24}, **more), out)
    kept = checkpoint.steps(out / "checkpoints")
    assert len(kept) >= 6
    losses = {}
    for step in kept:
        parts = load_run(out, torch.device("cpu"), step=step)
        losses[step] = clean_objective(
            parts.model, *images_of(parts.data, "train", 48), parts.space
        )
    at = {step: found.value(found.theta).loss for step, found in losses.items()}
    low, high = max(itertools.pairwise(sorted(at.values())), key=lambda pair: pair[1] / pair[0])
    target = ((low * high) ** 0.5 + (low + high) / 2) / 2  # nearer to the low one by the difference
    (nearest,) = (step for step in kept if at[step] == high)
    assert nearest != kept[-1]
    assert main(["analyze", str(out), *FAST, "--robust-images", "0", "--at-loss", f"{target}"]) == 0
    found = read(out)
    assert (found["step"], found["newest_step"], found["at_loss"]) == (nearest, 24, target)
    assert found["loss"] == pytest.approx(at[nearest], rel=1e-5)
    assert main(["analyze", str(out), *FAST, "--robust-images", "0"]) == 2
    assert f"at_loss: {target} -> None). Add --overwrite" in capsys.readouterr().err
    damaged = out / "checkpoints" / f"step_{nearest:08d}.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert step_at_loss(out, at[nearest], 48, torch.device("cpu")) in (set(kept) - {nearest})


@pytest.mark.parametrize(
    ("at", "message"), [("0", "must be"), ("nan", "must be"), ("1e-9", "factor of 2 of 1e")]
)
def test_no_checkpoint_there(
    trained: Path, capsys: pytest.CaptureFixture[str], at: str, message: str
) -> None:
    assert main(["analyze", str(trained), *FAST, "--overwrite", "--at-loss", at]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_command_needs_a_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Red when: the first run is analysed before the second is looked at.
    before = sorted(trained.iterdir())
    assert (
        main(
            [
                "analyze",
                str(trained),
                str(trained.parent / "empty"),
                *FAST,
                "--seed",
                "9",
                "--overwrite",
            ]
        )
        == 2
    )
    assert "empty holds no checkpoint, so there are no weights" in capsys.readouterr().err
    assert sorted(trained.iterdir()) == before


WRONG = (
    '{"options": 3, "loss": 1, "accuracy": 1, "hessian": null, "sharpness": null, "robust": null}'
)


def test_command_of_a_damaged_analysis(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in (
        ("{", "Cannot read"),
        ("[]", "is not an analysis"),
        ('{"options": {}}', "is not"),
        (WRONG, "is not"),
    ):
        (trained / "analysis.json").write_text(text)
        assert main(["analyze", str(trained), *FAST]) == 2
        assert message in capsys.readouterr().err


def test_parts_can_be_left_out(trained: Path) -> None:
    # Red when: a part that was switched off is computed (its time would show) or is not None.
    off = Options(
        images=16, eigenvalues=0, probes=0, landscape="none", robust_images=0, keskar_steps=1
    )
    watch, parts = Watch(), load_run(trained, torch.device("cpu"))
    before = state(parts.model)
    found = analyze(parts, off, watch)
    assert [found[key] for key in ("hessian", "landscape_1d", "landscape_2d", "robust")] == [
        None
    ] * 4
    assert watch.done == pytest.approx(watch.total)
    some = analyze(parts, replace_options(off, probes=1, dtype="float64"))["hessian"]
    assert (some["eigenvalues"], some["trace_stderr"]) == (None, None)
    assert math.isfinite(some["trace"])
    assert same(state(parts.model), before)


def replace_options(options: Options, **changes: Any) -> Options:
    return Options(**{**vars(options), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, "--images 0"),
        ({"probes": -1}, "--probes -1"),
        ({"rho": math.inf}, "--rho inf"),
        ({"keskar_eps": 0.0}, "--keskar-eps 0.0"),
        ({"iterations": 3}, "--eigenvalues 5 needs"),
        ({"grid": 20}, "--grid 20"),
    ],
)
def test_options_that_cannot_be_meant(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConadvError, match=message):
        Options(**changes)


def test_a_new_run_drops_the_analysis(tmp_path: Path) -> None:
    # Red when: RunDir leaves analysis.json of the run that it deletes: it would pass for the new run's.
    config = replace(recipes.get("digits"), **SETTINGS, eval__robust_images=0)
    train(config, tmp_path / "a")
    (tmp_path / "a" / "analysis").mkdir()
    for name in ("analysis.json", "analysis/landscape_1d.png"):
        (tmp_path / "a" / name).write_text("{}")
    train(config, tmp_path / "a", overwrite=True)
    assert not list((tmp_path / "a").glob("analysis*"))


def test_progress_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    watch = _Progress(Path("runs/[a]"))
    watch.begin(10.0)
    with watch.timed("hessian", 10.0):
        watch.tick(5.0)
    watch.close()
    out = capsys.readouterr().out
    assert "runs/[a]: hessian" in out
    assert "left" in out


def test_plane_of_losses_that_overflow() -> None:
    # Red when: None (inf in the record) or a loss of 0 breaks the logarithmic scale.
    rows = [[1.0, 0.0, None], [0.5, 0.1, 2.0], [3.0, 4.0, 1e30]]
    figure = plane_figure({"alphas": grid(3), "betas": grid(3), "loss": rows}, "title $x")
    figure.draw_without_rendering()
