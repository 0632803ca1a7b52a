"""`medjob judge --calibrate`: exit codes, files and messages, with real judges."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.cli.main import main
from tests.support.rows import write_jsonl

Run = Callable[..., int]
WORDS = ("zinc", "rest", "fluids", "warmth", "sleep", "walking", "iodine", "honey")


@pytest.fixture
def calibrate(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command on a run file with changes to `run.judge`, and return its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(grades: str, *arguments: str, **judge: Any) -> int:
        tree["run"]["judge"] = {"kind": "overlap", **judge}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
        with pytest.raises(SystemExit) as ended:
            main(["judge", "-f", "run.yaml", "--calibrate", grades, *arguments])
        return int(ended.value.code or 0)

    return run


def overlap_rows(count: int, right: int) -> list[dict[str, str]]:
    """Rows on which the overlap with the reference is right in the first `right`. The answers are
    equally long."""
    rows = []
    for n in range(count):
        said, other = f"take {WORDS[n % 8]} {n:03}", f"give {WORDS[-1 - n % 8]} {n + 500:03}"
        said, other = said.ljust(20, "."), other.ljust(20, ".")
        better, worse = (said, other) if n < right else (other, said)
        rows.append({"question": f"What helps in case {n}?", "reference": f"take {WORDS[n % 8]} {n:03}", "better": better, "worse": worse})  # fmt: skip
    return rows


def test_report_is_written_and_a_judge_that_is_not_calibrated_exits_with_67(
    calibrate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The overlap cannot beat the rule that is the overlap."""
    write_jsonl(tmp_path / "grades.jsonl", overlap_rows(40, right=30))
    assert calibrate("grades.jsonl") == 67
    assert "agrees with 75% of 40 graded rows" in capsys.readouterr().err
    folder = tmp_path / "calibration-report"
    found = json.loads((folder / "calibration.json").read_text())
    assert found["passed"] is False
    (judge,) = found["judges"]
    assert (judge["judge"], judge["rows"], judge["agreement"]) == ("overlap", 40, 0.75)
    assert len(judge["examples"]) == 6
    assert all(each["better_score"] < each["worse_score"] for each in judge["examples"])
    assert [rule["name"] for rule in found["rules"]] == [
        "the longer answer",
        "more words of the reference",
    ]
    page = (folder / "report.html").read_text()
    assert "What helps in case 3" in page
    assert "not calibrated" in page
    assert not list(tmp_path.glob("store"))  # nothing is published


def test_labelled_criteria_are_compared_and_a_calibrated_judge_exits_with_0(
    calibrate: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The overlap calls a criterion met if the answer repeats it, which half of the words in the
    answer do not show."""
    rows = [
        {
            "question": f"q {n}",
            "answer": f"rest and take zinc {n}"
            if n % 2
            else f"rest, zinc, {'and other words ' * 8}",
            "criterion": f"rest and take zinc {n}",
            "met": bool(n % 2),
        }
        for n in range(40)
    ]
    write_jsonl(tmp_path / "labels.jsonl", rows)
    assert calibrate("labels.jsonl", "--output", "out") == 0
    assert "right about 100% of 40 criteria" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/calibration.json").read_text())
    assert found["passed"] is True
    assert found["criteria"][0]["kappa"] == 1


def test_dry_run_counts_the_questions_and_loads_no_model(
    calibrate: Run, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "grades.jsonl", overlap_rows(40, right=30))
    judge = {"kind": "model", "model": str(tiny), "aspects": {"accuracy": 1}}
    assert calibrate("grades.jsonl", "--dry-run", **judge) == 0
    # Two answers per row, two additions in 24 rows, and both orders.
    assert f"{tiny}: {40 * 2 + 24 * 2 + 40 * 2} questions" in capsys.readouterr().out
    assert not (tmp_path / "calibration-report").exists()
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_model_judges_are_compared_each_by_itself_and_continue_after_a_stop(
    calibrate: Run, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.tiny_model import make_tiny_model

    other = make_tiny_model(tmp_path / "other", hidden=64)
    write_jsonl(tmp_path / "grades.jsonl", overlap_rows(12, right=6))
    judges = {"kind": "model", "model": str(tiny), "extra_models": [str(other)]}
    assert calibrate("grades.jsonl", **judges) == 67
    first = (tmp_path / "calibration-report/calibration.json").read_text()
    found = json.loads(first)["judges"]
    assert [each["judge"] for each in found] == [str(tiny), str(other)]
    assert (
        found[0]["agreement"] != found[1]["agreement"]
        or found[0]["examples"] != found[1]["examples"]
    )
    assert all(each["order_flip_rate"] is not None for each in found)

    def fail(*_: Any) -> None:
        raise AssertionError("all replies are kept, so no weights are needed")

    monkeypatch.setattr("medjob.judge.load.load_model", fail)
    assert calibrate("grades.jsonl", **judges) == 67
    assert (tmp_path / "calibration-report/calibration.json").read_text() == first


@pytest.mark.parametrize(
    ("file", "text", "arguments", "code", "message"),
    [
        ("missing.csv", None, [], 66, "missing.csv does not exist"),
        ("empty.jsonl", "", [], 66, "has no rows"),
        ("few.jsonl", '{"question": "q", "reference": "r", "better": "b", "worse": "w"}\n', [], 65, "too few"),
        ("broken.jsonl", "{\n" * 12, [], 65, "broken.jsonl: not valid JSON"),
        ("notes.txt", "text", [], 66, "notes.txt"),
        ("grades.jsonl", "GOOD", ["--output", "run.yaml"], 64, "--output: run.yaml is a file"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    calibrate: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    text: str | None,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    if text == "GOOD":
        write_jsonl(tmp_path / file, overlap_rows(12, right=6))
    elif text is not None:
        (tmp_path / file).write_text(text)
    assert calibrate(file, *arguments) == code
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_options_of_calibrate_need_it(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    for option in (["--output", "x"], ["--dry-run"]):
        with pytest.raises(SystemExit) as ended:
            main(["judge", "-f", str(tmp_path / "run.yaml"), *option])
        assert ended.value.code == 64
        assert "--calibrate" in capsys.readouterr().err
