"""Shards of a row-wise stage: which one this process computes, and starting all of them here.

On a cluster each shard is a pod, which reads its number from MEDJOB_SHARD. On one machine the
parent starts a process per shard, as many at once as there are GPUs for, and joins their rows.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from medjob.artifacts.shard import Shard
from medjob.config import RunFile
from medjob.config.run_file import RowResources
from medjob.errors import ConfigError, MedjobError, RetryError, error_of
from medjob.pipeline.outcome import FINAL
from medjob.runtime import signals
from medjob.stage import Stage

VARIABLE = "MEDJOB_SHARD"
_POLL_S = 0.2
_log = logging.getLogger(__name__)


def shard_count(run_file: RunFile, stage: Stage) -> int:
    """Number of shards of a stage."""
    resources = getattr(run_file.resources, stage.name)
    return resources.shards if isinstance(resources, RowResources) else 1


def shard_of_process(run_file: RunFile, stage: Stage, index: str | None) -> Shard | None:
    """The shard that this process is to compute; None for all of them.

    Args:
        index: From the command line. Default: MEDJOB_SHARD.

    Raises:
        ConfigError: it is not the number of a shard.
    """
    count = shard_count(run_file, stage)
    name, text = "--shard", index
    if text is None:
        name, text = VARIABLE, os.environ.get(VARIABLE)
    if text is None or (count == 1 and text == "0"):
        return None
    if not text.isdecimal() or not text.isascii() or int(text[:9]) >= count:
        raise ConfigError(
            f"{name} must be 0 to {count - 1}, because resources.{stage.name}.shards is "
            f"{count} (got {text[:100]!r})"
        )
    return Shard(int(text), count)


def run_shards(run_file: RunFile, stage: Stage, indices: Sequence[int]) -> None:
    """Compute shards in processes of their own. Returns when all have finished.

    Raises:
        MedjobError: one has failed, with its exit code. The others then finish, unless a retry
            would fail as well.
    """
    devices = _devices(run_file, stage)
    with tempfile.TemporaryDirectory(prefix="medjob-") as folder:
        file = Path(folder) / "job.yaml"
        tree = run_file.model_dump(mode="json", by_alias=True)
        file.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
        command = [sys.executable, "-m", "medjob", stage.name, "-f", str(file)]
        _log.info(
            "%s: %d shards, %d at a time", stage.name, len(indices), min(len(devices), len(indices))
        )
        _Processes(stage.name, command, devices).run(list(indices))


def _devices(run_file: RunFile, stage: Stage) -> list[str | None]:
    """The values of CUDA_VISIBLE_DEVICES for the processes that run at once."""
    from medjob.train.device import this_device

    device = this_device()
    per_shard = max(1, getattr(run_file.resources, stage.name).gpus)
    if device.kind != "cuda":
        return [None]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(device.count)]
    groups = [names[start : start + per_shard] for start in range(0, len(names), per_shard)]
    return [",".join(group) for group in groups if len(group) == per_shard] or [visible]


class _Processes:
    """The processes of shards, one on each group of devices."""

    def __init__(self, stage: str, command: list[str], devices: Sequence[str | None]) -> None:
        self._stage = stage
        self._command = command
        self._free = list(devices)
        self._running: dict[int, tuple[subprocess.Popen[bytes], str | None]] = {}
        self._failed: dict[int, int] = {}

    def run(self, waiting: list[int]) -> None:
        """Start processes as devices become free, and wait for all of them."""
        with signals.before_exit(self._terminate), self._terminated_on_error():
            while waiting or self._running:
                while waiting and self._free:
                    self._start(waiting.pop(0))
                time.sleep(_POLL_S)
                self._reap()
                if any(code in FINAL for code in self._failed.values()):
                    break
        if self._failed:
            raise self._error()

    def _start(self, index: int) -> None:
        device = self._free.pop(0)
        environment = os.environ | {VARIABLE: str(index)}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        self._running[index] = (subprocess.Popen(self._command, env=environment), device)

    def _reap(self) -> None:
        for index, (process, device) in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[index]
                self._free.append(device)
                if code:
                    self._failed[index] = code if code > 0 else 128 - code

    def _terminate(self) -> None:
        for process, _ in self._running.values():
            process.terminate()
        for process, _ in self._running.values():
            process.wait()

    @contextlib.contextmanager
    def _terminated_on_error(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._terminate()

    def _error(self) -> MedjobError:
        """The error of the shard whose exit code says most."""
        index, code = min(self._failed.items(), key=lambda item: (item[1] not in FINAL, item[0]))
        kind = _kind_of(code)
        return kind(
            f"{self._stage}: shard {index} ended with exit code {code}",
            "see its messages above; the same command resumes with the rows that are finished",
        )


def _kind_of(code: int) -> type[MedjobError]:
    try:
        return error_of(code)
    except StopIteration:  # it was killed, or crashed
        return RetryError
