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
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            continue
        trained = _essence(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        wanted = _essence(completion)
        if trained == wanted:
            continue
        shared = shared_length([trained, wanted])
        raise ConfigError(
            f"row {number}: the trained tokens do not decode to the answer and its end token: they "
            f"give {len(trained)} characters where {len(wanted)} are expected, and differ from "
            f"character {shared + 1} on (without blanks)",
            "the tokenizer of run.base_model changes text: use the model's own tokenizer files",
        )


def _essence(text: str) -> str:
    """The text without blanks, case and compatibility forms."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
