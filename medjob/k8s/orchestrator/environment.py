"""The environment variables that the chart sets in the orchestrator's pod."""

from __future__ import annotations

import os

from medjob.errors import ConfigError


def environment(name: str) -> str:
    """Return an environment variable.

    Raises:
        ConfigError: it is not set.
    """
    try:
        return os.environ[name]
    except KeyError:
        raise ConfigError(
            f"{name} is not set",
            "the orchestrator runs in a pod of the chart; on one machine, use medjob run",
        ) from None
