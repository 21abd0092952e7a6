"""Attacks: frozen dataclasses that are called with (forward, x_NCHW, y_N, generator)."""

from conadv.attacks.fgsm import FGSM
from conadv.attacks.noise import RandomSigns
from conadv.attacks.pgd import PGD
from conadv.attacks.space import PixelSpace

__all__ = ["FGSM", "PGD", "PixelSpace", "RandomSigns"]
