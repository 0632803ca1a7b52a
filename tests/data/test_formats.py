"""Converting rows of known data sets to records, and reading files."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medjob.config.prepare import DataSource
from medjob.data.columns import Row, UnusableRow
from medjob.data.formats import convert, detect
from medjob.data.read import RawRow, read
from medjob.sources.locations import locate

Q, R = "Why?", "Because."
ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("medical_o1", {"Question": Q, "Complex_CoT": "Hm.", "Response": R}, {"question": Q, "reasoning": "Hm.", "response": R}),
    ("medical_o1", {"question": Q, "complex_cot": "Hm.", "response": R}, {"question": Q, "reasoning": "Hm.", "response": R}),
    ("medical_o1", {"QUESTION": "为什么？", "COMPLEX_COT": "嗯", "RESPONSE": "因为"}, {"question": "为什么？", "response": "因为"}),
    (
        "verifiable",
        {"Open-ended Verifiable Question": Q, "Ground-True Answer": "Zinc"},
        {"question": Q, "reference": "Zinc", "response": "Zinc"},
    ),
    ("instruction", {"instruction": Q, "response": R}, {"question": Q, "response": R}),
    ("instruction", {"instruction": Q, "input": "ctx", "output": R}, {"question": f"{Q}\n\nctx"}),
    ("instruction", {"Question": Q, "Free_form_answer": R, "Must_have": ["x"]}, {"question": Q, "response": R}),
    (
        "conversations",
        {"id": "1", "type": "Exam", "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": R}], "answer": {"content": "B"}},
        {"question": Q, "response": R},
    ),
    (
        "preference",
        {"prompt_id": "1", "label_type": "hard", "prompt": Q, "chosen": [{"role": "user", "content": Q}, {"role": "assistant", "content": "good"}],
         "rejected": [{"role": "user", "content": Q}, {"role": "assistant", "content": "bad"}]},
        {"question": Q, "chosen": "good", "rejected": "bad", "label_type": "hard"},
    ),
    ("preference", {"prompt": Q, "chosen": "good", "rejected": "bad"}, {"chosen": "good", "rejected": "bad"}),
    (
        "multiple_choice",
        {"question": Q, "options": {"A": "x", "B": "y"}, "answer_idx": "B"},
        {"kind": "multiple_choice", "answer_idx": "B", "reference": "y", "options": {"A": "x", "B": "y"}},
    ),
    (
        "multiple_choice",
        {"question": Q, "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2, "exp": None},
        {"answer_idx": "C", "reference": "y"},
    ),
    (
        "multiple_choice",
        {"QUESTION": Q, "CONTEXTS": ["one", "two"], "final_decision": "maybe", "LONG_ANSWER": "It depends."},
        {"question": Q, "context": "one\ntwo", "answer_idx": "C", "reference": "maybe", "reasoning": "It depends."},
    ),
    ("multiple_choice", {"question": Q, "options": ["x", "y"], "answer": "y"}, {"answer_idx": "B"}),
    (
        "messages",
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": Q}, {"role": "assistant", "content": R}]},
        {"question": Q, "response": R, "system": "S"},
    ),
    ("safety", {"prompt": Q, "response": "No.", "kind": "benign"}, {"kind": "benign", "response": "No."}),
    ("safety", {"prompt": Q, "safe_response": "No.", "ama_principle": 1}, {"kind": "harmful", "response": "No."}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "row", "expected"), ROWS, ids=[f"{row[0]}-{i}" for i, row in enumerate(ROWS)]
)
def test_format_is_detected_by_its_columns(
    name: str, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    columns = Row(row)
    found = detect(columns)
    assert found == name
    record = convert(columns, found, lambda column: 0)
    for field, value in expected.items():
        assert getattr(record, field) == value, field


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "multiple_choice",
            {"question": Q, "options": {"A": "x"}, "answer_idx": "A"},
            "options are missing",
        ),
        (
            "multiple_choice",
            {"question": Q, "options": {"A": "x", "B": "y"}, "answer_idx": "E"},
            "answer_idx is not one of the options",
        ),
        (
            "multiple_choice",
            {"question": Q, "options": "[1,", "answer_idx": "A"},
            "options cannot be parsed",
        ),
        ("conversations", {"conversations": "text"}, "not a list of turns"),
        (
            "conversations",
            {"conversations": [{"from": "gpt", "value": R}]},
            "does not begin with a question",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": Q}]},
            "messages has no answer",
        ),
        (
            "safety",
            {"prompt": Q, "response": R, "kind": "odd"},
            "kind is neither harmful nor benign",
        ),
        ("instruction", {"instruction": Q, "response": None}, "response is null"),
    ],
)
def test_unusable_row_has_a_reason(name: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UnusableRow, match=message):
        convert(Row(row), name, lambda column: 0)


def read_local(path: Path, **options: Any) -> list[RawRow]:
    source = DataSource(path=str(path), **options)
    return list(read(source, locate(source, {}, Path())))


def test_all_file_types_read_the_same(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}, «ü»", "response": "r"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text(
        "\ufeff" + "\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8"
    )
    (tmp_path / "b.json").write_text(json.dumps(rows))
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["question", "response"])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet"):
        assert [dict(row.fields) for row in read_local(tmp_path / name)] == rows, name
    assert len(read_local(tmp_path)) == 20
    assert len(read_local(tmp_path / "*.json*", limit=7)) == 7
    assert len(read_local(tmp_path / "a.jsonl", where={"question": ["q1", "q3"]})) == 2


def test_json_map_gives_rows_with_its_keys_as_ids(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(
        json.dumps({"123": {"QUESTION": Q, "CONTEXTS": ["c"], "final_decision": "yes"}})
    )
    (row,) = read_local(tmp_path / "p.json")
    assert row.fields["id"] == "123"


def test_invalid_byte_in_a_csv_rejects_one_row(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"question,response\nfine,yes\nbad \xff,yes\nfine too,yes\n")
    first, bad, last = read_local(tmp_path / "x.csv")
    assert [Row(row.fields).text("question") for row in (first, last)] == ["fine", "fine too"]
    assert bad.problem == "not UTF-8 (column 1)"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a\n", "wrong number of columns: 1, but the header has 3"),
        ("a,b,c,d,e\n", "wrong number of columns: 5, but the header has 3"),
    ],
)
def test_csv_row_of_another_width_is_rejected(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "x.csv").write_text(f"id,question,response\n1,Why?,So.\n{line}")
    good, bad = read_local(tmp_path / "x.csv")
    assert good.problem == ""
    assert dict(good.fields) == {"id": "1", "question": "Why?", "response": "So."}
    assert (bad.problem, bad.line, dict(bad.fields)) == (problem, 3, {})
