"""The configuration tree: pydantic and YAML only."""

from medjob.config.load import load_run_file
from medjob.config.run_file import Run, RunFile

__all__ = ["Run", "RunFile", "load_run_file"]
