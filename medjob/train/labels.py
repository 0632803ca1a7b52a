"""Check the labels of a training: the trained tokens, decoded, are the answers and end tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from medjob.data.tokens import shared_length
from medjob.errors import ConfigError

CHECKED_ROWS = 8
"""How many rows a training checks."""


def check_labels(tokenizer: Any, rows: Iterable[tuple[Sequence[int], str]]) -> None:
    """Decode the trained tokens of some rows, and compare them with the completions.

    Blanks, case and compatibility forms may differ, because tokenizers normalise text. A row with
    characters outside the vocabulary cannot be compared.

    Args:
        rows: The trained token ids and the completion of each row.

    Raises:
        ConfigError: they differ. The message shows where, and none of the text.
    """
    for number, (ids, completion) in enumerate(rows, 1):
        if _has_unknown(tokenizer, ids):
            continue
        trained = _essence(_decoded(tokenizer, ids))
        wanted = _essence(completion)
        if trained == wanted:
            continue
        shared = shared_length([trained, wanted])
        raise _wrong(
            f"row {number}: the trained tokens do not decode to the answer and its end token: they "
            f"give {len(trained)} characters where {len(wanted)} are expected, and differ from "
            f"character {shared + 1} on (without blanks)"
        )


def check_earlier_labels(
    tokenizer: Any, rows: Iterable[tuple[Sequence[Sequence[int]], str]]
) -> None:
    """Decode the earlier trained answers of dialogues, and find them in their order in the text
    before the last answer. Texts may differ as in `check_labels`.

    Args:
        rows: The token ids of each earlier trained answer, and that text.

    Raises:
        ConfigError: one is not there.
    """
    for number, (turns, prompt) in enumerate(rows, 1):
        text, position = _essence(prompt) if turns else "", 0
        for turn, ids in enumerate(turns, 1):
            if _has_unknown(tokenizer, ids):
                continue
            trained = _essence(_decoded(tokenizer, ids))
            found = text.find(trained, position)
            if found < 0:
                raise _wrong(f"row {number}: trained answer {turn} is not in the conversation")
            position = found + len(trained)


def _has_unknown(tokenizer: Any, ids: Sequence[int]) -> bool:
    return tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _wrong(problem: str) -> ConfigError:
    hint = "the tokenizer of run.base_model changes text: use the model's own tokenizer files"
    return ConfigError(problem, hint)


def _essence(text: str) -> str:
    """The text without blanks, case and compatibility forms."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
