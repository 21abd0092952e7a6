"""What an analysis computes; two analyses with the same options can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Options:
    """The program checks their ranges (conadv.cli.limits)."""

    images: int = 500
    """Training images that everything but robust accuracy is computed on."""
    eigenvalues: int = 5
    """How many of the largest Hessian eigenvalues; 0 leaves them out."""
    iterations: int = 20
    """Lanczos iterations: Hessian-vector products for the eigenvalues."""
    probes: int = 10
    """Random vectors for the Hessian's trace; 0 leaves it out."""
    rho: float = 0.05
    """Length of SAM's ascent step in weight space."""
    keskar_eps: float = 1e-3
    """Half width of Keskar's box, relative to |weight| + 1."""
    keskar_steps: int = 10
    """Gradient steps towards the box's maximum."""
    robust_images: int = 500
    """Test images under PGD, with the run's eval.robust_eps; 0 leaves it out."""
    robust_steps: int = 10
    """Gradient steps of PGD."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of weights and images (PGD: always float32); float64 takes about twice as long on a CPU."""
    seed: int = 0
    """Of every random draw; the images do not depend on it."""
