"""Step time, throughput and cost on machines that one does not have, from a few points measured on those one has.

``profile`` holds what was measured and ``measure``, ``link`` measure it; ``overlap`` and ``model`` are the equations,
pure functions without torch; ``search`` picks executor and split; ``table`` and ``figure`` show it. docs/plan.md.
"""

from conadv.plan.model import KINDS, Layout, Planner, Prediction
from conadv.plan.profile import Profile, load, save
from conadv.plan.search import Rules, best

__all__ = ["KINDS", "Layout", "Planner", "Prediction", "Profile", "Rules", "best", "load", "save"]
