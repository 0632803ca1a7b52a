"""Where the project is, and where a cluster may be."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCAL = ROOT.parent / "shared" / "cluster" / "cluster"
