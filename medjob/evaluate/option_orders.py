"""Multiple-choice rows asked in other ways: with the options in another order, and with one more
option, to abstain.

A model that knows the answer chooses the same option wherever it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from string import ascii_uppercase
from typing import Any

from medjob.data.prompts import with_options, without_options

ABSTENTION = "I don't know"
"""The text of the additional option, and its name among the row's own letters."""

_L = r"[(\[\"']?([A-Za-z])[)\]\"']?"
_AND = r"\s*(?:,\s*(?:and|or)\b|,|/|&|\+|\b(?:and|or|nor)\b)\s*"
_LIST = re.compile(
    rf"(?:(?:both|either|neither|only|all except|all but|except|none of|options?|choices?)\s+)*"
    rf"{_L}(?:{_AND}{_L})*(?:\s+(?:only|alone|are (?:both )?(?:correct|true|right)))?\.?",
    re.IGNORECASE,
)
_PAIR = re.compile(rf"\b(?:both|either|neither)\s+{_L}{_AND}{_L}(?![\w-])", re.IGNORECASE)
_NAMED = re.compile(r"\b(?i:options?|choices?|answers?|alternatives?)\s+[(\[\"']?([A-Z])(?![\w'-])")
_LETTERS_ONLY = re.compile(r"[A-Z]{2,}")
_POSITION = re.compile(
    r"\b(?:first|last|previous|preceding|next|following|upper|lower) (?:\w+ )?"
    r"(?:options?|choices?|answers?|alternatives?)\b|\bthe (?:former|latter)\b",
    re.IGNORECASE,
)
_GROUP = re.compile(
    r"(?:all|none|any|some|both|either|neither|two|no one|more than one|not any)\b.{0,40}?"
    r"\b(?:above|these|those|them|options|choices|alternatives|listed|mentioned|given|correct|true"
    r"|false|wrong|incorrect)\b.{0,20}|all|none|both|neither|(?:any of )?the above|以上.{0,8}",
    re.IGNORECASE | re.DOTALL,
)
_OF_TWO = re.compile(r"(?:both|either|neither|two)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Variant:
    """A multiple-choice row, asked in another way."""

    id: str
    """Id of the prompt: the row's, and how it is asked."""
    message: str
    """The user's message."""
    options: Mapping[str, str]
    """The options as asked, by letter."""
    original: Mapping[str, str]
    """The row's own letter of each option, by the letter as asked. ABSTENTION for the option to
    abstain."""


def reordered(row: Mapping[str, Any], orders: int, seed: int) -> list[Variant]:
    """Return the row with its options in up to `orders` other orders, all different.

    There are fewer if its options have fewer orders, and none if they refer to letters or places.
    Options such as "None of the above" stay at the end. The orders depend on the seed and the row's
    id only.
    """
    options: dict[str, str] = json.loads(row["options"])
    movable = movable_letters(without_options(row["message"], options), options)
    wanted = min(orders, math.factorial(len(movable)) - 1)
    permutations = islice(_permutations(row["id"], movable, seed), wanted)
    return [
        _moved(row, number, options, dict(zip(movable, other, strict=True)))
        for number, other in enumerate(permutations, 1)
    ]


def with_abstention(row: Mapping[str, Any]) -> Variant | None:
    """Return the row with a last option to abstain. None if all letters are taken."""
    options: dict[str, str] = json.loads(row["options"])
    if len(options) >= len(ascii_uppercase):
        return None
    letter = ascii_uppercase[len(options)]
    original = {each: each for each in options} | {letter: ABSTENTION}
    asked = options | {letter: ABSTENTION}
    message = with_options(row["message"], options, asked)
    return Variant(f"{row['id']}/abstain", message, asked, original)


def movable_letters(question: str, options: Mapping[str, str]) -> list[str]:
    """Return the letters of the options that can change places without changing what is asked.

    None can if the question or an option names letters or places, as "Both A and C" does, if an
    option about the others is not at the end, or if it speaks of two of more than two others.
    """
    texts = [text.strip() for text in options.values()]
    if any(_names_letters(text, options) for text in texts) or _NAMED.search(question):
        return []
    is_group = [_GROUP.fullmatch(text) is not None for text in texts]
    movable = is_group.index(True) if any(is_group) else len(texts)
    speaks_of_two = any(_OF_TWO.match(text) for text in texts[movable:])
    if not all(is_group[movable:]) or (speaks_of_two and movable != 2):
        return []
    return list(options)[:movable]


def _names_letters(text: str, options: Mapping[str, str]) -> bool:
    """Whether an option names letters or places of options. "Both A and R are true" does as soon as
    one of the two is a letter of an option: it is not worth guessing what the question means."""
    if _NAMED.search(text) or _POSITION.search(text):
        return True
    if _LETTERS_ONLY.fullmatch(text) and set(text) <= options.keys():
        return True
    found = [_LIST.fullmatch(text), *_PAIR.finditer(text)]
    letters = {letter.upper() for match in found if match for letter in _letters_in(match[0])}
    return bool(letters & options.keys())


def _letters_in(text: str) -> list[str]:
    return re.findall(r"(?<![A-Za-z])([A-Za-z])(?![A-Za-z])", text)


def _permutations(row_id: str, letters: Sequence[str], seed: int) -> Iterator[list[str]]:
    """Yield other orders of `letters`, each once: they are sorted by hashes."""
    seen = {tuple(letters)}
    for attempt in count():

        def place(letter: str, attempt: int = attempt) -> bytes:
            text = f"{seed}/{row_id}/{attempt}/{letter}"
            return hashlib.blake2b(text.encode(), digest_size=8).digest()

        found = sorted(letters, key=place)
        if tuple(found) not in seen:
            seen.add(tuple(found))
            yield found


def _moved(
    row: Mapping[str, Any], number: int, options: dict[str, str], moved: Mapping[str, str]
) -> Variant:
    """Return the row with the option `moved[letter]` in the place of each `letter`."""
    original = {letter: moved.get(letter, letter) for letter in options}
    asked = {letter: options[source] for letter, source in original.items()}
    message = with_options(row["message"], options, asked)
    return Variant(f"{row['id']}/order-{number}", message, asked, original)
