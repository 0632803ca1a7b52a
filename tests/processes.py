"""Starting `medjob` as a user does, and stopping it as a cluster does."""

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


def environment() -> dict[str, str]:
    """This process's, as fixtures have left it; medjob pins threads itself."""
    return {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}


def start(
    file: Path, verb: str = "run", *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start one verb on a run file."""
    command = [sys.executable, "-m", "medjob", verb, "-f", str(file), *arguments]
    variables = {**environment(), **(env or {})}
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=variables,
        cwd=file.parent,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for the end; what it said."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors[-3000:]
    return errors


def job_file(tree: dict[str, Any], folder: Path, store: str, **run: Any) -> Path:
    """Write a run file whose store and work folder are `folder/store` and beside it."""
    folder.mkdir(exist_ok=True)
    tree = json.loads(json.dumps(tree))
    for name, values in run.items():
        tree["run"][name] |= values
    tree["cluster"] = {
        "store": f"file://{folder / store}",
        "workDir": str(folder / f"{store}-work"),
    }
    (folder / f"{store}.yaml").write_text(yaml.safe_dump(tree))
    return folder / f"{store}.yaml"


def wait_for(process: subprocess.Popen[str], appears: str, store: Path) -> Path:
    """The file matching `appears`, as soon as it is in the store, while the process runs."""
    deadline = time.monotonic() + 240
    while not (found := list(store.glob(appears))):
        assert process.poll() is None, (
            f"ended before {appears}: {process.stderr.read() if process.stderr else ''}"
        )
        assert time.monotonic() < deadline, f"{appears} never came"
        time.sleep(0.005)
    return found[0]


def kill_when(
    process: subprocess.Popen[str], appears: str, store: Path, how: signal.Signals
) -> None:
    """Send a signal as soon as a file matching `appears` is in the store."""
    wait_for(process, appears, store)
    process.send_signal(how)


def digests(store: Path) -> dict[str, str]:
    """Digest of each published stage."""
    return {
        path.parts[-3]: json.loads(path.read_text())["digest"]
        for path in sorted(store.glob("t/*/*/_SUCCESS.json"))
    }
