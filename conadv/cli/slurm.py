"""``conadv slurm``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from conadv.cli.options import say


@dataclass
class Args:
    """Print a Slurm script that trains an ImageNet recipe on several nodes. conadv slurm > job.sh,
    and read it.
    """


def command(args: Args) -> None:
    say((files("conadv.config.recipes") / "slurm_imagenet.sh").read_text(encoding="utf-8"))
