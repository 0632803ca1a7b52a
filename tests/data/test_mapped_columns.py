"""`columns` of a source: any file can be used without rewriting it."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medjob.config.load import validate
from medjob.config.prepare import DataSource
from medjob.data.clean import Rejections, Role, usable_rows
from medjob.data.formats import Record
from medjob.errors import ConfigError, DataError
from medjob.sources.locations import Location, locate

GERMAN = [
    {"Nr": str(n), "Frage": f"Was hilft gegen Husten Nummer {n}?", "Antwort": f"Tee Nummer {n}."}
    for n in range(3)
]
TWO = {"question": "Frage", "response": "Antwort"}


def records(path: Path, role: Role = "sources", rejected: int = 0, **options: Any) -> list[Record]:
    source = DataSource(path=str(path), **options)
    rejections = Rejections(io.StringIO())
    found = [
        record for record, _ in usable_rows(source, locate(source, {}, Path()), rejections, role)
    ]
    assert rejections.rows == rejected, rejections.first
    return found


def record(tmp_path: Path, row: dict[str, Any], columns: dict[str, str], **options: Any) -> Record:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([row]))
    return records(path, columns=columns, **options)[0]


def refusal(path: Path, columns: dict[str, str], **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        records(path, columns=columns, **options)
    return caught.value


def csv_of(rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "x.arrow"])
def test_columns_of_any_name_are_read_from_any_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "x.csv":
        path.write_text(csv_of(GERMAN))
    elif name == "x.parquet":
        pq.write_table(pa.Table.from_pylist(GERMAN), path)
    elif name == "x.arrow":
        table = pa.Table.from_pylist(GERMAN)
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        lines = [json.dumps(row) for row in GERMAN]
        path.write_text("\n".join(lines) if name == "x.jsonl" else f"[{', '.join(lines)}]")
    found = records(path, columns=TWO)
    assert [(each.question, each.response) for each in found] == [
        (row["Frage"], row["Antwort"]) for row in GERMAN
    ]


def test_columns_of_a_hub_data_set_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GERMAN))
    source = DataSource(path=str(folder), columns=TWO)
    location = Location(str(folder), str(folder), on_hub=True)
    found = list(usable_rows(source, location, Rejections(io.StringIO()), "sources"))
    assert [each.response for each, _ in found] == [row["Antwort"] for row in GERMAN]


PAIR = {"frage": "Is rest enough?", "gut": "Often.", "schlecht": "Never."}
CHOICE = {"frage": "Which organ?", "a": "liver", "b": "spleen", "c": "heart", "lsg": "B"}
THOUGHT = {"frage": "Why rest?", "gedanken": "Rest heals.", "antwort": "It heals."}
FORMATS: dict[str, tuple[Role, dict[str, Any], dict[str, str], dict[str, Any]]] = {
    "instruction": (
        "sources",
        {"aufgabe": "Answer briefly.", "eingabe": "Why rest?", "antwort": "It heals."},
        {"instruction": "aufgabe", "input": "eingabe", "response": "antwort"},
        {"question": "Answer briefly.\n\nWhy rest?", "response": "It heals."},
    ),
    "medical_o1": (
        "sources",
        THOUGHT,
        {"question": "frage", "reasoning": "gedanken", "response": "antwort"},
        {"reasoning": "Rest heals.", "response": "It heals."},
    ),
    "verifiable": (
        "evaluation",
        {"frage": "Why rest?", "wahr": "It heals."},
        {"question": "frage", "reference": "wahr"},
        {"reference": "It heals."},
    ),
    "conversations": (
        "sources",
        {"verlauf": [{"from": "human", "value": "Why rest?"}, {"from": "gpt", "value": "To heal."}]},
        {"messages": "verlauf"},
        {"question": "Why rest?", "response": "To heal."},
    ),
    "messages": (
        "sources",
        {
            "verlauf": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
            "rolle": "You are a nurse.",
        },
        {"messages": "verlauf", "system": "rolle"},
        {"question": "Why?", "response": "So.", "system": "You are a nurse."},
    ),
    "preference": (
        "preference",
        PAIR,
        {"question": "frage", "chosen": "gut", "rejected": "schlecht"},
        {"question": "Is rest enough?", "chosen": "Often.", "rejected": "Never."},
    ),
    "multiple_choice": (
        "sources",
        CHOICE,
        {"question": "frage", "option_a": "a", "option_b": "b", "option_c": "c", "answer": "lsg"},
        {"answer_idx": "B", "options": {"A": "liver", "B": "spleen", "C": "heart"}},
    ),
    "safety": (
        "safety",
        {"bitte": "Do harm.", "antwort": "No.", "art": "harmful"},
        {"question": "bitte", "response": "antwort", "kind": "art"},
        {"response": "No.", "kind": "harmful"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("detected", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_columns_work_with_every_format(name: str, detected: bool, tmp_path: Path) -> None:
    role, row, columns, expected = FORMATS[name]
    options = {} if detected else {"format": name}
    found = record(tmp_path, row, columns, role=role, **options)
    assert {key: getattr(found, key) for key in expected} == expected


IGNORED: list[tuple[dict[str, Any], dict[str, str], dict[str, Any]]] = [
    # An unmapped column of the same field would reject the row, or be read in place of it.
    ({"Frage": "q?", "question": "other?", "response": "a"}, {"question": "Frage"}, {"question": "q?"}),
    ({"input": "q?", "instruction": "Be nice.", "output": "a"}, {"question": "input"}, {"question": "q?"}),
    ({"question": "q?", "output": "bad", "reply": "worse", "gold": "a"}, {"response": "gold"}, {"response": "a"}),
    ({"question": "q?", "response": "a", "cot": "It is not.", "why": "It is."}, {"reasoning": "why"}, {"reasoning": "It is."}),
    ({"question": "q?", "response": "a", "text": "no", "abstract": "no", "p": "yes"}, {"context": "p"}, {"context": "yes"}),
    ({"question": "q?", "response": "a", "system_prompt": "no", "s": "yes"}, {"system": "s"}, {"system": "yes"}),
    ({"question": "q?", "opa": "x", "opb": "y", "o": ["v", "w"], "answer": "w"}, {"options": "o"}, {"answer_idx": "B"}),
    ({"question": "q?", "A": "x", "B": "y", "l": "v", "r": "w", "answer": "w"}, {"option_a": "l", "option_b": "r"}, {"answer_idx": "B"}),
    ({"question": "q?", "options": ["v", "w"], "cop": 1, "answer": "v", "k": "B"}, {"answer": "k"}, {"answer_idx": "B"}),
    # A mapped column has no second meaning.
    ({"question": "q?", "answer": "long", "context": "c"}, {"response": "answer"}, {"response": "long", "reference": ""}),
    ({"q": "q?", "context": "the reasons", "response": "a"}, {"question": "q", "reasoning": "context"}, {"reasoning": "the reasons", "context": ""}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "columns", "expected"), IGNORED, ids=range(len(IGNORED)))
def test_mapped_column_replaces_the_recognised_ones(
    row: dict[str, Any], columns: dict[str, str], expected: dict[str, Any], tmp_path: Path
) -> None:
    found = record(tmp_path, row, columns)
    assert {key: getattr(found, key) for key in expected} == expected


def test_verdict_on_an_answer_is_never_ignored(tmp_path: Path) -> None:
    rows = [{"q": "Is it?", "a": f"Yes {n}.", "correct": n > 0} for n in range(3)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    found = records(tmp_path / "x.json", columns={"question": "q", "answer": "a"}, rejected=1)
    assert [each.response for each in found] == ["Yes 1.", "Yes 2."]


@pytest.mark.parametrize(
    ("row", "path"),
    [
        ({"q": "q?", "output": {"text": "a", "score": 1}}, "output.text"),
        ({"q": "q?", "choices": [{"message": {"content": "a"}}]}, "choices.0.message.content"),
        ({"q": "q?", "output.text": "a", "output": {"text": "b"}}, "output.text"),
        ({"data": {"q": "q?", "output": "a"}}, "data.output"),
        ({"data": {"q": "q?", "output": {"text": "a"}}}, "output.text"),
    ],
)
def test_path_leads_into_nested_columns(row: dict[str, Any], path: str, tmp_path: Path) -> None:
    found = record(tmp_path, row, {"question": "q", "response": path})
    assert (found.question, found.response) == ("q?", "a")


def test_where_uses_the_names_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(csv_of(GERMAN))
    found = records(tmp_path / "x.csv", columns=TWO, where={"Frage": ["Was"], "Nr": ["1"]})
    assert [each.response for each in found] == ["Tee Nummer 1."]


def test_index_base_is_decided_over_the_mapped_column(tmp_path: Path) -> None:
    rows = [{"q": f"Organ {n}?", "o": ["liver", "spleen"], "loesung": n} for n in (1, 0)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    columns = {"question": "q", "options": "o", "answer": "loesung"}
    found = records(tmp_path / "x.json", columns=columns, limit=1)
    assert found[0].answer_idx == "B"


def test_row_without_the_column_is_rejected_and_not_read_otherwise(tmp_path: Path) -> None:
    rows = [{"question": "q?", "gold": "a"}, {"question": "r?", "response": "b"}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    found = records(tmp_path / "x.json", columns={"response": "gold"}, rejected=1)
    assert [each.response for each in found] == ["a"]


def test_column_that_no_row_has_is_refused_with_the_names(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GERMAN))
    error = refusal(tmp_path / "x.jsonl", {"question": "Frage", "response": "Antwrt"})
    assert error.message == (
        f"{tmp_path}/x.jsonl: columns names the column 'Antwrt' (response), which none of the 3 "
        "rows has"
    )
    assert error.hint == "the columns are: Nr, Frage, Antwort"
    # The file is wrong for a reason of its own if none of its rows can be read.
    (tmp_path / "x.jsonl").write_text("no JSON\n")
    assert "none of the 1 rows can be used" in refusal(tmp_path / "x.jsonl", TWO).message
    # A column after the rows that are used does not count.
    (tmp_path / "x.jsonl").write_text('{"question": "q?", "response": "a"}\n{"why": "so"}\n')
    assert (
        "'why' (reasoning)" in refusal(tmp_path / "x.jsonl", {"reasoning": "why"}, limit=1).message
    )


def test_rows_of_a_csv_file_without_a_header_are_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("Roe-7351 has a cough,rest\nDoe has none,work\n")
    error = refusal(path, TWO)
    assert "Roe" not in str(error)
    assert "which has 2 columns; its first line must contain their names" in error.hint
    path.write_text(csv_of(GERMAN))
    assert "did you mean 'Antwort'?" in refusal(path, {"question": "F", "response": "Antwrt"}).hint
    assert refusal(path, TWO | {"reasoning": "Grund"}).hint == "the columns are: Nr, Frage, Antwort"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("{respons: A}", "columns: unknown field 'respons'; did you mean response?"),
        ("{Frage: question}", "columns: unknown field 'Frage'; a key is the field, and its value the column: write question: Frage"),
        ("{zzz: A}", "columns: unknown field 'zzz'; known: question, instruction, input,"),
        ("{question: ''}", "columns.question: must have at least 1 character"),
        ("{question: [a]}", "columns.question: must be a valid string"),
        ("[question]", "columns: must be a map"),
        ("{option_a: A}", "columns: options must be at least option_a and option_b, without gaps (got option_a)"),
        ("{option_a: A, option_c: C}", "columns: options must be at least option_a and option_b, without gaps (got option_a, option_c)"),
        ("{options: O, option_a: A, option_b: B}", "columns: options and option_a cannot both be set"),
    ],
)  # fmt: skip
def test_wrong_map_is_refused_with_its_key(columns: str, message: str) -> None:
    import yaml

    source = {"path": "x.jsonl", "columns": yaml.safe_load(columns)}
    run = {"name": "a", "base_model": "./m", "prepare": {"sources": [source]}}
    with pytest.raises(ConfigError) as caught:
        validate({"run": run})
    assert f"run.prepare.sources.0.{message}" in caught.value.message


def test_calibration_rows_have_their_own_columns() -> None:
    run: dict[str, Any] = {
        "name": "a",
        "base_model": "./m",
        "prepare": {"sources": [{"path": "x.csv"}]},
    }
    run["judge"] = {"calibration": {"path": "x.csv", "columns": {"question": "Frage"}}}
    with pytest.raises(ConfigError, match=r"run\.judge\.calibration\.columns: cannot"):
        validate({"run": run})
