"""Text that a terminal can show safely."""

from __future__ import annotations

import unicodedata


def printable(text: str, line_breaks: bool = False) -> str:
    """Escape characters that a terminal acts on or does not show. Blanks of any width are kept.

    With `line_breaks`, line breaks and tabs are kept. A name must not contain any, or it could pose
    as another line of the output.
    """
    layout = "\n\t" if line_breaks else ""
    return "".join(
        char
        if char.isprintable() or char in layout or unicodedata.category(char) == "Zs"
        else ascii(char)[1:-1]
        for char in text
    )
