"""Progress: a bar on a terminal, otherwise JSON lines; and `progress.json` in the artifact."""

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
from medjob.runtime.printable import printable

_INTERVAL_S = 5.0
_LAST_WRITE_TIMEOUT_S = 5.0  # how long to wait for a slow store to accept the last event
_log = logging.getLogger(__name__)


class Progress:
    """Reports a stage's progress: on stderr, and to `artifact`'s progress.json if there is one.

    The file is written in the background. While the store is unreachable, events are dropped, so a
    stage never waits for its progress report.
    """

    def __init__(self, stage: str, artifact: Artifact | None = None) -> None:
        self._stage = stage
        self._artifact = artifact
        self._written = 0.0
        self._writer = ThreadPoolExecutor(1, "progress")
        self._under_way: Future[None] | None = None
        self._numbers: dict[str, float] = {}

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Task]:
        """Show a bar of `total` items, `done` of which are already finished."""
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
                wait([self._under_way], timeout=_LAST_WRITE_TIMEOUT_S)

    def show(self, **numbers: float) -> None:
        """Put numbers beside every event from now on, such as what was spent."""
        self._numbers |= numbers

    def report(self, event: dict[str, Any], last: bool) -> None:
        """Write one event, unless the previous one was written less than 5 s ago."""
        now = time.monotonic()
        if not last and now - self._written < _INTERVAL_S:
            return
        self._written = now
        event = {"stage": self._stage, **event, **self._numbers}
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
            _log.debug("could not write progress.json: %s", error)


class Task:
    """One task of a stage, shown as a bar."""

    def __init__(self, progress: Progress, name: str, total: int, done: int, bar: Any) -> None:
        self._progress = progress
        self._name = name
        self._total = total
        self._done = done
        self._done_at_start = done
        self._bar = bar
        self._tokens = 0
        self._started = time.monotonic()

    def begin(self, total: int, done: int) -> None:
        """Set the numbers of items once they are known, and restart the clock.

        The time before, such as for loading a model, does not count towards the speed.
        """
        self._total = total
        self._done = done
        self._done_at_start = done
        self._tokens = 0
        self._started = time.monotonic()
        self._bar.total = total
        self._bar.n = done
        self._bar.refresh()

    def advance(self, count: int = 1, tokens: int = 0, **numbers: float) -> None:
        """Report `count` more finished items. `numbers` appear beside them, such as the loss.

        Args:
            tokens: Number of tokens that the items have, for the speed in tokens per second.
        """
        self._done += count
        self._tokens += tokens
        self._bar.update(count)
        if numbers:
            shown = {name: f"{value:.4g}" for name, value in numbers.items()}
            self._bar.set_postfix(shown, refresh=False)
        elapsed = time.monotonic() - self._started
        per_s = (self._done - self._done_at_start) / elapsed if elapsed else 0.0
        event = {
            "task": self._name,
            "step": self._done,
            "total": self._total,
            "per_s": round(per_s, 3),
            **numbers,
        }
        if self._tokens and elapsed:
            event["tokens_per_second"] = round(self._tokens / elapsed, 1)
        if per_s and self._total:
            event["eta_s"] = round((self._total - self._done) / per_s)
        self._progress.report(event, last=bool(self._total) and self._done >= self._total)


class _JsonFormatter(logging.Formatter):
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


class _TqdmHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = printable(self.format(record), line_breaks=True)
        tqdm.write(text, file=sys.stderr)  # prints above a running bar


def setup_logging(debug: bool) -> None:
    """Log to stderr, so that stdout contains only data.

    medjob's messages are shown from level INFO, or DEBUG with `debug`; those of libraries from
    WARNING.
    """
    handler = _TqdmHandler()
    terminal = sys.stderr.isatty()
    handler.setFormatter(logging.Formatter("%(message)s") if terminal else _JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("medjob").setLevel(logging.DEBUG if debug else logging.INFO)
