"""With run.prepare.sensitive, no text of a row is in a report, a log, a message or a record."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from medjob.artifacts.artifact import Attempt
from medjob.cli.main import main
from medjob.config.load import merge, validate
from medjob.errors import ConfigError
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.support.rows import choice_rows, reasoning_rows, safety_rows, write_jsonl
from tests.support.small_run import fetched

MARK = "Zqxjay"
"""A word that is in all texts of the rows, and nowhere else."""
DATA = {".parquet", ".jsonl", ".csv"}
"""Data of the artifacts, which hold the rows on purpose: they are read, judged or graded."""


def marked(rows: list[dict[str, Any]]) -> list[Any]:
    """The rows with the word in each text that they hold, at its beginning and its end."""

    def mark(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: mark(item) for key, item in value.items()}
        return f"{MARK} {value} {MARK}" if isinstance(value, str) and len(value) > 8 else value

    return [mark(row) for row in rows]


@pytest.fixture
def rows_of_patients(tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The small run with the word in every row, and rows of all kinds that a report would show."""
    data = tmp_path / "data"
    rows = marked(reasoning_rows(48))
    choices = marked(choice_rows(6))
    copied = {"Question": choices[0]["question"], "Response": "The answer is insulin, as told."}
    wrong: list[Any] = [
        {"Question": f"{MARK} is a number", "Response": 5},
        {"Question": {"text": MARK}, "Response": [MARK]},
        {MARK: MARK},
        MARK,
        {"Question": f"{MARK}", "Response": None},
    ]
    write_jsonl(data / "rows.jsonl", [*rows, rows[0], copied, *wrong])
    write_jsonl(data / "choices.jsonl", choices)
    write_jsonl(data / "safety.jsonl", marked(safety_rows(12)))
    tree["run"]["stages"] = ["prepare", "candidates", "judge", "evaluate"]
    tree["run"]["prepare"] |= {
        "sources": [{"path": str(data / "rows.jsonl")}],
        "max_rejected_fraction": 1,
        "near_duplicate_threshold": 0.5,
        "contamination": {"threshold": 0.5},
        "preference_rows": 8,
    }
    return tree


def publish_all(tree: dict[str, Any]) -> Pipeline:
    """Publish all stages, with candidates that give pairs."""
    pipeline = Pipeline.open(validate(tree))
    pipeline.run(get_stage("fetch"))
    pipeline.run(get_stage("prepare"))
    prompts = pq.read_table(fetched(pipeline, "prepare") / "preferences.parquet").to_pylist()
    rows = [
        {"id": prompt["id"], "candidate": number, "text": text, "tokens": 5, "truncated": False}
        for prompt in prompts
        for number, text in enumerate((prompt["reference"], "Nothing."))
    ]
    folder = Path(tree["cluster"]["workDir"]) / "made"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "candidates.parquet")
    artifact = pipeline.artifact(get_stage("candidates"))
    Attempt.begin(artifact, "test").publish(folder, {}, {}, {}, {})
    pipeline.run(get_stage("judge"))
    pipeline.run(get_stage("evaluate"))
    return pipeline


def files_with_mark(folder: Path) -> set[str]:
    """Stage and name of the files in a store that contain the word, except for data."""
    found = set()
    for file in folder.rglob("*"):
        is_data = file.suffix in DATA and file.name != "rejected.jsonl"
        if file.is_file() and not is_data and MARK in file.read_text(errors="replace"):
            found.add(f"{file.relative_to(folder).parts[1]}/{file.name}")
    return found


@pytest.mark.parametrize("sensitive", [False, True])
def test_no_row_is_shown(
    rows_of_patients: dict[str, Any],
    tmp_path: Path,
    sensitive: bool,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows_of_patients["run"]["prepare"]["sensitive"] = sensitive
    with caplog.at_level("DEBUG"):
        pipeline = publish_all(rows_of_patients)
    counts = json.loads((fetched(pipeline, "prepare") / "statistics.json").read_text())
    assert counts["rows"]["rejected"] >= 4
    assert counts["rows"]["exact_duplicates"] >= 1
    assert counts["contamination"]["rows"] >= 1
    shown = {
        "prepare/report.html",
        "prepare/statistics.json",
        "judge/report.html",
        "evaluate/report.html",
    }
    assert files_with_mark(tmp_path / "store") == (set() if sensitive else shown)
    output = capfd.readouterr()
    assert MARK not in output.out + output.err + caplog.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bad.jsonl", f'{{"Question": "{MARK}", "Response": 5}}\n{MARK}\n'),
        ("cut.jsonl", f'{{"Question": "{MARK}\n'),
        ("quote.csv", f'Question,Response\n"{MARK} why?",{MARK}\n"{MARK}\n'),
        ("wide.csv", f"Question,Response\n{MARK} why?,{MARK},{MARK}\n"),
        ("headless.csv", f"{MARK} why?,{MARK} so\n{MARK} what?,{MARK}\n"),
        ("table.parquet", f"PAR1 {MARK}"),
        ("list.json", f'[{{"Question": "{MARK}"}}, "{MARK}", '),
    ],
)
def test_messages_about_bad_data_quote_no_row(
    rows_of_patients: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    text: str,
) -> None:
    (tmp_path / "data" / name).write_text(text)
    source = {"path": str(tmp_path / "data" / name)}
    rows_of_patients["run"]["prepare"] |= {"sensitive": True, "max_rejected_fraction": 0.01}
    rows_of_patients["run"]["prepare"]["sources"] = [source]
    assert medjob(rows_of_patients, tmp_path, "run", "--until", "prepare") in (65, 66)
    output = capfd.readouterr()
    assert "error: " in output.err
    assert MARK not in output.out + output.err
    assert files_with_mark(tmp_path / "store") == set()


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_an_unexpected_exception_shows_its_type_and_place(
    rows_of_patients: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    debug: list[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError(f"the row {MARK} is odd")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter", fail)
    rows_of_patients["run"]["prepare"]["sensitive"] = True
    assert medjob(rows_of_patients, tmp_path, "prepare", *debug) == 1
    error = capfd.readouterr().err
    assert "error: unexpected KeyError in " in error
    assert ".py:" in error
    assert MARK not in error
    assert files_with_mark(tmp_path / "store") == set()
    record = next((tmp_path / "store/t/prepare").glob("*/attempts/1.json")).read_text()
    assert "KeyError in" in record


def medjob(tree: dict[str, Any], folder: Path, *arguments: str) -> int:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "-f", str(file)])
    return int(str(ended.value.code))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"export": {"hub_model_id": "org/model"}}}, "run.export.hub_model_id: org/model"),
        ({"cluster": {"reportTo": ["tensorboard", "wandb"]}}, "cluster.reportTo: wandb"),
        ({"cluster": {"reportTo": ["mlflow"]}}, "cluster.reportTo: mlflow"),
    ],
)
def test_ways_out_are_refused(tree: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    validate(merge(tree, changes))
    tree["run"]["prepare"]["sensitive"] = True
    with pytest.raises(ConfigError, match=message) as caught:
        validate(merge(tree, changes))
    assert "run.prepare.sensitive is true" in str(caught.value)
    validate(merge(tree, {"cluster": {"reportTo": ["tensorboard"]}}))
