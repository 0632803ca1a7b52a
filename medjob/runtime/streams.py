"""Keep a closed or full terminal, pipe or log disk from ending the work."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable


class LossyStream(io.TextIOBase):
    """A text stream that drops what cannot be written."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the underlying stream."""
        return str(self._stream.encoding)

    def write(self, text: str) -> int:
        """Write `text` if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()  # otherwise the error comes with a later write, or at the exit
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # type: ignore[override]
        """Write each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def fileno(self) -> int:
        """The file descriptor."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """Always."""
        return True


def protect() -> None:
    """Reopen closed standard streams as /dev/null, let writes to stderr fail silently, and escape
    characters that the terminal's encoding lacks.

    With a closed descriptor 2, the next file that is opened would receive the messages.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an encoding such as ASCII lacks most characters
            stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, LossyStream):
        sys.stderr = LossyStream(sys.stderr)  # type: ignore[arg-type]
