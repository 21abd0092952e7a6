"""Moved to conadv.training.documents and conadv.safe_io."""

from conadv.safe_io import checked as checked
from conadv.training.documents import *  # noqa: F403
