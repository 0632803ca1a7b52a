"""`medjob preview`: the rows, marks and counts that it prints."""

import gzip
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import medjob.data.read_json as read_json
from medjob.cli.main import main
from medjob.config import RunFile
from medjob.pipeline.preview import preview
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from medjob.stages.sft import load_rows
from tests.support.rows import choice_rows, reasoning_rows, write_jsonl
from tests.support.small_run import fetched

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command on `tree`: its exit code, what it printed, and its errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        with pytest.raises(SystemExit) as ended:
            main(["preview", "-f", str(path), *arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.mark.parametrize("cut", [False, True])
def test_marked_tokens_are_the_labels_of_the_training(
    make_run_file: Callable[..., RunFile], cut: bool
) -> None:
    changes: dict[str, Any] = {"run": {"prompt": {"style": "tags"}}}
    if cut:
        changes["run"]["sft"] = {"max_length": 130, "overlong": "truncate"}
    run_file = make_run_file(changes)
    shown = {
        "".join(span.text for span in row.spans): "".join(s.text for s in row.spans if s.trained)
        for row in preview(run_file, 48)[0].rows
    }
    pipeline = Pipeline.open(run_file)
    for name in ("fetch", "prepare"):
        pipeline.run(get_stage(name))
    path = fetched(pipeline, "prepare") / "train.parquet"
    from transformers import AutoTokenizer

    decode = AutoTokenizer.from_pretrained(str(run_file.run.base_model)).decode
    whole = [row for row in pq.read_table(path).to_pylist() if row["source"] == "rows.jsonl"]
    trained, dropped = load_rows(path, run_file.run.sft)
    assert (len(whole) > 10, dropped) == (True, 0)
    for row, labelled in zip(whole, trained, strict=False):
        labels = [label for label in labelled["labels"] if label != -100]
        assert shown[row["prompt"] + row["completion"]] == decode(labels)
        assert cut == (decode(labels) != row["completion"].rstrip("\n"))


@pytest.mark.parametrize("turns", ["all", "last"])
def test_answers_of_dialogues_are_marked(
    tree: dict[str, Any], tmp_path: Path, call: Call, turns: str
) -> None:
    texts = ["Does it hurt?", "It does.", "Since when?", "Since May."]
    turn = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    write_jsonl(tmp_path / "data/rows.jsonl", [{"messages": turn}])
    tree["run"]["sft"]["assistant_turns"] = turns
    tree["run"]["prepare"]["safety"] = None
    code, output, _ = call("--rows", "1")
    assert code == 0
    output = output.split("== run.prepare.")[1]
    assert "[[Since May.<|im_end|>]]" in output
    assert ("[[It does.<|im_end|>]]" in output) == (turns == "all")
    words = "2 answers" if turns == "all" else "answer"
    assert len(re.findall(rf"context \d+ \+ {words} \d+ = \d+ tokens", output)) == 1


def test_only_a_sample_of_a_big_file_is_read(
    tree: dict[str, Any], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "data/rows.jsonl", reasoning_rows(50_000))
    tree["run"]["prepare"] = {"sources": [{"path": str(tmp_path / "data/rows.jsonl")}]}
    read = []
    check = read_json.checked_row
    monkeypatch.setattr(read_json, "checked_row", lambda *row: read.append(row) or check(*row))
    code, output, _ = call("--rows", "1")
    assert (code, len(read)) == (0, 1000)
    assert "at most the first 1,000 rows of each source" in output
    assert "1,000 read, there may be more; 1,000 usable" in output


def test_index_bases_are_decided_without_reading_all_of_a_file(
    tree: dict[str, Any], tmp_path: Path, call: Call
) -> None:
    """The end of the file is cut off, which reading it to the end would report."""
    rows = [
        {"question": f"Item {n}?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": n % 4}
        for n in range(40_000)
    ]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(packed[:-2000])
    tree["run"]["prepare"] = {"sources": [{"path": str(tmp_path / "rows.jsonl.gz")}]}
    code, output, errors = call("--rows", "1")
    assert (code, errors) == (0, "")
    assert "The answer is A." in output


def test_every_role_is_shown_as_it_is_used(
    tree: dict[str, Any], tmp_path: Path, call: Call
) -> None:
    pair = {"prompt": "Is rest enough?", "chosen": "Often.", "rejected": "Never."}
    write_jsonl(tmp_path / "data/pairs.jsonl", [pair])
    tree["run"]["prepare"]["preference_sources"] = [{"path": str(tmp_path / "data/pairs.jsonl")}]
    code, output, _ = call("--rows", "1")
    assert code == 0
    parts = output.split("== run.prepare.")[1:]
    training, safety, preference, evaluation = parts
    assert training.startswith("sources.0")
    assert "[[Likely cause number 0; see a doctor.<|im_end|>]]" in training
    assert safety.startswith("safety.sources.0")
    assert "[[" in safety
    assert preference.startswith("preference_sources.0")
    assert "-- chosen: Often." in preference
    assert "-- rejected: Never." in preference
    assert evaluation.startswith("evaluation_sources.0")
    assert "\nB. aspirin\n" in evaluation
    assert "-- right option: A" in evaluation
    assert "[[" not in preference + evaluation
    prompt, answer, total = re.findall(r"context (\d+) \+ answer (\d+) = (\d+)", training)[0]
    assert int(prompt) + int(answer) == int(total) > 40


def test_rejected_repeated_and_copied_rows_are_counted(
    tree: dict[str, Any], tmp_path: Path, call: Call
) -> None:
    question = "Which single drug should be given first to a child with severe croup at night?"
    write_jsonl(tmp_path / "data/choices.jsonl", [choice_rows(1)[0] | {"question": question}])
    rows: list[Any] = reasoning_rows(20)
    copied = {"Question": question, "Complex_CoT": "Think.", "Response": "insulin"}
    secret = {"Question": "SECRET of the patient", "Response": ""}
    path = write_jsonl(tmp_path / "data/rows.jsonl", [*rows, rows[3], copied, secret])
    with path.open("a") as file:
        file.write('{"Question": "SECRET\n')
    code, output, errors = call("--rows", "30")
    assert code == 0
    assert "24 read; 22 usable, 2 rejected" in output
    assert "1 x response is empty: rows.jsonl:23" in output
    assert "1 x not valid JSON: rows.jsonl:24" in output
    assert "prepare stops above run.prepare.max_rejected_fraction (0.01)" in output
    assert "1 exact, 0 near: rows.jsonl:21 repeats rows.jsonl:4" in output
    assert "1 of rows in evaluation_sources: rows.jsonl:22" in output
    assert "SECRET" not in output + errors


def test_nothing_is_written(tree: dict[str, Any], tmp_path: Path, call: Call) -> None:
    (tmp_path / "run.yaml").touch()
    before = sorted(tmp_path.rglob("*"))
    assert call()[0] == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_trained_tokens_are_in_colour_on_a_terminal(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_terminal(monkeypatch)
    _, output, _ = call("--rows", "1")
    assert "\x1b[32mLikely cause number 0; see a doctor.<|im_end|>\x1b[0m" in output
    assert "[[" not in output
    monkeypatch.setenv("NO_COLOR", "1")
    _, output, _ = call("--rows", "1")
    assert "\x1b" not in output
    assert "between [[ and ]]" in output


def test_control_characters_of_rows_do_not_reach_the_terminal(
    tree: dict[str, Any], tmp_path: Path, call: Call
) -> None:
    row = {"instruction": "Clear\x1b[2J the\u202e screen", "response": "No,\u3000thanks"}
    write_jsonl(tmp_path / "data/rows.jsonl", [row])
    _, output, _ = call("--rows", "1")
    assert r"Clear\x1b[2J the\u202e screen" in output
    assert "No,\u3000thanks" in output


def test_overlong_rows_are_not_marked_as_trained(tree: dict[str, Any], call: Call) -> None:
    tree["run"]["prepare"].pop("safety")
    tree["run"]["sft"]["max_length"] = 60
    _, output, _ = call("--rows", "1")
    assert "48 rows over run.sft.max_length (60) are left out" in output
    assert "over run.sft.max_length (60): left out, not trained --" in output
    assert "[[L" not in output


@pytest.mark.parametrize(
    ("key", "value", "code", "message"),
    [
        (
            "sources",
            [{"path": "nowhere.jsonl"}],
            66,
            "run.prepare.sources.0: nowhere.jsonl: no such",
        ),
        (
            "sources",
            [{"path": "empty.jsonl"}],
            66,
            "run.prepare.sources.0: empty.jsonl: has no rows",
        ),
        ("sources", [{"path": "odd.jsonl"}], 65, "run.prepare.sources.0: odd.jsonl: none of the 1"),
    ],
)
def test_mistakes_name_the_key_and_the_file(
    tree: dict[str, Any],
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    value: Any,
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    write_jsonl(tmp_path / "odd.jsonl", [{"colour": "red"}])
    tree["run"]["prepare"][key] = value
    found, _, errors = call()
    assert found == code
    assert f"error: {message}" in errors
    assert "hint: " in errors
    assert "Traceback" not in errors


def test_a_missing_tokenizer_and_a_wrong_number_are_refused(
    tree: dict[str, Any], tmp_path: Path, call: Call
) -> None:
    assert call("--rows", "-1")[0] == 64
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    tree["run"]["base_model"] = str(model)
    code, _, errors = call()
    assert code == 66
    assert f"error: run.base_model: {model}" in errors


def test_rows_that_where_selects_are_searched_for(
    tree: dict[str, Any], tmp_path: Path, call: Call
) -> None:
    """A file that is sorted can have all of them at its end, which is no error of the user."""
    rows = [
        {"kind": "a" if n < 12_000 else "b", **row} for n, row in enumerate(reasoning_rows(12_100))
    ]
    path = write_jsonl(tmp_path / "sorted.jsonl", rows)
    tree["run"]["prepare"] = {"sources": [{"path": str(path), "where": {"kind": ["b"]}}]}
    code, output, _ = call()
    assert code == 0
    assert "0 read that match where, of at most 10,000 searched" in output


def test_mapped_columns_are_shown_with_their_rows(
    tree: dict[str, Any], tmp_path: Path, call: Call
) -> None:
    rows = [{"Frage": f"Was hilft bei Fall {n * 7}?", "Antwort": f"Tee {n}."} for n in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"Frage": "Und dann?"}])
    columns = {"question": "Frage", "response": "Antwort"}
    tree["run"]["prepare"] = {"sources": [{"path": str(path), "columns": columns}]}
    code, output, _ = call("--rows", "1")
    assert code == 0
    assert "columns     question is 'Frage', in 5 of 5 rows" in output
    assert "columns     response is 'Antwort', in 4 of 5 rows" in output
    assert "Was hilft bei Fall 0?" in output
    assert "[[Tee 0." in output
    assert "1 x the columns match no known format: rows.jsonl:5" in output


def test_wrong_column_of_a_sample_is_refused_or_warned_of(
    tree: dict[str, Any], tmp_path: Path, call: Call
) -> None:
    """A column that only adds to rows can follow after the sample."""
    path = tmp_path / "data/rows.jsonl"
    columns = {"question": "Question", "response": "Response", "reasoning": "Why"}
    tree["run"]["prepare"] = {"sources": [{"path": str(path), "columns": columns}]}
    code, output, _ = call("--rows", "0")
    assert code == 0
    assert "columns     reasoning is 'Why', in 0 of 48 rows" in output
    assert "warning     no row of this sample has the column of reasoning" in output
    columns["question"] = "Qestion"
    code, _, errors = call("--rows", "0")
    assert code == 65
    assert "run.prepare.sources.0" in errors
    assert "columns names the columns 'Qestion' (question) and 'Why' (reasoning)" in errors
    assert "hint: the columns are: Question, Complex_CoT, Response" in errors


def test_weight_is_shown_as_a_share(tree: dict[str, Any], tmp_path: Path, call: Call) -> None:
    paths = [write_jsonl(tmp_path / name, reasoning_rows(2)) for name in ("a.jsonl", "b.jsonl")]
    sources = [{"path": str(path), "weight": n} for path, n in zip(paths, (3, 1), strict=True)]
    tree["run"]["prepare"] = {"sources": sources}
    _, output, _ = call("--rows", "0")
    assert "weight      3: 75.0% of the training rows" in output
    assert "weight      1: 25.0% of the training rows" in output
