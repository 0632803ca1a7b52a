"""Open text files: compressed or not, in UTF-8 or, with a byte-order mark, in UTF-16."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from medjob.config.data_suffixes import SUPPORTED
from medjob.data.raw_row import MAX_ROW
from medjob.errors import DataError, InputError
from medjob.sources.other_types import type_of

UTF8_HINT = "save the file as UTF-8, such as with `iconv -f WINDOWS-1252 -t UTF-8`"
_HEAD = 1 << 16
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_PACKED = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a text file. Line ends are kept, and bytes that are not UTF-8 become lone surrogates.

    Raises:
        DataError: the file is not text.
        InputError: the compressed data is damaged.
    """
    with _open_bytes(path) as file:
        encoding = _encoding(path, file.read(_HEAD))
    # UTF-16 can contain half a pair of surrogates, which rejects only the row it is in.
    errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
    with (
        _open_bytes(path) as file,
        io.TextIOWrapper(file, encoding, errors=errors, newline="") as text,
    ):
        yield text


@contextmanager
def _open_bytes(path: Path) -> Iterator[BinaryIO]:
    try:
        with _decompressed(path) as file:
            yield file
    except UnicodeDecodeError:
        raise DataError(f"{path}: not valid UTF-16", "save the file as UTF-8") from None
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise InputError(
            f"{path}: the compressed data is damaged or incomplete ({type(error).__name__})",
            "download or compress the file again",
        ) from None


def _decompressed(path: Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return io.BufferedReader(cast("io.RawIOBase", gzip.open(path)))
        case ".bz2":
            return io.BufferedReader(cast("io.RawIOBase", bz2.open(path)))
        case ".xz":
            return io.BufferedReader(cast("io.RawIOBase", lzma.open(path)))
        case ".zst":
            import pyarrow as pa

            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
        case _:
            return path.open("rb")


def refuse_other_type(path: Path, head: bytes) -> None:
    """Raise DataError if a file that begins with `head` is of a type that its name does not say."""
    for magic, suffix in _PACKED.items():
        if head.startswith(magic):
            raise DataError(
                f"{path}: is compressed",
                f"decompress it, or, if it is text, add {suffix} to its name",
            )
    if other := type_of(head):
        found, hint = other
        raise DataError(f"{path}: is {found}", hint)


def _encoding(path: Path, head: bytes) -> str:
    """Return the encoding of a text file that begins with `head`."""
    refuse_other_type(path, head)
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    if head.count(0) > len(head) // 4:
        raise DataError(
            f"{path}: not a text file, or in UTF-16 without a byte-order mark (many bytes are 0)",
            f"if it is text, save it as UTF-8; supported: {SUPPORTED}",
        )
    return "utf-8-sig"


def first_invalid_byte(text: str) -> int | None:
    """Return the position of the first byte that was not UTF-8 in a text that `open_text` read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return len(text[: error.start].encode())
    return None


def lines(file: TextIO) -> Iterator[tuple[int, str | None]]:
    """Yield every line with its number. A line that is longer than a row may be is None, and is not
    kept in memory."""
    number = 0
    while line := file.readline(MAX_ROW):
        number += 1
        if len(line) < MAX_ROW or line.endswith(("\n", "\r")):
            yield number, line
            continue
        while len(line) == MAX_ROW and not line.endswith(("\n", "\r")):
            line = file.readline(MAX_ROW)
        yield number, None
