"""Reading files: every common form is read, and everything else has a file, a line and a reason."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import logging
import lzma
import os
import pickle
import shutil
import socket
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medjob.config.prepare import DataSource
from medjob.data import raw_row
from medjob.data.read import RawRow, read
from medjob.errors import ConfigError, DataError, InputError, MedjobError
from medjob.sources.locations import Location, locate
from medjob.sources.references import is_hub, local_pin

ROWS = [{"question": f"q{i}, «ü» 为", "answer": f'line "{i}"\nnext; more'} for i in range(5)]
JSON_ROWS = json.dumps(ROWS, ensure_ascii=False)
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TOKEN = "Roe-7351"  # text of a patient's row


def read_local(path: Path | str, **options: Any) -> list[RawRow]:
    source = DataSource(path=str(path), **options)
    return list(read(source, locate(source, {}, Path())))


def fields_of(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    rows = read_local(path, **options)
    assert [row.problem for row in rows] == [""] * len(rows)
    return [dict(row.fields) for row in rows]


def problems_of(path: Path) -> list[tuple[int, str]]:
    return [(row.line, row.problem) for row in read_local(path) if row.problem]


def refusal(path: Path | str, **options: Any) -> MedjobError:
    with pytest.raises((DataError, InputError)) as caught:
        read_local(path, **options)
    assert TOKEN not in str(caught.value)
    return caught.value


def csv_text(rows: list[dict[str, Any]] = ROWS, delimiter: str = ",", ends: str = "\r\n") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=ends)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
PANDAS = {name: {str(i): cell for i, cell in enumerate(cells)} for name, cells in COLUMNS.items()}
SPLIT = {"columns": list(ROWS[0]), "index": [0], "data": [list(row.values()) for row in ROWS]}
API = {"features": [], "rows": [{"row_idx": 1, "row": row, "truncated_cells": []} for row in ROWS]}
FORMS: dict[str, tuple[str, str | bytes]] = {
    "lines": ("x.jsonl", JSON_LINES),
    "lines with BOM, CRLF and blank lines": ("x.jsonl", "\ufeff\r\n" + JSON_LINES.replace("\n", "\r\n\r\n")),
    "lines that end in CR": ("x.jsonl", JSON_LINES.replace("\n", "\r")),
    "two files with BOM in one": ("x.jsonl", "".join("\ufeff" + line + "\n" for line in JSON_LINES.splitlines())),
    "lines without an end": ("x.ndjson", JSON_LINES.rstrip()),
    "upper case": ("x.JSONL", JSON_LINES),
    "lines in UTF-16": ("x.jsonl", JSON_LINES.encode("utf-16")),
    "lines in .json": ("x.json", JSON_LINES),
    "list": ("x.json", JSON_ROWS),
    "indented list": ("x.json", "\ufeff\n" + json.dumps(ROWS, indent=2)),
    "list in UTF-16": ("x.json", JSON_ROWS.encode("utf-16")),
    "list in .jsonl": ("x.jsonl", JSON_ROWS),
    "indented list in .jsonl": ("x.jsonl", json.dumps(ROWS, indent=1)),
    "columns": ("x.json", json.dumps(COLUMNS)),
    "pandas": ("x.json", json.dumps(PANDAS)),
    "pandas split": ("x.json", json.dumps(SPLIT)),
    "data": ("x.json", json.dumps({"version": "1.1", "data": ROWS})),
    "records of pandas": ("x.json", json.dumps({"schema": {"fields": []}, "data": ROWS})),
    "two keys deep": ("x.json", json.dumps({"result": {"items": ROWS, "count": 5}})),
    "columns below a key": ("x.json", json.dumps({"train": COLUMNS})),
    "pandas below a key": ("x.json", json.dumps({"data": PANDAS})),
    "train": ("x.json", json.dumps({"train": ROWS}, indent=2)),
    "API": ("x.json", json.dumps(API)),
    "indented object in .jsonl": ("x.jsonl", json.dumps({"data": ROWS}, indent=2)),
    "CSV": ("x.csv", csv_text()),
    "CSV, \\n": ("x.CSV", csv_text(ends="\n")),
    "CSV, \\r": ("x.csv", csv_text(ends="\r")),
    "CSV with BOM": ("x.csv", "\ufeff" + csv_text()),
    "CSV in UTF-16": ("x.csv", csv_text().encode("utf-16")),
    "CSV in UTF-16 BE": ("x.csv", b"\xfe\xff" + csv_text().encode("utf-16-be")),
    "semicolons": ("x.csv", csv_text(delimiter=";")),
    "tabs": ("x.csv", csv_text(delimiter="\t")),
    "pipes": ("x.csv", csv_text(delimiter="|")),
    "TSV": ("x.tsv", csv_text(delimiter="\t")),
    "TSV with commas": ("x.tsv", csv_text()),
    **{
        f"{name}{end}": (f"{name}{end}", pack(text.encode()))
        for end, pack in PACK.items()
        for name, text in {
            "x.jsonl": JSON_LINES,
            "x.ndjson": JSON_LINES,
            "x.json": JSON_ROWS,
            "wrapped.json": json.dumps({"data": ROWS}),
            "x.csv": csv_text(),
            "x.tsv": csv_text(delimiter="\t"),
        }.items()
    },
    "CSV in UTF-16.gz": ("x.csv.gz", gzip.compress(csv_text().encode("utf-16"))),
    "two gzip members": ("x.jsonl.gz", b"".join(gzip.compress(line.encode() + b"\n") for line in JSON_LINES.splitlines())),
    "two zstd frames": ("x.jsonl.zst", b"".join(zstd(line.encode() + b"\n") for line in JSON_LINES.splitlines())),
    "upper-case .GZ": ("x.Jsonl.GZ", gzip.compress(JSON_LINES.encode())),
}  # fmt: skip


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form: str, tmp_path: Path) -> None:
    name, content = FORMS[form]
    assert fields_of(write(tmp_path / name, content)) == ROWS


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "file.arrow", "x.feather"])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_every_table_gives_the_same_rows(name: str, kind: Any, tmp_path: Path) -> None:
    table = pa.table({column: pa.array(cells).cast(kind) for column, cells in COLUMNS.items()})
    if name == "x.parquet":
        pq.write_table(table, tmp_path / name, row_group_size=2)
    else:
        new = pa.ipc.new_stream if name == "stream.arrow" else pa.ipc.new_file
        with new(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    rows = read_local(tmp_path / name)
    assert [dict(row.fields) for row in rows] == ROWS
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]


def test_single_object_is_one_row(tmp_path: Path) -> None:
    row = {"question": "q", "options": [{"key": "A", "value": "x"}, {"key": "B", "value": "y"}]}
    assert fields_of(write(tmp_path / "mcq.json", json.dumps(row, indent=1))) == [row]
    turns = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert fields_of(write(tmp_path / "chat.json", json.dumps(turns))) == [turns]
    rows = {"conversations": [turns, turns]}
    assert fields_of(write(tmp_path / "chats.json", json.dumps(rows))) == [turns, turns]


def test_objects_by_id_are_rows(tmp_path: Path) -> None:
    rows = {"12": {"QUESTION": "q", "LABELS": ["a"]}, "13": {"QUESTION": "r", "LABELS": []}}
    assert [row["id"] for row in fields_of(write(tmp_path / "x.json", json.dumps(rows)))] == [
        "12",
        "13",
    ]


def test_rows_of_a_list_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.json", "[" + ",\n".join([json.dumps(ROWS[0])] * 20_000) + ", {broken"
    )
    assert len(fields_of(path, limit=20_000)) == 20_000
    assert "row 20001 (line 20000)" in refusal(path).message


# Rows that are rejected: the line, and what the reason says.
OK = '{"a": "b"}'
BAD_LINES: list[tuple[str, bytes | str, str]] = [
    ("invalid bytes", b'{"a": "b \xff"}', "not UTF-8 (column 1)"),
    ("invalid bytes in a key", b'{"\xc3": "b"}', "not UTF-8 (column 1)"),
    ("bytes of a surrogate", b'{"x": 1, "a": "\xed\xa0\xbd"}', "not UTF-8 (column 2)"),
    ("lone surrogate", r'{"x": 1, "a": "b \ud83d"}', "not UTF-8 (column 2)"),
    ("nested surrogate", r'{"a": {"b": ["c", {"d": "\uDE00"}]}}', "not UTF-8 (column 1)"),
    ("surrogate in a nested key", r'{"a": {"\ud83d": 1}}', "not UTF-8 (column 1)"),
    ("NaN", '{"a": NaN}', "NaN is not a number"),
    ("nested Infinity", '{"a": [-Infinity]}', "-Infinity is not a number"),
    ("large number", '{"a": 1e999}', "a number is too large"),
    ("many digits", '{"a": ' + "9" * 5000 + "}", "too many digits"),
    ("deep", '{"a": ' + "[" * 200 + "]" * 200 + "}", "nested too deeply"),
    ("very deep", '{"a": ' + "[" * 200_000, "nested too deeply"),
    ("key twice", '{"a": "x", "a": "y"}', "the same key twice"),
    ("nested key twice", '{"b": {"a": "x", "a": "y"}}', "the same key twice (column 1)"),
    ("no keys", "{}", "has no columns"),
    ("list", '["a", "b"]', "not a JSON object (list)"),
    ("text", '"a"', "not a JSON object (str)"),
    ("null", "null", "not a JSON object (NoneType)"),
    ("binary", b"\x80\x81\0", "not UTF-8 (byte 0)"),
    ("cut off", '{"a": "b', "not valid JSON"),
    ("comma after it", '{"a": "b"},', "not valid JSON: Extra data (column 11)"),
    ("Python", "{'a': None}", "not valid JSON"),
    ("NUL bytes", b"\0\0\0\0", "not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "reason"), [case[1:] for case in BAD_LINES], ids=[case[0] for case in BAD_LINES]
)
def test_bad_line_rejects_only_its_row(line: bytes | str, reason: str, tmp_path: Path) -> None:
    data = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "x.jsonl", f"{OK}\n\n".encode() + data + f"\n{OK}\n".encode())
    first, bad, last = read_local(path)
    assert (dict(first.fields), dict(last.fields), last.line) == ({"a": "b"}, {"a": "b"}, 4)
    assert (bad.file, bad.line, dict(bad.fields)) == ("x.jsonl", 3, {})
    assert reason in bad.problem


@pytest.mark.parametrize(
    "case", [case for case in BAD_LINES if case[0] not in ("binary", "cut off", "very deep", "comma after it", "Python", "NUL bytes", "text")], ids=lambda case: case[0]
)  # fmt: skip
def test_bad_value_in_a_list_rejects_only_its_row(case: Any, tmp_path: Path) -> None:
    data = case[1] if isinstance(case[1], bytes) else case[1].encode()
    path = write(tmp_path / "x.json", f"[{OK}, ".encode() + data + f", {OK}]".encode())
    first, bad, last = read_local(path)
    assert (first.problem, last.problem) == ("", "")
    assert (bad.line, case[2] in bad.problem) == (2, True), bad.problem
    wrapped = write(tmp_path / "y.json", b'{"data": ' + path.read_bytes() + b"}")
    assert [row.problem for row in read_local(wrapped)] == ["", bad.problem, ""]


def test_csv_row_with_invalid_bytes_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", b"question,answer\nfine,yes\nbad \xe9,yes\nfine too,yes\n")
    assert problems_of(path) == [(3, "not UTF-8 (column 1)")]


CSV_ROWS: list[tuple[str, str, list[tuple[int, str]]]] = [
    ("too few", "a,b\n1\n2,3\n", [(2, "wrong number of columns: 1, but the header has 2")]),
    ("too many", "a,b\n1,2,3\n2,3\n", [(2, "wrong number of columns: 3, but the header has 2")]),
    ("repeated header", "a,b\n1,2\na,b\n3,4\n", [(3, "repeats the header")]),
    ("cell without a name", "a,b,\n1,2,\n1,2,3\n", [(3, "a cell in a column without a name (column 3)")]),
    ("after a long row", 'a,b\n"1\n\n2",x\n1\n', [(5, "wrong number of columns: 1, but the header has 2")]),
    ("one column", "text\none\ntwo, with commas; and more\nthree\n", [(3, "wrong number of columns: 2, but the header has 1")]),
    ("unquoted commas", "a;b\n1,5;2,5\n1;2;3\n", [(3, "wrong number of columns: 3, but the header has 2")]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"), [case[1:] for case in CSV_ROWS], ids=[case[0] for case in CSV_ROWS]
)
def test_bad_csv_row_has_its_line(text: str, expected: Any, tmp_path: Path) -> None:
    assert problems_of(write(tmp_path / "x.csv", text)) == expected


def test_line_of_a_csv_row_is_where_it_starts(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", '\na,b\n"1\n2\n3",x\n\n4,y\r\n"5\r\n6",z\n')
    assert [(row.line, row.fields["b"]) for row in read_local(path)] == [
        (3, "x"),
        (7, "y"),
        (8, "z"),
    ]


CSV_READ: list[tuple[str, str, list[dict[str, str]]]] = [
    ("quote in an unquoted cell", 'a,b\n5" needle,x\n', [{"a": '5" needle', "b": "x"}]),
    ("spaces after commas", 'a, b\n1, "x, y"\n', [{"a": "1", "b": "x, y"}]),
    ("comma-rich cells", 'a;b\n"1, 2, 3";x, y, z\n"1, 2";x\n', [{"a": "1, 2, 3", "b": "x, y, z"}, {"a": "1, 2", "b": "x"}]),
    ("comma in a name", "a, really;b\n1;x\n2;y\n3;z\n", [{"a, really": "1", "b": "x"}, {"a, really": "2", "b": "y"}, {"a, really": "3", "b": "z"}]),
    ("index of pandas", ",a,b\n0,1,x\n", [{"": "0", "a": "1", "b": "x"}]),
    ("empty columns at the end", "a,b,,\n1,x,,\n", [{"a": "1", "b": "x"}]),
    ("tabs in cells", 'a,b\n1,"x\ty|z;"\n', [{"a": "1", "b": "x\ty|z;"}]),
    ("large cell", "a,b\n1," + "x" * 200_000 + "\n", [{"a": "1", "b": "x" * 200_000}]),
    ("line separators", "a,b\n1,x\u2028y\x85z\x0c\n", [{"a": "1", "b": "x\u2028y\x85z\x0c"}]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"), [case[1:] for case in CSV_READ], ids=[case[0] for case in CSV_READ]
)
def test_csv_is_read_as_it_is_meant(text: str, expected: Any, tmp_path: Path) -> None:
    assert fields_of(write(tmp_path / "x.csv", text)) == expected


BAD_CSV: list[tuple[str, str, str]] = [
    ("not closed", 'a,b\n1,"x\n2,y\n3,z\n', "the quote that opens in line 2 is not closed"),
    ("not closed in a later line", 'a,b\n1,y\n"1\n2","x\n2,y\n', "the quote that opens in line 4 is not closed"),
    ("closed by the next row", 'a,b\n1,"x\n2,"y"\n', "the quote that opens in line 2 ends within a cell in line 3"),
    ("text after a quote", 'a,b\n1,"x" and y\n', "the quote that opens in line 2 ends within a cell in the same line"),
    ("backslash", 'a,b\n1,"x \\"y\\" z"\n', "the quote that opens in line 2 ends within a cell in the same line"),
    ("in the header", '"a,b\n1,2\n', "the quote that opens in line 1 is not closed"),
    ("quote swallows rows", 'a,b\n1,"x\n2,5",3\n4,5\n', "lines 2 to 3 are one row with 3 columns, but the header has 2"),
    ("CRLF", 'a,b\r\n1,y\r\n1,"x\r\n2,y\r\n', "the quote that opens in line 3 is not closed"),
    ("spaces", 'a, b\n1, "x\n2, y\n', "the quote that opens in line 2 is not closed"),
    ("same names", "a,b,a\n1,2,3\n", "columns 1 and 3 have the same name"),
    ("same names but for case", "Question,Answer,question\n1,2,3\n", "columns 1 and 3 have the same name"),
    ("same names but for separators", "complex_cot,Complex CoT\n1,2\n", "columns 1 and 2 have the same name"),
    ("header is not UTF-8", "Fr\udce4ge,b\n1,2\n", "the names of the columns are not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"), [case[1:] for case in BAD_CSV], ids=[case[0] for case in BAD_CSV]
)
def test_malformed_csv_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", text.replace("x", TOKEN).encode(errors="surrogateescape"))
    error = refusal(path)
    assert isinstance(error, DataError)
    assert message in error.message
    assert str(path) in error.message


DAMAGED = [
    ("x.jsonl.gz", gzip.compress(os.urandom(5000))[:-2000], "damaged or incomplete"),
    ("x.jsonl.gz", b"no gzip at all", "damaged or incomplete"),
    ("x.jsonl.gz", gzip.compress(JSON_LINES.encode()) + b"garbage", "damaged or incomplete"),
    ("x.csv.bz2", bz2.compress(os.urandom(5000))[:-1000], "damaged or incomplete"),
    ("x.csv.bz2", b"no bzip2", "damaged or incomplete"),
    ("x.csv.xz", lzma.compress(os.urandom(5000))[:-1000], "damaged or incomplete"),
    ("x.json.xz", b"no xz", "damaged or incomplete"),
    ("x.json.zst", zstd(JSON_ROWS.encode())[:-20], "damaged or incomplete"),
    ("x.csv.zst", b"no zstd", "damaged or incomplete"),
    ("x.jsonl", gzip.compress(JSON_LINES.encode()), "is compressed\nhint: decompress it, or, if it is text, add .gz"),
    ("x.csv", zstd(csv_text().encode()), "is compressed\nhint: decompress it, or, if it is text, add .zst"),
    ("x.jsonl", pickle.dumps(ROWS), "is a pickle\nhint: reading a pickle can run code"),
    ("x.jsonl.gz", gzip.compress(b"a.jsonl" + bytes(250) + b"ustar\0" + bytes(300)), "is a tar archive\nhint: unpack"),
    ("x.csv", b"<stata_dta><header>", "is a Stata file"),
    ("x.csv", b"$FL2@(#) SPSS", "is an SPSS file"),
    ("x.csv", b"SQLite format 3\0" + bytes(80), "is a SQLite database"),
    ("x.json", b"{\\rtf1\\ansi}", "is a document in RTF"),
    ("x.csv", JSON_LINES.encode(), "holds JSON, although its name says that it is CSV\nhint: its name must end in .jsonl"),
    ("x.tsv", json.dumps(ROWS, indent=1).encode(), "holds JSON"),
    ("x.json", csv_text().encode(), "hint: if it is CSV, its name must end in .csv"),
    ("x.parquet", csv_text().encode(), "hint: it is text: its name must end in .jsonl"),
    ("x.arrow", parquet(), "is a Parquet file\nhint: its name must end in .parquet"),
    ("x.csv", b"PK\x03\x04" + bytes(100), "a zip archive or a spreadsheet"),
    ("x.csv", b"\xd0\xcf\x11\xe0\xa1\xb1" + bytes(100), "an Excel file"),
    ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "Git LFS"),
    ("x.json", b"\n<!DOCTYPE html>\n<html></html>", "a web page"),
    ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "Git LFS"),
    ("x.arrow", b"<html></html>", "a web page"),
    ("x.parquet", gzip.compress(b"PAR1"), "is compressed\nhint: decompress it, or, if it is text, add .gz"),
    ("x.csv", csv_text().encode("utf-16-le"), "UTF-16 without a byte-order mark"),
    ("x.jsonl", JSON_LINES.encode("utf-16")[:-1], "not valid UTF-16"),
    ("x.json", b"{nope", "not valid JSON"),
    ("x.json", b'"text"', "must contain a list of objects (got str)"),
    ("x.json", b"3", "must contain a list of objects (got int)"),
    ("x.json", b'[{"a": "b"}', "does not continue after row 1"),
    ("x.json", b'[{"a": "b"} {"a": "c"}]', "does not continue after row 1"),
    ("x.json", b'[{"a": "b"},]', "in row 2 (line 1)"),
    ("x.json", b'[{"a": "b"}]\n[{"a": "c"}]', "text follows the list (line 2)"),
    ("x.json", b'{"train": [{"a": "b"}], "test": [{"a": "b"}]}', "contains 2 lists of objects: train, test\nhint: keep one of them, such as with: jq '.[\"train\"]' x.json"),
    ("x.json", b'{"Roe-7351": [{"a": "b"}], "Doe": [{"a": "b"}]}', "contains 2 lists of objects\nhint"),
    ("x.json", b'{"a": ["b", "c"], "d": ["e"]}', "different lengths, from 1 to 2"),
    ("x.json", b"[" * 100_000, "nested too deeply"),
    ("x.json", b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    ("x.parquet", b"PAR1 is not enough", "not a readable Parquet file"),
    ("x.parquet", b"", "not a readable Parquet file (ArrowInvalid)\nhint: the file is empty"),
    ("x.arrow", b"ARROW1 is not enough", "not a readable Arrow file"),
    ("x.arrow", b"neither is this", "not a readable Arrow file"),
    ("x.feather", b"", "not a readable Arrow file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_file_is_refused_by_name(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    error = refusal(write(tmp_path / name, content))
    assert message in str(error)
    assert str(tmp_path / name) in error.message


def test_messages_never_quote_a_file_without_a_header(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", f"{TOKEN} 1 has a cough,rest\n{TOKEN} 2,rest\n")
    message = "unknown column 'type' in where: the row in x.csv:2 has 2 other columns"
    assert message in refusal(path, where={"type": ["a"]}).message


def test_unknown_column_in_where_suggests_its_spelling(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "Source Type,a\nx,y\n")
    assert (
        refusal(path, where={"source_type": ["x"]}).hint == "write it as in the file: 'Source Type'"
    )


def test_where_never_matches_null(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"type": null}\n{"type": "None of these"}\n')
    assert fields_of(path, where={"type": ["None"]}) == [{"type": "None of these"}]


def test_where_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", JSON_LINES)
    assert "none of its 5 rows match where" in refusal(path, where={"question": ["z"]}).message


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.tsv", "x.jsonl.gz"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_source_without_rows_is_refused(name: str, content: str, tmp_path: Path) -> None:
    data = content.encode()
    write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert "has no rows" in refusal(tmp_path / name).message


@pytest.mark.parametrize(
    ("name", "content"),
    [("y.csv", "a,b\n"), ("y.json", "[]"), ("y.json", '{"data": []}'), ("y.jsonl", "")],
)
def test_empty_file_beside_others_is_logged(
    name: str, content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "x.jsonl", JSON_LINES)
    write(tmp_path / name, content)
    assert len(fields_of(tmp_path)) == 5
    assert f"{name}: has no rows" in caplog.text


# Sizes. The limits are lowered, because they concern gigabytes.
@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    from medjob.data import open_text, read_csv, read_json

    for module in (raw_row, open_text, read_json):
        monkeypatch.setattr(module, "MAX_ROW", 100_000)
    for module in (read_csv, read_json):
        monkeypatch.setattr(module, "MAX_TEXT", 1_000_000)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet"])
def test_row_that_is_too_long_is_rejected(name: str, tmp_path: Path) -> None:
    rows = [ROWS[0], {"question": "q", "answer": "x" * 300_000}, ROWS[1]]
    if name == "x.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    elif name == "x.csv":
        write(tmp_path / name, csv_text(rows))
    else:
        write(
            tmp_path / name,
            json.dumps(rows)
            if name == "x.json"
            else "".join(json.dumps(row) + "\n" for row in rows),
        )
    first, bad, last = read_local(tmp_path / name)
    assert bad.problem.startswith("longer than a row may be (at most 100,000 characters")
    assert (dict(first.fields), dict(last.fields)) == (ROWS[0], ROWS[1])


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(("name", "start", "message"), [
    ("x.csv", 'a,b\n1,"', "the quote that opens in line 2 is not closed"),
    ("x.csv", "a,b\n1,", "the row in line 2 does not end within 1,000,000 characters"),
    ("x.json", '[{"a": "', "not valid JSON: Unterminated string"),
])  # fmt: skip
def test_row_without_an_end_is_not_read_to_the_end(
    name: str, start: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    with path.open("w") as file:
        file.write(start + "x\n" * 10 if name == "x.csv" and '"' in start else start)
        for _ in range(30):
            file.write("y" * 100_000)
    assert message in refusal(path).message


def test_memory_stays_flat_for_a_line_without_an_end(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "x.jsonl"
    with path.open("w") as file:
        for _ in range(120):
            file.write("y" * (1 << 20))
    tracemalloc.start()
    (row,) = read_local(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert row.problem == "longer than a row may be (at most 16,777,216 characters)"
    assert peak < 80 << 20


# Tables.
def not_utf8(kind: Any = None) -> pa.Array:
    offsets = pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0")
    return pa.Array.from_buffers(
        kind or pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xff\xffb")]
    )


@pytest.mark.parametrize(
    ("name", "nested"), [("x.parquet", False), ("x.parquet", True), ("x.arrow", False)]
)
def test_table_with_invalid_utf8_rejects_one_row(name: str, nested: bool, tmp_path: Path) -> None:
    texts = not_utf8()
    cells = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), texts) if nested else texts
    table = pa.table({"n": [1, 2, 3], "text": cells})
    if name == "x.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    assert problems_of(tmp_path / name) == [(2, "not UTF-8")]


def test_parquet_values_of_every_type_are_read(tmp_path: Path) -> None:
    table = pa.table({
        "question": ["q"],
        "options": pa.array([[("A", "x"), ("B", "y")]], pa.map_(pa.string(), pa.string())),
        "turns": [[{"role": "user", "content": "q"}]],
        "score": [float("nan")],
        "image": [b"\xff\xfe"],
        "null": pa.nulls(1),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "x.parquet")
    (row,) = fields_of(tmp_path / "x.parquet")
    assert row["options"] == {"A": "x", "B": "y"}
    assert row["turns"] == [{"role": "user", "content": "q"}]


def test_date_that_python_cannot_hold_rejects_one_row(tmp_path: Path) -> None:
    days = pa.array([0, 10**7], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"q": ["a", "b"], "day": days}), tmp_path / "x.parquet")
    ((line, problem),) = problems_of(tmp_path / "x.parquet")
    assert (line, problem.startswith("a value cannot be read (")) == (2, True)


def test_table_with_two_columns_of_a_name_is_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["q", "q"])
    pq.write_table(table, tmp_path / "x.parquet")
    assert "columns 1 and 2 have the same name" in refusal(tmp_path / "x.parquet").message


def test_corrupt_offsets_of_an_arrow_file_do_not_crash(tmp_path: Path) -> None:
    wrong = pa.py_buffer(b"\0\0\0\0\1\0\0\0\xff\xff\xff\x7f\4\0\0\0")
    cells = pa.Array.from_buffers(pa.string(), 3, [None, wrong, pa.py_buffer(b"abcd")])
    with pa.ipc.new_stream(tmp_path / "x.arrow", pa.schema({"q": pa.string()})) as writer:
        writer.write_batch(pa.record_batch([cells], names=["q"]))
    assert "not a readable Arrow file" in refusal(tmp_path / "x.arrow").message


def test_changed_byte_in_a_parquet_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"q": [f"dose {i} mg" for i in range(100)]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"dose 50", b"dose 55", 1))
    assert "not a readable Parquet file" in refusal(path).message


def test_encrypted_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"q": ["a"]}), path)
    path.write_bytes(b"PARE" + path.read_bytes()[4:-4] + b"PARE")
    assert "encrypted" in refusal(path).hint


def test_parquet_of_large_rows_is_read_in_small_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medjob.data.read_arrow._BYTES", 1 << 22)
    path = tmp_path / "x.parquet"
    table = pa.table({"q": [str(i) * (1 << 20) for i in range(10)] * 4})
    pq.write_table(table, path, use_dictionary=False, compression="none", write_batch_size=1)
    del table
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() - before for _ in read_iter(path))
    assert peak < 15 << 20  # all rows have 40 MiB


def read_iter(path: Path) -> Any:
    source = DataSource(path=str(path))
    return read(source, locate(source, {}, Path()))


# Data sets that datasets saved.
@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("saved")
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(folder / "one")
    rows.save_to_disk(folder / "shards", num_shards=3)
    rows.select([4, 2]).save_to_disk(folder / "selected")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(folder / "splits")
    return folder


def test_folder_of_save_to_disk_is_read(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert fields_of(saved / "one") == ROWS
    assert fields_of(saved / "shards") == ROWS
    assert fields_of(saved / "selected") == [ROWS[4], ROWS[2]]
    assert fields_of(saved / "splits" / "test") == [ROWS[1]]
    assert fields_of(saved / "one" / "*.arrow") == ROWS
    assert caplog.text == ""


def test_split_of_a_saved_folder_is_chosen(saved: Path, tmp_path: Path) -> None:
    assert fields_of(saved / "splits", split="test") == [ROWS[1]]
    assert fields_of(saved / "splits", split="train") == ROWS
    only = shutil.copytree(saved / "splits", tmp_path / "only")
    shutil.rmtree(only / "train")
    assert fields_of(only) == [ROWS[1]]


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("splits", None, "contains 2 splits that save_to_disk wrote"),
        ("splits", "train[:2]", "no split 'train[:2]' was written by save_to_disk"),
        ("one", "train", "has no splits, but split is 'train'"),
        ("", None, "contains 2 splits that save_to_disk wrote"),
    ],
)
def test_split_of_a_saved_folder_has_to_exist(
    saved: Path, path: str, split: Any, message: str
) -> None:
    error = refusal(saved / path, split=split)
    assert message in error.message
    assert path == "one" or "test" in error.hint
    with pytest.raises(InputError, match="split"):
        local_pin(DataSource(path=str(saved / path), split=split))


@pytest.mark.parametrize(
    "path",
    ["rows.jsonl", "data/rows.CSV", "rows.json.gz", "s3://bucket/rows", "package:a/rows.arrow"],
)
def test_split_of_a_file_or_bucket_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="split can only be set for a hub data set"):
        DataSource(path=path, split="train")


def test_splits_of_one_folder_have_one_pin(saved: Path) -> None:
    train, test = (
        local_pin(DataSource(path=str(saved / "splits"), split=name)) for name in ("train", "test")
    )
    assert train == test
    assert train.count(",") == 1


def test_only_files_of_the_saved_state_are_read(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "shards", tmp_path / "copy")
    shutil.copy(folder / "data-00000-of-00003.arrow", folder / "cache-1.arrow")
    assert fields_of(folder) == ROWS
    (folder / "data-00001-of-00003.arrow").unlink()
    assert "1 of the 3 files in state.json are missing" in refusal(folder).message
    write(folder / "state.json", "[]")
    assert "state.json: not the state of a data set" in refusal(folder).message
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")
    assert "state.json: is not a regular file" in refusal(folder).message
    (folder / "state.json").unlink()
    assert "is a cache of datasets" in refusal(folder).message


def test_digest_covers_the_shards_of_a_saved_folder(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "shards", tmp_path / "copy")
    before = local_pin(DataSource(path=str(folder)))
    assert before == local_pin(DataSource(path=str(saved / "shards")))
    with (folder / "data-00002-of-00003.arrow").open("ab") as file:
        file.write(b"\0")
    assert local_pin(DataSource(path=str(folder))) != before


# Names and files.
def test_digest_covers_every_type_of_file(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv.gz", "c.TSV", "d.arrow", "e.json.zst", "f.PARQUET"):
        write(tmp_path / name, "x")
        before = local_pin(DataSource(path=str(tmp_path)))
        write(tmp_path / name, "y!")
        assert local_pin(DataSource(path=str(tmp_path))) != before, name
    before = local_pin(DataSource(path=str(tmp_path)))
    write(tmp_path / "README.md", "x")
    write(tmp_path / ".hidden.jsonl", "x")
    assert local_pin(DataSource(path=str(tmp_path))) == before


@pytest.mark.parametrize(
    "name",
    [
        "a[1].jsonl",
        "b*.jsonl",
        "c$HOME.jsonl",
        "d?.jsonl",
        "[!e].jsonl",
        "f {x}.jsonl",
        "~g.jsonl",
        "患者.jsonl",
    ],
)
def test_existing_path_is_no_pattern(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, JSON_LINES)
    write(tmp_path / "a1.jsonl", "{}")
    assert fields_of(tmp_path / name) == ROWS
    folder = tmp_path / "set[1]"
    folder.mkdir()
    write(folder / name, JSON_LINES)
    assert fields_of(folder) == ROWS
    assert fields_of(folder / "*.jsonl") == ROWS


@pytest.mark.parametrize(("stored", "named"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_name_is_found_in_the_other_normal_form(stored: Any, named: Any, tmp_path: Path) -> None:
    write(tmp_path / unicodedata.normalize(stored, "Fälle.jsonl"), JSON_LINES)
    assert fields_of(tmp_path / unicodedata.normalize(named, "Fälle.jsonl")) == ROWS
    assert fields_of(tmp_path / unicodedata.normalize(named, "Fä*.jsonl")) == ROWS


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x.jsonl", JSON_LINES)
    assert fields_of("~/x.jsonl") == ROWS
    assert "no such data file" in refusal("~nobody-of-this-name/x.jsonl").message


def test_compressed_file_in_a_folder_is_no_hub_id() -> None:
    for path in ("data/rows.jsonl.gz", "data/rows.TSV", "data/rows.arrow", "data/rows.csv.zst"):
        assert not is_hub(DataSource(path=path)), path


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name)  # the length of a socket's path is limited


SPECIAL = {
    "x.jsonl": (os.mkfifo, "is not a regular file"),
    "x.jsonl.gz": (os.mkfifo, "is not a regular file"),
    "x.parquet": (make_socket, "is not a regular file"),
    "zero.csv": (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    "none.csv": (lambda path: path.symlink_to("nowhere.csv"), "is a broken link"),
    "loop.csv": (lambda path: path.symlink_to(path.name), "is a broken link"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_special_file_is_refused_at_once(name: str, tmp_path: Path) -> None:
    make, message = SPECIAL[name]
    write(tmp_path / "a.jsonl", JSON_LINES)
    make(tmp_path / name)
    for path in (tmp_path / name, tmp_path, tmp_path / f"{name[:2]}*"):
        error = refusal(path)
        assert isinstance(error, InputError)
        assert f"{name}: {message}" in error.message
        with pytest.raises(InputError):
            local_pin(DataSource(path=str(path)))
    assert "not a regular file" in refusal("/dev/stdin").message


def test_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.jsonl")).write_text(JSON_LINES)
    error = refusal(tmp_path)
    assert r"caf\xe9.jsonl: the file's name is not UTF-8" in error.message
    with pytest.raises(InputError):
        local_pin(DataSource(path=str(tmp_path)))


def test_other_files_of_a_folder_are_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "x.jsonl", JSON_LINES)
    for name in ("README.md", "b.XLSX", "LICENSE", ".hidden", "dataset_infos.json"):
        write(tmp_path / name, "{}")
    checkpoints = tmp_path / ".ipynb_checkpoints"
    checkpoints.mkdir()
    write(checkpoints / "x-checkpoint.jsonl", JSON_LINES)
    os.mkfifo(tmp_path / "pipe")
    with caplog.at_level(logging.WARNING):
        assert fields_of(tmp_path) == ROWS
    (record,) = caplog.records
    assert (
        record.getMessage()
        == f"{tmp_path}: 4 files are not data and were not read: .md, .xlsx, no ending"
    )


OTHER_TYPES = [
    ("x.xlsx", "save the sheet as CSV"),
    ("my x.xls", "pandas.read_excel('my x.xls').to_json('my x.jsonl', orient='records', lines=True)"),
    ("x.ODS", "as CSV"),
    ("x.dta", "pandas.read_stata('x.dta')"),
    ("x.sas7bdat", "pandas.read_sas('x.sas7bdat', encoding='utf-8')"),
    ("x.sav", "pandas.read_spss('x.sav')"),
    ("x.pkl", "reading a pickle can run code"),
    ("x.zip", "unpack"),
    ("x.jsonl.zip", "unpack"),
    ("x.tar.gz", "unpack"),
    ("x.tgz", "unpack"),
    ("x.pdf", "write the questions and answers of a document as rows"),
    ("x.txt", "supported: .jsonl"),
    ("x.db", "convert it to CSV"),
    ("x.npz", "arrays or weights"),
    ("x.pq", "rename it to x.parquet"),
    ("x.jsonl.gzip", "rename it to x.jsonl.gz"),
    ("x.jsonl.lz4", "decompress it"),
    ("x.parquet.gz", "decompress it: only text may be compressed"),
    ("x.gz", "such as x.jsonl.gz"),
    ("x.unknown", "supported: .jsonl"),
    ("x", "supported: .jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "hint"), OTHER_TYPES)
def test_other_type_is_refused_with_a_way_to_convert_it(
    name: str, hint: str, tmp_path: Path
) -> None:
    write(tmp_path / name, "x")
    error = refusal(tmp_path / name)
    assert "unknown file type" in error.message
    assert hint in error.hint
    error = refusal(tmp_path)
    assert "no data files, and 1 file is not data" in error.message
    assert hint in error.hint


def test_way_to_convert_a_file_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas

    monkeypatch.chdir(tmp_path)
    pandas.DataFrame(ROWS).to_stata("x.dta", version=118, write_index=False)
    pandas.DataFrame(ROWS).to_pickle("y.pkl")
    for name in ("x.dta", "y.pkl"):
        code = refusal(tmp_path / name).hint.partition("in Python: ")[2]
        exec(code, {"pandas": pandas})
        assert (
            fields_of(tmp_path / name.replace(".dta", ".jsonl").replace(".pkl", ".jsonl")) == ROWS
        )


def test_hint_about_a_name_that_is_not_utf8_can_be_printed(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.pq")).touch()
    refusal(tmp_path).hint.encode()


def test_directory_without_data_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path / ".hidden.jsonl", OK)
    assert "no data files in this directory" in refusal(tmp_path).message


@pytest.mark.parametrize(
    ("name", "message"),
    [("_delta_log", "a Delta table"), ("_temporary", "a Spark job that has not ended")],
)
def test_table_with_invalid_files_is_refused(name: str, message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(COLUMNS), tmp_path / "part-0.parquet")
    (tmp_path / name / "0").mkdir(parents=True)
    write(tmp_path / name / "0" / "0.json", OK)
    assert message in refusal(tmp_path).message


def test_folder_of_files_of_many_kinds_is_read_in_their_order(tmp_path: Path) -> None:
    write(tmp_path / "a.json", json.dumps({"data": ROWS[:1]}))
    write(tmp_path / "b.csv.gz", gzip.compress(csv_text(ROWS[1:2]).encode("utf-16")))
    write(tmp_path / "c.jsonl.zst", zstd(json.dumps(ROWS[2]).encode()))
    pq.write_table(pa.Table.from_pylist(ROWS[3:]), tmp_path / "d.parquet")
    assert fields_of(tmp_path) == ROWS


def test_splits_that_are_read_together_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Test rows in a downloaded data set must not become training rows unnoticed."""
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "testing.jsonl"):
        write(tmp_path / name, OK)
    fields_of(tmp_path)
    assert caplog.text == ""
    write(tmp_path / "my_test.jsonl.gz", gzip.compress(OK.encode()))
    assert len(fields_of(tmp_path)) == 4
    assert "files of several splits are read together (test, train)" in caplog.text
    assert len(fields_of(tmp_path / "*train*")) == 2


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    write(tmp_path / "data" / "x.jsonl", JSON_LINES)
    for name in ("loop", "loop-2"):
        (tmp_path / "data" / "sub" / name).symlink_to(tmp_path / "data")
    (tmp_path / "data" / "y.jsonl").symlink_to(tmp_path / "data" / "x.jsonl")
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "z.csv", csv_text())
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert fields_of(tmp_path / "data") == ROWS * 2
    assert fields_of(tmp_path / "data" / "**" / "*.jsonl") == ROWS
    assert fields_of(tmp_path / "d*" / "**" / "*.csv") == ROWS
    assert fields_of(tmp_path / "**" / "sub" / "**") == ROWS * 2
    assert "no such data file" in refusal(tmp_path / "data" / "x.jsonl" / "**" / "*.csv").message


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "x.jsonl", OK)
    assert [row.file for row in read_local(tmp_path)] == ["a/x.jsonl", "b/x.jsonl"]
    assert [row.file for row in read_local(tmp_path / "a")] == ["x.jsonl"]


