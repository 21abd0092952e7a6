"""Largest eigenvalues and trace of the loss's Hessian, by products with vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel

from conadv.analysis.objective import Objective
from conadv.errors import ConadvError

Vectors = npt.NDArray[np.float64]

# ARPACK returns only pairs within its tolerance. We want all: residuals say how good they are.
_ANY_ACCURACY = 1e30


@dataclass(frozen=True)
class Spectrum:
    """The algebraically largest eigenvalues, descending.

    residuals: |H u - lambda u|; a true eigenvalue is no further than this from lambda. vectors_PK:
    unit vectors of these and of all others that Lanczos saw, the best first; captured: the trace of
    H on their span.
    """

    eigenvalues: list[float]
    residuals: list[float]
    vectors_PK: Vectors
    captured: float


def hessian(objective: Objective) -> LinearOperator:
    """H of L at the trained weights: ``hessian(objective) @ v``, v in float64 on the host.

    Products are made in the model's dtype on its device, by differentiating g . v once more.
    Memory: the graph of one chunk's gradient.
    """
    theta = objective.theta

    def product(vector: Vectors) -> Vectors:
        v, total = torch.from_numpy(vector).to(theta), torch.zeros_like(theta)
        for x, y in objective:
            leaf = theta.clone().requires_grad_()
            with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
                (g,) = torch.autograd.grad(objective.part(leaf, x, y), leaf, create_graph=True)
                total += torch.autograd.grad(g @ v, leaf)[0]
        found: Vectors = total.double().cpu().numpy()
        return found

    return LinearOperator((len(theta), len(theta)), matvec=product, dtype=np.float64)


def spectrum(
    operator: LinearOperator, count: int, iterations: int, generator: torch.Generator
) -> Spectrum:
    """The ``count`` largest eigenvalues by one Lanczos run of ``iterations`` products.

    ``generator`` (CPU) draws the first vector, normal. Of a multiple eigenvalue Lanczos sees one
    copy.
    Memory: a vector per iteration. The residuals take ``count`` more products.

    Raises ConadvError unless 1 <= count < iterations <= P.
    Source: Lanczos 1950; ARPACK (Lehoucq, Sorensen, Yang 1998), with full reorthogonalisation.
    """
    size = operator.shape[0]
    if not 1 <= count < iterations <= size:
        raise ConadvError(
            f"{count} eigenvalues by {iterations} iterations of {size} weights: "
            "there must be fewer eigenvalues than iterations, and no more iterations than weights."
        )
    start = torch.randn(size, generator=generator, dtype=torch.float64).numpy()
    once = {"v0": start, "ncv": iterations, "maxiter": 1, "tol": _ANY_ACCURACY}
    try:
        values, vectors = eigsh(operator, iterations - 1, which="LA", **once)
    except ArpackError:
        if (operator @ start).any():
            raise
        values, vectors = np.zeros(count), np.zeros((size, count))  # H is zero: a loss of exactly 0
    order = np.argsort(-values)
    values, vectors = values[order], vectors[:, order]
    pairs = zip(values[:count], vectors.T, strict=False)
    residuals = [float(np.linalg.norm(operator @ u - value * u)) for value, u in pairs]
    return Spectrum(values[:count].tolist(), residuals, vectors, float(values.sum()))


def trace(
    operator: LinearOperator, probes: int, generator: torch.Generator, known: Spectrum | None = None
) -> tuple[float, float]:
    """tr H and its standard error (nan for one probe) by ``probes`` >= 1 random vectors.

    tr H = E z^T H z with z of entries +-1 (Hutchinson's estimator). With ``known``, the trace on
    the span of its vectors U is exact and only the rest is sampled: tr H = tr U^T H U + E y^T H y
    with y = (I - U U^T) z. Unbiased all the same, and with less variance where few eigenvalues
    dominate.

    ``generator`` (CPU) draws z and must not repeat the draws of ``known``.
    Source: Hutchinson 1990; deflation as in Hutch++ (Meyer et al., arXiv 2010.09649).
    """
    size, samples = operator.shape[0], []
    for _ in range(probes):
        y = 2.0 * torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8).numpy() - 1.0
        if known:
            y -= known.vectors_PK @ (known.vectors_PK.T @ y)
        samples.append(y @ (operator @ y))
    error = float(np.std(samples, ddof=1)) / math.sqrt(probes) if probes > 1 else math.nan
    return float(np.mean(samples)) + (known.captured if known else 0.0), error
