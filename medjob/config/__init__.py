"""The configuration tree: pydantic and YAML only."""

from medjob.config.load import load_job
from medjob.config.run_file import Job, Run

__all__ = ["Job", "Run", "load_job"]