def test_directory_that_a_glob_matches_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "x.jsonl", OK)
    assert "sub: is a directory" in refusal(tmp_path / "*").message


def test_field_of_a_hub_is_refused_for_a_local_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "rows").mkdir(parents=True)
    write(tmp_path / "data" / "rows" / "x.jsonl", JSON_LINES)
    monkeypatch.chdir(tmp_path)
    for field in ("name", "revision"):
        with pytest.raises(ConfigError, match=f"data/rows is a path on this disk, and {field}"):
            local_pin(DataSource(path="data/rows", **{field: "x"}))
    with pytest.raises(InputError, match="data/rows: has no splits"):
        local_pin(DataSource(path="data/rows", split="x"))


def test_long_path_is_no_such_file() -> None:
    for path in ("x" * 5000 + ".jsonl", "/etc/passwd/x.jsonl", "a\0b.jsonl", "no/such/*.jsonl"):
        assert "no such data file" in refusal(path).message


def test_file_of_a_package_is_read_without_running_its_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(fields_of("package:medjob/judge/graded.jsonl")) >= 40
    assert len(fields_of("package:medjob.judge/graded.jsonl")) >= 40
    for path in (
        "package:this/rows.jsonl",
        "package:no_such_package/rows.jsonl",
        "package:",
        "package:medjob",
    ):
        assert isinstance(refusal(path), InputError), path
    assert "points outside" in refusal("package:medjob/../pyproject.jsonl").message
    assert "points outside" in refusal("package:medjob//etc/rows.jsonl").message
    assert "Zen of Python" not in capsys.readouterr().out


