"""Memory of this machine, or of the container that the process runs in."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# Limits of the container under cgroups v2 and v1.
LIMIT_FILES = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def memory_limit_bytes() -> int:
    """Memory that all processes here may use together: the machine's, or the container's limit if
    that is lower."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in LIMIT_FILES:
        # The file is missing outside a container, and contains "max" if there is no limit.
        with contextlib.suppress(OSError, ValueError):
            limit = min(limit, int(file.read_text()))
    return limit
