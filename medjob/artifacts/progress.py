"""Progress: a bar on a terminal, JSON lines elsewhere, and `progress.json` beside the artifact."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from medjob.artifacts.artifact import Artifact

_EVERY_S = 5.0
_LAST_S = 5.0  # for the last event, where the store is slow
_log = logging.getLogger(__name__)


class Progress:
    """How far a stage is. `artifact` is where progress.json goes; None keeps it on the screen.

    The file is written in the background, and not at all while the store is away: no stage waits for its progress.
    """

    def __init__(self, stage: str, artifact: Artifact | None = None) -> None:
        self._stage = stage
        self._artifact = artifact
        self._written = 0.0
        self._writer = ThreadPoolExecutor(1, "progress")
        self._under_way: Future[None] | None = None

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Task]:
        """One bar of `total` items, `done` of which are finished already."""
        bar = tqdm(
            total=total,
            initial=done,
            desc=f"{self._stage}: {name}",
            disable=not sys.stderr.isatty(),
            leave=True,
        )
        try:
            yield Task(self, name, total, done, bar)
        finally:
            bar.close()
            if self._under_way is not None:
                wait([self._under_way], timeout=_LAST_S)

    def report(self, event: dict[str, Any], last: bool) -> None:
        """Write one event, unless one was written moments ago."""
        now = time.monotonic()
        if not last and now - self._written < _EVERY_S:
            return
        self._written = now
        event = {"stage": self._stage, **event}
        if not sys.stderr.isatty():
            sys.stderr.write(json.dumps({"event": "progress", **event}) + "\n")
            sys.stderr.flush()
        if self._artifact and (last or self._under_way is None or self._under_way.done()):
            self._under_way = self._writer.submit(
                self._write, self._artifact, json.dumps(event).encode()
            )

    @staticmethod
    def _write(artifact: Artifact, data: bytes) -> None:
        try:
            artifact.store.put(artifact.path("progress.json"), data)
        except Exception as error:
            _log.debug("progress.json is not written: %s", error)


class Task:
    """One running bar."""

    def __init__(self, progress: Progress, name: str, total: int, done: int, bar: Any) -> None:
        self._progress = progress
        self._name = name
        self._total = total
        self._begun_with = self._done = done
        self._bar = bar
        self._began = time.monotonic()

    def begin(self, total: int, done: int) -> None:
        """Set what is known only once the work has begun."""
        self._total, self._done, self._begun_with = total, done, done
        self._began = (
            time.monotonic()
        )  # what came before, such as loading a model, says nothing of the speed
        self._bar.total, self._bar.n = total, done
        self._bar.refresh()

    def advance(self, count: int = 1, **numbers: float) -> None:
        """`count` more items are finished; `numbers` are shown beside them."""
        self._done += count
        self._bar.update(count)
        if numbers:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in numbers.items()}, refresh=False)
        elapsed = time.monotonic() - self._began
        per_s = (self._done - self._begun_with) / elapsed if elapsed else 0.0
        event = {
            "task": self._name,
            "step": self._done,
            "total": self._total,
            "per_s": round(per_s, 3),
            **numbers,
        }
        if per_s and self._total:
            event["eta_s"] = round((self._total - self._done) / per_s)
        self._progress.report(event, last=bool(self._total) and self._done >= self._total)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event = {
            "event": "log",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return json.dumps(event)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)  # above a running bar, not through it


def setup_logging(debug: bool) -> None:
    """Our own messages from INFO on, those of libraries from WARNING on; all on stderr, so that stdout holds data alone."""
    handler = _Lines()
    terminal = sys.stderr.isatty()
    handler.setFormatter(logging.Formatter("%(message)s") if terminal else _JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("medjob").setLevel(logging.DEBUG if debug else logging.INFO)
