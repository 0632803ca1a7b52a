"""Encode text as token ids. Control tokens count only where a template put them, never in a row."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# SentencePiece falls back to these tokens for unknown bytes, so their names must stay.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Encoder:
    """Encodes text without adding special tokens, as `tokenizer(text, add_special_tokens=False)`.

    A tokenizer turns the text `<|im_end|>` into a control token wherever it occurs. In a question
    that would end the user's turn. The encoder therefore uses a copy of the tokenizer in which
    every control token has a secret name. `seal` replaces the control tokens of trusted text by
    these names; in all other text they are encoded as ordinary text.

    The copy also ignores the truncation and padding that a `tokenizer.json` may prescribe. A file
    that was saved after a padded call holds both.
    """

    def __init__(self, tokenizer: Any, more_controls: Iterable[str] = ()) -> None:
        """Wrap a tokenizer of transformers.

        Args:
            more_controls: Control tokens that the tokenizer does not declare as special, such as
                `<｜User｜>` of DeepSeek-R1-Distill.
        """
        self._tokenizer = tokenizer
        names = special_tokens(tokenizer) | set(more_controls)
        nonce = secrets.token_hex(8)  # unknown to the author of a row; the ids do not depend on it
        self._sealed = {
            name: f"\u2042{nonce}.{number}\u2042" for number, name in enumerate(sorted(names))
        }
        self._pattern = _alternatives(names)
        self._backend = _with_names(tokenizer, self._sealed) if tokenizer.is_fast else None

    def seal(self, text: str) -> str:
        """Return trusted text with its control tokens under their secret names."""
        return self._pattern.sub(lambda match: self._sealed[match[0]], text)

    def has_control_token(self, text: str) -> bool:
        """Whether the text spells out a control token."""
        return self._pattern.search(text) is not None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text. Fast tokenizers use all cores."""
        if not texts:
            return []
        if self._backend is None:
            return [self._encode_slowly(text) for text in texts]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _encode_slowly(self, text: str) -> list[int]:
        """Encode with a tokenizer written in Python, piece by piece between the sealed names."""
        names = {sealed: name for name, sealed in self._sealed.items()}
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, names))})", text):
            if piece in names:
                ids.append(self._tokenizer.convert_tokens_to_ids(names[piece]))
            elif piece:
                ids += self._tokenizer(piece, add_special_tokens=False, split_special_tokens=True)[
                    "input_ids"
                ]
        return ids


def shared_length(rows: Sequence[Sequence[Any]]) -> int:
    """Return the length of the longest beginning that all rows share."""
    for position, values in enumerate(zip(*rows, strict=False)):
        if len(set(values)) > 1:
            return position
    return min(map(len, rows))


def special_tokens(tokenizer: Any) -> set[str]:
    """Return the tokens that the tokenizer declares as special."""
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token.content) for token in added if token.special}
    return {name for name in names | set(tokenizer.all_special_tokens) if not _BYTE.fullmatch(name)}


def _alternatives(names: Iterable[str]) -> re.Pattern[str]:
    """Match any of the names, the longest first. Without names, match nothing."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _with_names(tokenizer: Any, names: Mapping[str, str]) -> Any:
    """Return a copy of the backend tokenizer with other names for some of its tokens."""
    from tokenizers import Tokenizer

    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tree |= {"truncation": None, "padding": None, "post_processor": None}
    for token in tree["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = tree["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(name, name): id_ for name, id_ in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in names]
    return Tokenizer.from_str(json.dumps(tree))


def _merged(merge: Sequence[str] | str) -> str:
    """Return the token that a merge makes. Old files write the two parts as one string."""
    return "".join(merge) if not isinstance(merge, str) else merge.replace(" ", "", 1)