# Data sets that datasets loads. A local directory replaces the hub.
def read_with_datasets(path: Path, **options: Any) -> list[RawRow]:
    source = DataSource.model_construct(path=str(path), limit=None, where={}, name=None, split=None)
    source = source.model_copy(update=options)
    return list(read(source, Location(str(path), str(path), on_hub=True)))


def test_data_set_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", JSON_LINES)
    rows = read_with_datasets(folder, split="train[:3]")
    assert [dict(row.fields) for row in rows] == ROWS[:3]
    assert [row.line for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("train.jsonl", JSON_LINES, {"split": "nope"}, "nope"),
        ("train.jsonl", JSON_LINES, {"name": "nope"}, "nope"),
        ("train.json", f'[{{"a": "{TOKEN}"}}, 3', {}, "cannot load it"),
        ("train.csv", f"a,b\n1,2\n{TOKEN},2,3,4\n", {}, "cannot load it"),
        ("train.parquet", "PAR1", {}, "datasets cannot load it"),
        ("train.unknown", "x", {}, "set"),
    ],
)  # fmt: skip
def test_data_set_that_cannot_be_loaded_is_refused(
    name: str,
    content: str,
    options: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / name, content)
    with pytest.raises(InputError) as caught:
        read_with_datasets(folder, **options)
    assert message in caught.value.message
    assert TOKEN not in str(caught.value)
