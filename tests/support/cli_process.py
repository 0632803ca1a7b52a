"""Start `medjob` commands as processes, signal them, and read what they published."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def start(
    file: Path, verb: str = "run", *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a command on a run file."""
    command = [sys.executable, "-m", "medjob", verb, "-f", str(file), *arguments]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
        cwd=file.parent,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for the process, check its exit code, and return its stderr."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors[-3000:]
    return errors


def write_run_file(tree: dict[str, Any], folder: Path, store: str, **run: Any) -> Path:
    """Write a run file and return its path, `folder/STORE.yaml`.

    The store is `folder/STORE` and the work directory `folder/STORE-work`. `run` updates sections
    of the run.
    """
    folder.mkdir(exist_ok=True)
    tree = json.loads(json.dumps(tree))
    for name, values in run.items():
        tree["run"][name] |= values
    tree["cluster"] = {
        "store": f"file://{folder / store}",
        "workDir": str(folder / f"{store}-work"),
    }
    file = folder / f"{store}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def wait_for(process: subprocess.Popen[str], pattern: str, store: Path) -> Path:
    """Wait until a file in the store matches `pattern`, while the process runs, and return it."""
    deadline = time.monotonic() + 240
    while not (matches := list(store.glob(pattern))):
        if process.poll() is not None:
            errors = process.stderr.read() if process.stderr else ""
            raise AssertionError(f"the process ended before {pattern} existed: {errors}")
        assert time.monotonic() < deadline, f"{pattern} did not appear within 240 s"
        time.sleep(0.005)
    return matches[0]


def kill_when(
    process: subprocess.Popen[str], pattern: str, store: Path, how: signal.Signals
) -> None:
    """Send a signal as soon as a file in the store matches `pattern`."""
    wait_for(process, pattern, store)
    process.send_signal(how)


def digests(store: Path) -> dict[str, str]:
    """Digest of each published stage."""
    return {
        path.parts[-3]: json.loads(path.read_text())["digest"]
        for path in sorted(store.glob("t/*/*/_SUCCESS.json"))
    }
