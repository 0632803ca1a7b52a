"""Wait for conditions, files and processes."""

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Wait until the condition is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


def wait_for_file(path: Path, timeout_s: float = 20.0) -> Path:
    """Wait until the file exists."""
    wait_until(path.exists, timeout_s, str(path))
    return path


def is_alive(pid: int) -> bool:
    """Whether the process runs. A zombie does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def catches(pid: int, signal_number: signal.Signals) -> bool:
    """Whether the process has installed a handler for the signal (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal_number - 1) & 1)
