"""Sweeps: a grid of runs under a fair protocol (docs/sweep.md). See each module."""
