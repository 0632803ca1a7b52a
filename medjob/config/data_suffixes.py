"""Endings of data files. They say how a file is read, in lower or upper case."""

from __future__ import annotations

_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_TABLES = (".parquet", ".arrow", ".feather")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

DATA_SUFFIXES = (*_TEXT, *_TABLES, *(text + packed for text in _TEXT for packed in COMPRESSIONS))
SUPPORTED = f"{', '.join(_TEXT + _TABLES)}; text also with {', '.join(COMPRESSIONS)}"
"""The endings, for messages."""


def data_suffix(name: str) -> str:
    """Return the ending of a data file in lower case, such as `.csv` or `.jsonl.gz`. It is empty
    for other files."""
    lower = name.lower()
    return next((suffix for suffix in DATA_SUFFIXES if lower.endswith(suffix)), "")
