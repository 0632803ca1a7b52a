"""Words and normal forms, for English and Chinese alike: what hashes, n-grams and overlap scores are taken over."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# A Chinese or Japanese character is a word of its own; other scripts split at anything but letters and digits.
_WORD = re.compile(
    r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff]|[^\W_\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff]+"
)


def words(text: str) -> list[str]:
    """Lower-case words of `text`, width and composition folded (NFKC)."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def question_words(question: str) -> str:
    """A question's normal form: equal for texts that differ in case, spacing and punctuation only."""
    return " ".join(words(question)) or question.strip()


def hash_of(text: str, seed: int = 0) -> int:
    """64-bit hash of `text`."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=8).digest(), "big")


def question_hash(question: str, seed: int = 0) -> int:
    """64-bit hash of a question's normal form."""
    return hash_of(question_words(question), seed)
