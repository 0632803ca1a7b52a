"""Paths of the repository and of the script that controls a local cluster."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCAL_CLUSTER = ROOT.parent / "shared" / "cluster" / "cluster"
