"""The configuration tree: pydantic and YAML only."""

from medjob.config.job import Job, Run
from medjob.config.load import load_job

__all__ = ["Job", "Run", "load_job"]
