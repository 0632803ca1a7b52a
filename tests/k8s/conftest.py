"""Fixtures of the simulated cluster."""

from tests.k8s.world import simulated

__all__ = ["simulated"]
