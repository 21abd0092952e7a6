"""Attacks: frozen dataclasses that are called with (forward, x_NCHW, y_N, generator)."""

from .fgsm import FGSM
from .noise import RandomSigns
from .pgd import PGD
from .plan import AttackPlan
from .space import PixelSpace

__all__ = ["FGSM", "PGD", "AttackPlan", "PixelSpace", "RandomSigns"]
