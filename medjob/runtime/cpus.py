"""Count usable cores, honouring CPU affinity and the quota of cgroups.

torch counts the cores of the node, so in a container with a quota its threads wait for one another.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cpus() -> int:
    """Number of cores that this process may use, at least 1."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    # The files are missing outside a container. Without a quota they contain "max" or -1.
    with contextlib.suppress(OSError, ValueError):
        quota, period = _quota()
        if quota > 0:
            count = min(count, max(1, quota // period))
    return count


def _quota() -> tuple[int, int]:
    """Return (microseconds of CPU time per period, length of the period), from cgroups v2 or v1."""
    unified = CGROUP / "cpu.max"
    if unified.exists():
        quota, period = unified.read_text().split()
        return int(quota), int(period)
    legacy = CGROUP / "cpu"
    quota = (legacy / "cpu.cfs_quota_us").read_text()
    period = (legacy / "cpu.cfs_period_us").read_text()
    return int(quota), int(period)
