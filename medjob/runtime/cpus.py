"""How many cores there are to use: torch takes the node's, whatever the container is allowed, and then its threads wait for one another."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def cpus() -> int:
    """Cores this process may use: its affinity, and the container's quota, which torch does not look at."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no container, or no quota ("max", -1)
        quota, period = _quota()
        if quota > 0:
            count = min(count, max(1, quota // period))
    return count


def _quota() -> tuple[int, int]:
    """Microseconds of CPU in each period of so many, as either version of cgroups has it."""
    unified, first = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu")
    if unified.exists():
        quota, period = unified.read_text().split()
        return int(quota), int(period)
    return int((first / "cpu.cfs_quota_us").read_text()), int(
        (first / "cpu.cfs_period_us").read_text()
    )
