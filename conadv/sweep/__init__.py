"""Sweeps: a grid of runs under a fair protocol (docs/sweep.md). Nothing is imported here: see each module."""
