"""Requests to stop a run, which travel with the step's all-reduce and with the images of attack ranks."""

from __future__ import annotations

INTERRUPT, TERMINATE = 1, 2
"""The stronger request is the larger number; 0 is none. Any rank's request is everybody's, the strongest counts."""
