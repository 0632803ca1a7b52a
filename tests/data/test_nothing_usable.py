"""A file without a single usable row: the hint says what is wrong with it as a whole."""

import io
import json
import subprocess
from pathlib import Path

import pytest

from medjob.config.prepare import DataSource
from medjob.data.clean import Rejections, usable_rows
from medjob.data.formats import Record
from medjob.errors import DataError
from medjob.sources.locations import locate

PARAGRAPH = {
    "context": "Aspirin thins the blood.",
    "qas": [
        {"id": "1", "question": "What thins the blood?", "answers": [{"text": "Aspirin"}]},
        {"id": "2", "question": "What is thinned?", "answers": [{"text": "the blood"}]},
    ],
}
SQUAD = {"version": "1.1", "data": [{"title": "Drugs", "paragraphs": [PARAGRAPH]}]}


def records(path: Path) -> list[Record]:
    source = DataSource(path=str(path))
    location = locate(source, {}, Path())
    return [
        record for record, _ in usable_rows(source, location, Rejections(io.StringIO()), "sources")
    ]


def refusal(path: Path, content: bytes) -> DataError:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        records(path)
    return caught.value


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("x.jsonl", b"question,answer\nWhy?,So.\nWho?,He.\n", "if it is CSV, its name must end in .csv"),
        ("x.csv", "question,answer\nWarum \u00fcbel?,So.\n".encode("cp1252"), "save the file as UTF-8, such as with `iconv"),
        ("x.json", b'["Why?", "So."]', "each row must be an object with names"),
        ("x.json", b'[["Why?", "So."]]', "each row must be an object with names"),
        ("x.csv", b"Frage,Antwort\nWarum?,So.\n", "set columns, such as {question: Frage, response: Antwort}"),
    ],
)  # fmt: skip
def test_hint_is_about_the_whole_file(name: str, content: bytes, hint: str, tmp_path: Path) -> None:
    assert hint in refusal(tmp_path / name, content).hint


@pytest.mark.parametrize("rows", [SQUAD, {"data": [PARAGRAPH]}, [PARAGRAPH]])
def test_nested_questions_are_refused_with_a_reason(rows: object, tmp_path: Path) -> None:
    error = refusal(tmp_path / "x.json", json.dumps(rows).encode())
    assert "x.json:1: the row has several questions in qas, as in SQuAD" in error.message
    assert "write one row per question" in error.hint


def test_command_that_flattens_nested_questions_works(tmp_path: Path) -> None:
    error = refusal(tmp_path / "x.json", json.dumps(SQUAD).encode())
    command = error.hint.partition("such as with: ")[2]
    try:
        subprocess.run(["jq", "--version"], check=True, capture_output=True)
    except OSError:
        pytest.skip("needs jq")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    found = records(tmp_path / "x.jsonl")
    assert [(each.context, each.question, each.response) for each in found] == [
        (PARAGRAPH["context"], "What thins the blood?", "Aspirin"),
        (PARAGRAPH["context"], "What is thinned?", "the blood"),
    ]
