"""Runs on Kubernetes: the orchestrator, and the commands that submit and control a run."""
