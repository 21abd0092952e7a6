"""The attacks by name. Torch-free: config and ``--help`` read this table before torch is there.

An attack is a frozen dataclass that is called with (forward, x_NCHW, y_N, generator) and returns
images like x_NCHW. A new attack is a file with its class, a row here, a row in the table of
tests/test_attacks.py and a line in the docs.
"""

from __future__ import annotations

ATTACKS = {
    "fgsm": "conadv.attacks.fgsm:FGSM",
    "pgd": "conadv.attacks.pgd:PGD",
    "random-signs": "conadv.attacks.noise:RandomSigns",
}
