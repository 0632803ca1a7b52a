"""Words and normal forms of texts in any script, for hashes, n-grams and overlap scores.

A word is one of:

- a run of letters, combining marks and digits that starts with a letter: `asthma`, `t4`, `h2o`
- a number: `15`, `1.5`, `10,000`. `.5` is `0.5`, and `5mg` is two words, like `5 mg`.
- one Chinese or Japanese character
- one syllable-like cluster of Thai, Lao, Khmer or Burmese, which have no spaces between words
- one sign that can change the meaning: `+`, `<`, `%`, `°`, `/`, `→`, `♀`, or a minus

Case, spacing, brackets, quotes and sentence punctuation do not matter, nor do hyphens within a
word (`follow-up`, `IL-6`). Case is ignored even in units (`mg`, `Mg`) and genotypes (`Aa`, `aa`),
because many questions are written in capitals.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

import regex

_FLAGS = regex.VERBOSE | regex.VERSION1
# Scripts without spaces between words.
_CHARACTER = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
_CLUSTERED = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_LETTER = rf"[\p{{L}}\p{{N}}--[{_CHARACTER}{_CLUSTERED}]]"

# ®, ™ and ©; joiners, soft hyphens and direction marks; and the tatweel, which stretches a word.
_INVISIBLE = regex.compile(r"[®™©\u0640\p{Cf}\p{Variation_Selector}]", _FLAGS)
# NFKC would turn 10³ into 103, and 1½ into 11/2.
_EXPONENT = regex.compile(r"(?<=\d)(?=[⁺⁻]?[⁰¹²³⁴-⁹])")
_ADJOINING = regex.compile(r"(?<=\d)(?=\p{No})|(?<=\p{No})(?=\d)")
_DIGIT = regex.compile(r"[\d--0-9]", regex.VERSION1)
_DECIMAL_POINT = regex.compile(r"(?<=\d)[·٫](?=\d)")
_DEGREE = str.maketrans("º˚", "°°")
_SAME = str.maketrans("⩾≧⩽≦∼〜⁄∕", "≥≥≤≤~~//")
_ASCII_SIGNS = {"+/-": "±", "+/−": "±", ">=": "≥", "<=": "≤", "!=": "≠", "=>": "⇒", "->": "→"}
_ASCII_SIGN = regex.compile("|".join(map(regex.escape, _ASCII_SIGNS)))
_LEADING_POINT = regex.compile(r"(?<![\p{L}\p{M}\p{N}.])\.(?=\d)")

# A dash is a minus in front of a number (-8, 5-10) unless it follows a letter (IL-6), after a word
# (Rh-), next to a slash (-/-), in brackets, and at the end of a line (ANA: -).
_MINUS = regex.compile(
    rf"""
    [-‐-–] (?:
        (?<! [\p{{L}}\p{{M}}--[{_CHARACTER}{_CLUSTERED}]] .) (?= \s*\d)
      | (?<= [\p{{L}}\p{{N}}\p{{M}}] .) (?= $ | [\s/,;.:)\]}}?!"'’”{_CHARACTER}{_CLUSTERED}])
      | (?<= / .) | (?= /)
      | (?<= [(\[{{] .) (?= [)\]}}])
      | (?<= (?:^|[:=]\s*) .) (?= [ \t]* (?:$|[,;]))
    )
    """,
    _FLAGS | regex.MULTILINE,
)
# A dash at the end of a sentence is a gap to fill in: "The most likely diagnosis is -".
_GAP = re.compile(r"(?<![-–])[-–]+(?=[ \t]*$)", re.MULTILINE)
_WORDS_BEFORE_GAP = 4
_WORD = regex.compile(
    rf"""
      \d++ (?: [.,٬]\d++ )*+
    | {_LETTER} (?: {_LETTER} | \p{{M}} | (?<=\d)[.](?=\d) )*+
    | [{_CHARACTER}] \p{{M}}*+
    | \p{{Logical_Order_Exception}}? [[{_CLUSTERED}]&&\p{{L}}]
      (?: \p{{M}} | (?<=[\u17d2\u1039])\p{{L}} )*+ [ะาๅະາ]*+
    | [[\p{{Sm}}\p{{Sc}}\p{{So}}\p{{Co}}^%‰‱٪/&@†‡′]--[|\u2500-\u259f]]
    | : (?<=\d:) (?=\d)                                     # 1:1000
    | \* (?<=[\p{{L}}\p{{N}}]\*) (?=\d)                     # CYP2D6*4
    | \# (?=[\p{{L}}\p{{N}}])
    """,
    _FLAGS,
)
# Texts that NFKC leaves as they are.
_SIMPLE = re.compile("[\x00-\x7fÀ-ÖØ-Þà-öø-ÿ°±×÷−≤≥→‐-–—‘’“”•]*")
# The same words, found five times as fast, for texts in Latin or Greek letters.
_LATIN = "a-zà-öø-ÿα-ω"
_SIGNS = "−±≤≥≠⇒→×÷°′†‡‰¬£¥€"
_PLAIN = re.compile(rf"[\x00-\x7f{_LATIN}{_SIGNS}‐-–—‘’“”„…«»•¿¡]*")
_PLAIN_WORD = re.compile(
    rf"""
      \d+ (?: [.,]\d+ )*
    | [{_LATIN}]+ (?: \d [\d{_LATIN}]* (?: \.(?<=\d.)(?=\d) [\d{_LATIN}]+ )* )?
    | [$+<=>^~%/&@{_SIGNS}]
    | : (?<=\d:) (?=\d)
    | \* (?<=[\d{_LATIN}]\*) (?=\d)
    | \# (?=[\d{_LATIN}])
    """,
    re.VERBOSE,
)


def words(text: str) -> list[str]:
    """Split `text` into words of its normal form: lower case, and Unicode's NFKC."""
    normal = _normal_form(text)
    pattern = _PLAIN_WORD if _PLAIN.fullmatch(normal) else _WORD
    found: list[str] = pattern.findall(normal)
    return found


def _normal_form(text: str) -> str:
    if not (text.isascii() or _SIMPLE.fullmatch(text)):
        text = _INVISIBLE.sub("", text.translate(_DEGREE))
        text = _ADJOINING.sub(" ", _EXPONENT.sub("^", text))
        text = _DIGIT.sub(lambda match: str(unicodedata.decimal(match[0])), text)
        text = _DECIMAL_POINT.sub(".", text)
        text = unicodedata.normalize("NFKC", text).translate(_SAME)
        # Lower-case İ is an i with a second dot.
        text = unicodedata.normalize("NFKC", text.casefold()).replace("i̇", "i")
    text = _ASCII_SIGN.sub(lambda match: _ASCII_SIGNS[match[0]], text.lower())
    text = _GAP.sub(_fill, _LEADING_POINT.sub("0.", text))
    return str(_MINUS.sub("−", text))


def _fill(dashes: re.Match[str]) -> str:
    start = dashes.string.rfind("\n", 0, dashes.start()) + 1
    line = dashes.string[start : dashes.start()]
    return "" if len(line.split(None, _WORDS_BEFORE_GAP)) >= _WORDS_BEFORE_GAP else dashes[0]


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
