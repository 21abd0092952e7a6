"""Top eigenvalues (Lanczos) and trace (Hutchinson) of a matrix that is known by its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from conadv.errors import ConadvError

Product = Callable[[Tensor], Tensor]
"""v (P) -> H v (P), H symmetric."""


@dataclass(frozen=True)
class Spectrum:
    """What Lanczos found.

    eigenvalues: the algebraically largest, descending. residuals: |H u - lambda u| for each with its unit Ritz vector
    u: a true eigenvalue lies within this distance. iterations: products with H. ``basis``: the orthonormal Lanczos
    vectors; ``captured``: the trace of H on their span.
    """

    eigenvalues: list[float]
    residuals: list[float]
    iterations: int
    basis: list[Tensor]
    captured: float


@dataclass(frozen=True)
class Trace:
    """Estimate of tr H and its standard error (nan for a single probe) over ``probes`` random vectors."""

    value: float
    stderr: float
    probes: int


def lanczos(
    product: Product,
    like: Tensor,
    count: int,
    iterations: int,
    generator: torch.Generator,
    tolerance: float = 1e-3,
) -> Spectrum:
    """The ``count`` largest eigenvalues of H by at most ``iterations`` products.

    beta_{j+1} q_{j+1} = H q_j - alpha_j q_j - beta_j q_{j-1}; the eigenvalues of the tridiagonal matrix (alpha, beta)
    approach the outer ones of H. Every new vector is orthogonalised twice against all before it, so that no eigenvalue
    shows up more than once. Ends early when all residuals are at most ``tolerance`` times the largest |eigenvalue|, and
    where the space is exhausted; there may then be fewer than ``count``.

    ``like``: a vector with the size, dtype and device of H's; ``generator`` (CPU) draws the first vector, normal.
    Memory: one vector per iteration. Raises ConadvError unless 1 <= count <= iterations.

    Source: Lanczos 1950; Golub & Van Loan, Matrix Computations, 4th ed., section 10.1 (residuals: 10.1.4), with full
    reorthogonalisation, 10.3.1.
    """
    if not 1 <= count <= iterations:
        raise ConadvError(
            f"{count} eigenvalues in {iterations} iterations: ask for at least 1, at most 1 an iteration."
        )
    first = torch.randn(len(like), generator=generator, dtype=torch.float64).to(like)
    basis = [first / first.norm()]
    alphas: list[float] = []
    betas: list[float] = []
    while True:
        w = product(basis[-1])
        alphas.append(_dot(w, basis[-1]))
        w = _without(_without(w, basis), basis)
        beta = float(w.double().norm())
        values, residuals = _ritz(alphas, betas, beta)
        scale = max(abs(float(values[0])), abs(float(values[-1])))
        found = values[:count].tolist(), residuals[:count].tolist()
        good = len(alphas) >= count and max(found[1]) <= tolerance * scale
        exhausted = len(alphas) == len(like) or beta <= 10 * torch.finfo(like.dtype).eps * scale
        if good or exhausted or len(alphas) == iterations:
            return Spectrum(*found, len(alphas), basis, math.fsum(alphas))
        betas.append(beta)
        basis.append(w / beta)


def _ritz(alphas: list[float], betas: list[float], beta: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the tridiagonal matrix, descending, and their residuals |beta * last component|."""
    off = torch.tensor(betas, dtype=torch.float64)
    matrix = (
        torch.diag(torch.tensor(alphas, dtype=torch.float64))
        + torch.diag(off, 1)
        + torch.diag(off, -1)
    )
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), (beta * vectors[-1].abs()).flip(0)


def trace(
    product: Product,
    like: Tensor,
    probes: int,
    generator: torch.Generator,
    known: Spectrum | None = None,
) -> Trace:
    """tr H = E z^T H z over Rademacher vectors z (entries +-1).

    With ``known``, the part of the trace on Lanczos' span Q is taken as it is and only the rest is sampled:
    tr H = tr Q^T H Q + E y^T H y with y = (I - Q Q^T) z. Unbiased all the same, and with much less variance where few
    eigenvalues dominate. Reduces to: Hutchinson's estimator without ``known``.

    ``generator`` (CPU) draws the probes and must not repeat what drew ``known``'s first vector.
    Raises ConadvError for probes < 1.

    Source: Hutchinson 1990; with deflation, Meyer, Musco, Musco, Woodruff, "Hutch++", arXiv 2010.09649 (theirs spans Q
    by H times random vectors).
    """
    if probes < 1:
        raise ConadvError(f"{probes} probes: the trace needs at least 1.")
    basis, samples = known.basis if known else [], torch.empty(probes, dtype=torch.float64)
    for i in range(probes):
        sign = 2 * torch.randint(0, 2, (len(like),), generator=generator, dtype=torch.int8) - 1
        vector = _without(sign.to(like), basis)
        samples[i] = _dot(vector, product(vector))
    error = float(samples.std()) / math.sqrt(probes) if probes > 1 else math.nan
    return Trace((known.captured if known else 0.0) + float(samples.mean()), error, probes)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double())


def _without(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """``vector`` minus its part in the span of the orthonormal ``basis``."""
    for q in basis:
        vector = vector - (vector @ q) * q
    return vector
