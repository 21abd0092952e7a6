"""What an analysis of a trained model computes; two analyses with the same options can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conadv.errors import ConadvError


@dataclass(frozen=True)
class Options:
    """Raises ConadvError for values that contradict each other."""

    images: int = 500
    """Training images that everything is computed on (the landscape also on as many test images)."""
    eigenvalues: int = 5
    """How many of the largest Hessian eigenvalues; 0 leaves them out."""
    iterations: int = 20
    """Lanczos iterations at most: Hessian-vector products; fewer where the eigenvalues have converged."""
    probes: int = 10
    """Random vectors for the Hessian's trace; 0 leaves it out."""
    rho: float = 0.05
    """Length of SAM's ascent step in weight space."""
    keskar_eps: float = 1e-3
    """Half width of Keskar's box, relative to |weight| + 1."""
    keskar_steps: int = 10
    """Gradient steps towards the box's maximum."""
    landscape: Literal["none", "1d", "2d"] = "1d"
    """Loss along one filter-normalised random direction; 2d adds the plane of two."""
    grid: int = 21
    """Points per direction from -1 to 1; an odd number."""
    robust_images: int = 500
    """Test images under PGD, with the run's eval.robust_eps; 0 leaves it out."""
    robust_steps: int = 10
    """Gradient steps of PGD."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of weights and images (PGD: always float32); float64 takes about twice as long on a CPU."""
    seed: int = 0
    """Of every random draw; the images do not depend on it."""

    def __post_init__(self) -> None:
        for name in ("images", "keskar_steps", "robust_steps"):
            if getattr(self, name) < 1:
                raise ConadvError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must be 1 or more."
                )
        for name in ("eigenvalues", "probes", "robust_images", "seed"):
            if getattr(self, name) < 0:
                raise ConadvError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must be 0 or more."
                )
        for name in ("rho", "keskar_eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConadvError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} must be a number above 0."
                )
        if self.eigenvalues > self.iterations:
            raise ConadvError(
                f"--eigenvalues {self.eigenvalues} needs as many --iterations at least; there are {self.iterations}."
            )
        if self.landscape != "none" and (self.grid < 3 or self.grid % 2 == 0):
            raise ConadvError(
                f"--grid {self.grid} must be an odd number, 3 or more, so that 0 is one of the points."
            )
