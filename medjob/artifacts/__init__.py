"""Artifacts and what belongs to one: checkpoints, finished rows, progress and provenance."""
