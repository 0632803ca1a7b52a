"""`medjob status --watch` and `medjob submit --wait`: how a run stands until it has ended, and then its exit code."""

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
_PATIENCE_S = (
    600.0  # a laptop that slept, a control plane that is being upgraded: the run goes on meanwhile
)


class Display:
    """Shows a table again and again: in place on a terminal; in a log whenever a state changes, and once a minute."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._terminal = stream, stream.isatty()
        self._height, self._gist, self._at = 0, "", -math.inf

    def show(self, lines: Sequence[str], gist: str) -> None:
        """Show `lines`; `gist` is what of them a log has to tell at once."""
        if self._terminal:
            width = shutil.get_terminal_size().columns
            back = f"\x1b[{self._height}F\x1b[J" if self._height else ""
            self._stream.write(back + "".join(f"{line[:width]}\n" for line in lines))
            self._height = len(lines)
        elif gist != self._gist or time.monotonic() - self._at >= 60:
            self._gist, self._at = gist, time.monotonic()
            self._stream.write("\n".join(lines) + "\n\n")
        self._stream.flush()


def follow(installed: Installed) -> None:
    """Show how the run stands until it has ended.

    Raises:
        MedjobError: the run has failed; with its exit code.
        RetryError: the API server, or the orchestrator, has been away for ten minutes.
    """
    display, heard = Display(sys.stdout), time.monotonic()
    while True:
        try:
            found = status.read(installed)
            lines = status.lines_of(installed, found)
        except RetryError as error:
            if time.monotonic() - heard > _PATIENCE_S:
                raise
            display.show(
                [f"{error.message}; the run does not need this terminal, and is asked after again"],
                "away",
            )
        else:
            heard = time.monotonic()
            display.show(lines, _gist(found))
            if found and _has_ended(found):
                return
        time.sleep(_POLL_S)


def _has_ended(found: Mapping[str, Any]) -> bool:
    if found["state"] == "failed":
        code = int(found["code"])
        raise (error_of(code) if code in EXIT_CODES and code else RetryError)(
            found["text"], "medjob logs RELEASE STAGE shows more, while the pod is there"
        )
    return bool(found["state"] == "done")


def _gist(found: Mapping[str, Any] | None) -> str:
    """States and tries, without what changes with every step."""
    rows = (
        [(row["stage"], row["state"], row["tries"]) for row in found.get("stages", [])]
        if found
        else []
    )
    return f"{found['state'] if found else None} {rows}"
