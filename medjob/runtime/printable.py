"""Text that a terminal can show safely."""

from __future__ import annotations


def printable(text: str, line_breaks: bool = False) -> str:
    """Escape control characters: names of files can contain some that a terminal acts on.

    With `line_breaks`, line breaks are kept. A name must not contain any, or it could pose as
    another line of the output.
    """
    return "".join(
        char if char.isprintable() or (line_breaks and char == "\n") else ascii(char)[1:-1]
        for char in text
    )
