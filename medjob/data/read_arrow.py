"""Read rows from Parquet and Arrow files, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medjob.data.open_text import refuse_other_type
from medjob.data.raw_row import RawRow, Unusable, checked_row, equal_names
from medjob.errors import DataError

_MAGIC = {"Parquet": (b"PAR1", b"PARE"), "Arrow": (b"ARROW1",)}
_ROWS = 1000
_BYTES = 1 << 26
"""About how much data is converted at once."""


def read_parquet(path: Path, name: str) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file. Raises DataError if it cannot be read."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(
            path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        ) as file:
            _check_names(path, file.schema_arrow)
            batches = file.iter_batches(batch_size=_batch_rows(file.metadata))
            yield from _numbered(name, batches)
    except Exception as error:
        raise _unreadable(path, "Parquet", error) from None


def read_arrow(path: Path, name: str) -> Iterator[RawRow]:
    """Yield the rows of an Arrow file, as datasets and Feather write it. Raises DataError if it
    cannot be read."""
    import pyarrow as pa

    try:
        with path.open("rb") as file:
            is_stream = file.read(6) != b"ARROW1"
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_stream(source) if is_stream else pa.ipc.open_file(source)
            _check_names(path, reader.schema)
            batches = (
                reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
            )
            yield from _numbered(name, map(_validated, batches))
    except Exception as error:
        raise _unreadable(path, "Arrow", error) from None


def _validated(batch: Any) -> Any:
    """Check the offsets in a batch, which Arrow trusts: it would read beyond the end of a buffer.

    A text that is not UTF-8 rejects only the row it is in, except in nested columns.
    """
    import pyarrow as pa

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            if column.type not in (pa.string(), pa.large_string()):
                raise
            binary = pa.binary() if column.type == pa.string() else pa.large_binary()
            column.view(binary).validate(full=True)
    return batch


def _unreadable(path: Path, kind: str, error: Exception) -> Exception:
    """Translate an error of pyarrow, which has OSErrors without a number. Its messages may quote
    the file's contents."""
    if isinstance(error, DataError) or (isinstance(error, OSError) and error.errno):
        return error
    try:
        with path.open("rb") as file:
            head = file.read(1000)
        if not head.startswith(_MAGIC[kind]):
            refuse_other_type(path, head)
    except (DataError, OSError) as better:
        return better
    return DataError(
        f"{path}: not a readable {kind} file ({type(error).__name__})", _hint(kind, head)
    )


def _hint(kind: str, head: bytes) -> str:
    if not head:
        return "the file is empty; write or download it again"
    text = head.decode(errors="replace")  # its end can be cut in a character
    if not head.startswith(_MAGIC[kind]) and "\0" not in text and text.count("\ufffd") < 2:
        return "it is text: its name must end in .jsonl, .json, .csv or .tsv"
    return "the file may be damaged, incomplete or encrypted"


def _check_names(path: Path, schema: Any) -> None:
    same = equal_names(schema.names)
    if same:
        raise DataError(
            f"{path}: columns {same[0]} and {same[1]} have the same name",
            "rename or remove one of them",
        )


def _batch_rows(metadata: Any) -> int:
    """Choose how many rows to read at once, so that large rows do not need more memory."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    largest = max((g.total_byte_size / max(g.num_rows, 1) for g in groups), default=0)
    return int(min(_ROWS, max(1, _BYTES // max(largest, 1))))


def _numbered(name: str, batches: Iterator[Any]) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for row in batch_rows(batch):
            number += 1
            yield checked_row(name, number, row)


def batch_rows(batch: Any) -> Iterator[dict[str, Any] | Unusable]:
    """Convert a batch to rows. Those that cannot be converted have a reason instead."""
    step = max(1, min(_ROWS, batch.num_rows * _BYTES // max(batch.nbytes, 1)))
    for start in range(0, batch.num_rows, step):
        part = batch.slice(start, step)
        try:
            rows = _to_rows(part)
        except Exception:
            rows = [_to_row(part.slice(number, 1)) for number in range(part.num_rows)]
        yield from rows


def _to_rows(batch: Any) -> list[dict[str, Any] | Unusable]:
    rows: list[dict[str, Any] | Unusable] = batch.to_pylist(maps_as_pydicts="strict")
    return rows


def _to_row(batch: Any) -> dict[str, Any] | Unusable:
    try:
        return _to_rows(batch)[0]
    except Exception as error:
        if isinstance(error, UnicodeDecodeError):
            return Unusable("not UTF-8")
        return Unusable(f"a value cannot be read ({type(error).__name__})")
