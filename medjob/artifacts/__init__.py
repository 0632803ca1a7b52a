"""Artifacts and their checkpoints, finished rows, progress and provenance."""
