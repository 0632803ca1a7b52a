"""`medjob status --watch` and `medjob submit --wait`: show the state of a run until it ends."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from medjob.errors import EXIT_CODES, RetryError, error_of
from medjob.k8s.client import status
from medjob.k8s.client.release import Installed

_POLL_S = 3.0
# The run continues while a laptop sleeps or a control plane is upgraded.
_MAX_SILENCE_S = 600.0
_LOG_INTERVAL_S = 60.0


class Display:
    """Shows a table that changes.

    On a terminal it replaces the previous table. Otherwise it prints a new one whenever a state
    changes, and at least once a minute.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._height = 0
        self._states = ""
        self._printed_at = -math.inf

    def show(self, lines: Sequence[str], states: str) -> None:
        """Show `lines`. A change of `states` is printed at once, even without a terminal."""
        if self._terminal:
            width = shutil.get_terminal_size().columns
            erase = f"\x1b[{self._height}F\x1b[J" if self._height else ""
            self._stream.write(erase + "".join(f"{line[:width]}\n" for line in lines))
            self._height = len(lines)
        elif states != self._states or time.monotonic() - self._printed_at >= _LOG_INTERVAL_S:
            self._states = states
            self._printed_at = time.monotonic()
            self._stream.write("\n".join(lines) + "\n\n")
        self._stream.flush()


def follow(installed: Installed) -> None:
    """Show the state of the run until it ends.

    Raises:
        MedjobError: the run has failed; the error has the run's exit code.
        RetryError: the API server or the orchestrator has been unavailable for ten minutes.
    """
    display = Display(sys.stdout)
    last_answer = time.monotonic()
    while True:
        try:
            found = status.read(installed)
            lines = status.format_status(installed, found)
        except RetryError as error:
            if time.monotonic() - last_answer > _MAX_SILENCE_S:
                raise
            display.show(
                [f"{error.message}; retrying. The run does not need this terminal."],
                "unavailable",
            )
        else:
            last_answer = time.monotonic()
            display.show(lines, _states(found))
            if found and _has_ended(found):
                return
        time.sleep(_POLL_S)


def _has_ended(found: Mapping[str, Any]) -> bool:
    if found["state"] != "failed":
        return bool(found["state"] == "done")
    code = int(found["code"])
    error = error_of(code) if code in EXIT_CODES and code else RetryError
    raise error(
        found["text"], "medjob logs RELEASE STAGE shows more, as long as the stage's pod exists"
    )


def _states(found: Mapping[str, Any] | None) -> str:
    """Summarize the states and the numbers of attempts, without what changes at every step."""
    if found is None:
        return "None []"
    rows = [(row["stage"], row["state"], row["tries"]) for row in found.get("stages", [])]
    return f"{found['state']} {rows}"
