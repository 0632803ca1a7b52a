"""Words and normal forms of English and Chinese texts, for hashes, n-grams and overlap scores."""

from __future__ import annotations

import hashlib
import re
import unicodedata

# Every Chinese or Japanese character is a word. In other scripts, words are runs of letters and
# digits.
_WORD = re.compile(
    r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff]|[^\W_\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff]+"
)


def words(text: str) -> list[str]:
    """Split `text` into lower-case words, in Unicode's NFKC form."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def question_words(question: str) -> str:
    """Normalise a question, so that differences in case, spacing and punctuation disappear."""
    return " ".join(words(question)) or question.strip()


def hash_text(text: str, seed: int = 0) -> int:
    """Return a 64-bit hash of `text`."""
    digest = hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def question_hash(question: str, seed: int = 0) -> int:
    """Return a 64-bit hash of a question's normal form."""
    return hash_text(question_words(question), seed)
