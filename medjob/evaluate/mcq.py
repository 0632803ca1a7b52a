"""Parse the option that a generated answer chose. The last statement counts, without guessing."""

from __future__ import annotations

import re
from collections.abc import Mapping

_STATED = re.compile(
    r"(?:answer|(?:correct|best|right) (?:option|choice)|答案)[*_]*"
    r"(?:\s*(?:is|:|：|是|为))*[*_\s]*(?:option\s*)?[*_(\[（]*"
    r"([A-J])(?=[*_.,;:)\]）。]|\s*$|\s*\n)",
    re.IGNORECASE | re.MULTILINE,
)
_ALONE = re.compile(r"^[\s*(\[（]*([A-J])(?:[)\].:）*]+|\s*$)")


def chosen_option(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that `text` chooses, or None.

    The first match counts:
    1. the last "the answer is X";
    2. a last line that begins with a single letter, as in "B." or "(B) insulin";
    3. the only option whose full text is in the last line.
    """
    stated: list[str] = [
        match.upper() for match in _STATED.findall(text) if match.isupper() and match in options
    ]
    if stated:
        return stated[-1]
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    alone = _ALONE.match(last)
    if alone and alone[1] in options:
        return alone[1]
    named = [
        letter
        for letter, option in options.items()
        if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", last, re.IGNORECASE)
    ]
    return named[0] if len(named) == 1 else None
