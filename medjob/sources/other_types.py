"""Files of types that hold no rows or that medjob does not read, and how to convert them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from medjob.config.data_suffixes import COMPRESSIONS, SUPPORTED

_RENAMED = {
    ".parq": ".parquet",
    ".pq": ".parquet",
    ".jsonlines": ".jsonl",
    ".jl": ".jsonl",
    ".psv": ".csv",
    ".tab": ".tsv",
    ".gzip": ".gz",
    ".zstd": ".zst",
    ".bzip2": ".bz2",
}
_SHEET = "save the sheet as CSV in UTF-8, and name that file"
_UNPACK = "unpack the archive, and name the files in it, or their directory"
_DOCUMENT = (
    f"supported: {SUPPORTED}; write the questions and answers of a document as rows, such as one "
    "JSON object per line"
)
_ARRAYS = "it holds arrays or weights, not rows; name a file with questions and answers"
_COMPRESS = f"decompress it; text may end in {', '.join(COMPRESSIONS)}"
_TABLE = "convert it to CSV in UTF-8, JSON lines or Parquet, and name that file"
_PICKLE = "reading a pickle can run code, so medjob does not; if you trust the file, "
# How pandas reads a type, and what to say before.
_PANDAS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((".xlsx", ".xls", ".xlsm", ".xlsb", ".ods"), "read_excel({name!r})", f"{_SHEET}; or "),
    ((".dta",), "read_stata({name!r})", ""),
    ((".sas7bdat", ".xpt"), "read_sas({name!r}, encoding='utf-8')", ""),
    ((".sav", ".zsav"), "read_spss({name!r})", ""),
    ((".orc",), "read_orc({name!r})", ""),
    ((".xml",), "read_xml({name!r})", ""),
    ((".pkl", ".pickle"), "read_pickle({name!r})", _PICKLE),
)
_HINTS: tuple[tuple[tuple[str, ...], str], ...] = (
    ((".numbers",), _SHEET),
    ((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"), _UNPACK),
    ((".por", ".rds", ".rdata", ".rda"), _TABLE),
    ((".db", ".sqlite", ".sqlite3", ".duckdb", ".mdb", ".accdb"), _TABLE),
    ((".avro", ".tfrecord", ".msgpack", ".lance", ".yaml", ".yml"), _TABLE),
    ((".pdf", ".doc", ".docx", ".odt", ".rtf", ".html", ".htm", ".md", ".txt"), _DOCUMENT),
    ((".npy", ".npz", ".pt", ".pth", ".safetensors", ".h5", ".hdf5", ".mat"), _ARRAYS),
    ((".lz4", ".lzma", ".z", ".br", ".snappy"), _COMPRESS),
)
_TO_LINES = ".to_json({rows!r}, orient='records', lines=True)"
# What files begin with, in lower case and without white space, and what they are.
_BEGINNINGS = {
    b"pk\x03\x04": ("a zip archive or a spreadsheet", f"unpack it, or {_SHEET}"),
    b"\xd0\xcf\x11\xe0": ("an Excel file", _SHEET),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"rar!\x1a": ("a RAR archive", _UNPACK),
    b"par1\x15": ("a Parquet file", "its name must end in .parquet"),
    b"arrow1\0": ("an Arrow file", "its name must end in .arrow"),
    b"\x80\x03": ("a pickle", f"{_PICKLE}convert it with pandas.read_pickle"),
    b"\x80\x04": ("a pickle", f"{_PICKLE}convert it with pandas.read_pickle"),
    b"\x80\x05": ("a pickle", f"{_PICKLE}convert it with pandas.read_pickle"),
    b"sqlite format 3\0": ("a SQLite database", _TABLE),
    b"<stata_dta>": ("a Stata file", _TABLE),
    b"$fl2": ("an SPSS file", _TABLE),
    b"header record*******": ("a SAS transport file", _TABLE),
    b"\0" * 12 + b"\xc2\xea\x81\x60": ("a SAS file", _TABLE),
    b"obj\x01": ("an Avro file", _TABLE),
    b"\x89hdf": ("an HDF5 file", _ARRAYS),
    b"\x93numpy": ("a NumPy file", _ARRAYS),
    b"%pdf-": ("a PDF", _DOCUMENT),
    b"{\\rtf": ("a document in RTF", _DOCUMENT),
    b"<?xml": ("an XML file", _TABLE),
    b"version https://git-lfs": (
        "a pointer to a file in Git LFS",
        "`git lfs pull` downloads the file itself",
    ),
    b"<!doctype html": ("a web page", "download the file itself, not the page that shows it"),
    b"<html": ("a web page", "download the file itself, not the page that shows it"),
}
_TAR_AT = 257
"""Where a tar archive has the name of its format, in bytes."""


def type_of(head: bytes) -> tuple[str, str] | None:
    """Return what a file that begins with `head` is, and what to do about it. None if it can be a
    file with rows."""
    if head[_TAR_AT:].startswith(b"ustar"):
        return "a tar archive", _UNPACK
    start = head.lstrip().lower()
    return next((found for magic, found in _BEGINNINGS.items() if start.startswith(magic)), None)


def hint_for(names: Sequence[str]) -> str:
    """Return what to do about files that are not read, by the ending of the first that is known."""
    return next(filter(None, map(_hint, names)), f"supported: {SUPPORTED}")


def _hint(name: str) -> str:
    path = PurePath(name)
    endings = [ending.lower() for ending in path.suffixes]
    last = endings[-1] if endings else ""
    if ".tar" in endings:
        return _UNPACK
    if last in _RENAMED:
        return f"rename it to {path.stem}{_RENAMED[last]}"
    for suffixes, read, text in _PANDAS:
        if last in suffixes:
            call = f"in Python: pandas.{read}{_TO_LINES}"
            return text + call.format(name=path.name, rows=f"{path.stem}.jsonl")
    if last in COMPRESSIONS and len(endings) == 1:
        return f"its name must say what it holds, such as {path.stem}.jsonl{last}"
    if last in COMPRESSIONS:
        return f"decompress it: only text may be compressed; supported: {SUPPORTED}"
    return next((text for suffixes, text in _HINTS if last in suffixes), "")
