"""The prepare stage: the rows that it writes, removes and counts."""

import html
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from medjob.config import RunFile
from medjob.errors import DataError
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.support.rows import choice_rows, reasoning_rows, write_jsonl
from tests.support.small_run import fetched


def prepare(run_file: RunFile) -> tuple[Path, dict[str, Any]]:
    pipeline = Pipeline.open(run_file)
    pipeline.run(get_stage("fetch"))
    pipeline.run(get_stage("prepare"))
    folder = fetched(pipeline, "prepare")
    return folder, json.loads((folder / "statistics.json").read_text())


def ids(folder: Path, name: str) -> list[str]:
    return list(pq.read_table(folder / f"{name}.parquet")["id"].to_pylist())


def test_every_row_is_in_one_split(make_run_file: Callable[..., RunFile]) -> None:
    folder, statistics = prepare(make_run_file())
    parts = {
        name: ids(folder, name) for name in ("train", "validation", "preferences", "evaluation")
    }
    assert (len(parts["validation"]), len(parts["preferences"]), len(parts["evaluation"])) == (
        4,
        16,
        4 + 6 + 4,
    )
    assert len(parts["train"]) == 48 - 4 - 4 - 16 + statistics["rows"]["safety_in_train"]
    everything = [row for rows in parts.values() for row in rows]
    assert len(everything) == len(set(everything))
    assert statistics["tokens"]["rows"] == len(parts["train"])
    assert statistics["tokens"]["tokens"] == sum(
        len(row) for row in pq.read_table(folder / "train.parquet")["input_ids"].to_pylist()
    )
    assert "<svg" in (folder / "report.html").read_text()


def test_duplicates_and_copied_evaluation_rows_are_removed(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    rows = reasoning_rows(48)
    choice = choice_rows(1)[0] | {
        "question": "Which single drug should be given first to a child with a severe attack of croup at night?"
    }
    write_jsonl(tmp_path / "data/choices.jsonl", [choice])
    copied = {"Question": choice["question"], "Complex_CoT": "Think.", "Response": "insulin"}
    write_jsonl(tmp_path / "data/rows.jsonl", [*rows, rows[3], copied])
    folder, statistics = prepare(make_run_file())
    assert statistics["rows"]["exact_duplicates"] == 1
    assert statistics["rows"]["contaminated"] == 1
    assert statistics["contamination"]["examples"][0]["evaluation"] == choice["question"]
    train = pq.read_table(folder / "train.parquet")["question"].to_pylist()
    assert choice["question"] not in train
    assert choice["question"] in (folder / "report.html").read_text()


def test_preference_sources_exclude_training_questions(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    rows = reasoning_rows(60)
    own = [
        {"prompt": row["Question"], "chosen": "good", "rejected": "bad", "label_type": "hard"}
        for row in rows[40:]
    ]
    write_jsonl(tmp_path / "data/preference.jsonl", own)
    run_file = make_run_file(
        {
            "run": {
                "prepare": {
                    "preference_sources": [{"path": str(tmp_path / "data/preference.jsonl")}],
                    "preference_rows": 10,
                }
            }
        }
    )
    folder, statistics = prepare(run_file)
    table = pq.read_table(folder / "preferences.parquet").to_pylist()
    assert len(table) == 10
    assert table[0]["label_type"] == "hard"
    assert statistics["rows"]["preferences_also_in_training"] > 0
    assert not set(ids(folder, "train")) & {row["id"] for row in table}


def test_rows_name_their_source_and_have_the_style(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    folder, statistics = prepare(
        make_run_file({"run": {"prompt": {"style": "tags", "system": "Be brief."}}})
    )
    assert set(statistics["tokens"]["sources"]) == {"rows.jsonl", "safety.jsonl"}
    row = next(
        row
        for row in pq.read_table(folder / "train.parquet").to_pylist()
        if row["source"] == "rows.jsonl"
    )
    assert row["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert row["completion"].startswith("<think>\n")
    assert row["completion"].endswith("</response><|im_end|>\n")


def test_other_options_make_another_question(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    stem = "All of these are true except"
    letters = [{"A": f"drug {n}", "B": f"drug {n + 1}", "C": "none", "D": "all"} for n in range(30)]
    write_jsonl(
        tmp_path / "data/rows.jsonl",
        [{"question": stem, "options": o, "answer_idx": "C"} for o in [*letters, letters[0]]],
    )
    run_file = make_run_file({"run": {"prepare": {"preference_rows": 0}}})
    _, statistics = prepare(run_file)
    assert statistics["rows"]["exact_duplicates"] == 1
    assert statistics["rows"]["contaminated"] == 0


def test_safety_rows_without_a_kind_are_harmful(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    rows = [{"prompt": f"Do harm number {n}", "response": "I cannot."} for n in range(12)]
    write_jsonl(tmp_path / "data/safety.jsonl", rows)
    folder, statistics = prepare(make_run_file())
    kinds = pq.read_table(folder / "evaluation.parquet")["kind"].to_pylist()
    assert kinds.count("harmful") == 4
    assert statistics["rows"]["safety_in_train"] > 0


def test_style_with_reasoning_needs_rows_with_reasoning(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    rows = [
        {"instruction": f"Question {n} about {n * 7}?", "response": f"Answer {n}."}
        for n in range(48)
    ]
    write_jsonl(tmp_path / "data/rows.jsonl", rows)
    with pytest.raises(DataError, match="no training row has any reasoning"):
        prepare(make_run_file({"run": {"prompt": {"style": "thinking"}}}))


SAMPLES = Path(os.environ.get("MEDJOB_SAMPLES", "nowhere"))


@pytest.mark.skipif(
    not SAMPLES.is_dir(),
    reason="needs mcq_medmcqa_validation.jsonl and medical_o1_sft.jsonl in MEDJOB_SAMPLES",
)
def test_planted_copies_in_real_data_are_found(tiny: Path, tmp_path: Path) -> None:
    """Twenty evaluation rows are added to the training rows. These are found, and no others."""
    lines = (SAMPLES / "mcq_medmcqa_validation.jsonl").read_text().splitlines()
    choices = [row for row in map(json.loads, lines) if len(row["question"].split()) > 12][:200]
    write_jsonl(tmp_path / "choices.jsonl", choices)
    planted = [
        {
            "Question": row["question"],
            "Complex_CoT": "x",
            "Response": " ".join(row["options"].values()),
        }
        for row in choices[:20]
    ]
    real = [
        json.loads(line) for line in (SAMPLES / "medical_o1_sft.jsonl").read_text().splitlines()
    ]
    write_jsonl(tmp_path / "rows.jsonl", [*real, *planted])
    from medjob.config.load import validate

    prepare_params = {
        "sources": [{"path": str(tmp_path / "rows.jsonl")}],
        "evaluation_sources": [{"path": str(tmp_path / "choices.jsonl")}],
        "validation_rows": 0,
        "evaluation_rows": 0,
    }
    cluster = {"store": f"file://{tmp_path}/s", "workDir": str(tmp_path / "w")}
    _, statistics = prepare(
        validate(
            {
                "run": {"name": "t", "base_model": str(tiny), "prepare": prepare_params},
                "cluster": cluster,
            }
        )
    )
    assert statistics["rows"]["contaminated"] == 20


def test_report_shows_rows_with_the_trained_tokens_marked(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    rows: list[Any] = [
        {"instruction": f"Is {n} mg <b>too</b> much?", "response": f"No, it is not <i>{n}</i>."}
        for n in range(40)
    ]
    rows += [
        {"instruction": f"第{n}号药物过量吗？", "response": f"根据说明书不是{n}。"}
        for n in range(10)
    ]
    write_jsonl(tmp_path / "data/rows.jsonl", rows)
    changes = {"run": {"prepare": {"preference_rows": 0, "evaluation_rows": 0, "safety": None}}}
    folder, statistics = prepare(make_run_file(changes))
    report = (folder / "report.html").read_text()
    row = pq.read_table(folder / "train.parquet").to_pylist()[0]
    escaped = {name: html.escape(row[name]).rstrip("\n") for name in ("prompt", "completion")}
    assert (
        f'<div class="row">{escaped["prompt"]}\n<mark>{escaped["completion"]}</mark>\n</div>'
        in report
    )
    assert "<b>" not in report
    assert "<i>" not in report
    for title in ("First rows of rows.jsonl", "Longest rows", "Shortest rows"):
        assert f"<h3>{title}</h3>" in report
    train = statistics["rows"]["train"]
    assert (
        sum(statistics["scripts"].values()) == train == statistics["lengths"]["rows.jsonl"]["rows"]
    )
    assert list(statistics["scripts"]) == ["Latin", "Han"]
    assert list(statistics["openings"]) == ["No, it is not", "根据说明"]
    assert sum(statistics["openings"].values()) == train
    lengths = [len(ids) for ids in pq.read_table(folder / "train.parquet")["input_ids"].to_pylist()]
    assert statistics["lengths"]["rows.jsonl"]["longest"] == max(lengths)


def test_equal_rows_give_equal_reports(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    first, _ = prepare(make_run_file())
    there = {"store": f"file://{tmp_path}/other", "workDir": str(tmp_path / "other-work")}
    second, _ = prepare(make_run_file({"cluster": there}))
    for name in ("report.html", "statistics.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def weighted(
    make_run_file: Callable[..., RunFile],
    folder: Path,
    weights: tuple[float, float] | None,
    **changes: Any,
) -> RunFile:
    """A run over 40 and 80 rows, of which 4 are duplicates."""
    rows = reasoning_rows(120)
    paths = [
        write_jsonl(folder / "data/a.jsonl", rows[:40]),
        write_jsonl(folder / "data/b.jsonl", [*rows[40:], *rows[:4]]),
    ]
    sources = [
        {"path": str(path)} | ({"weight": weights[number]} if weights else {})
        for number, path in enumerate(paths)
    ]
    changes |= {"sources": sources, "preference_rows": 0, "safety": None}
    return make_run_file({"run": {"prepare": changes}})


def test_weights_are_the_shares_of_the_training_rows(
    make_run_file: Callable[..., RunFile], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, before = prepare(weighted(make_run_file, tmp_path, None))
    plain = {name: ids(folder, name) for name in ("train", "validation", "evaluation")}
    with caplog.at_level("INFO"):
        folder, statistics = prepare(weighted(make_run_file, tmp_path, (1, 1)))
    rows, sources = statistics["rows"], statistics["tokens"]["sources"]
    available = before["tokens"]["sources"]
    assert "weights" not in before
    assert sources == {name: min(available.values()) for name in ("a.jsonl", "b.jsonl")}
    assert statistics["weights"]["b.jsonl"] == {
        "weight": 1,
        "rows": available["b.jsonl"],
        "used": sources["b.jsonl"],
    }
    assert rows["unused"] == available["b.jsonl"] - sources["b.jsonl"]
    places = ("exact_duplicates", "contaminated", "unused", "train", "validation", "evaluation")
    assert rows["read"] == sum(rows[name] for name in places)
    assert rows["exact_duplicates"] == 4
    assert f"b.jsonl {sources['b.jsonl']} of {available['b.jsonl']} rows (weight 1, 50.0%)" in (
        caplog.text
    )
    assert "Mix of the sources" in (folder / "report.html").read_text()
    # Rows that are held out are the same, and all training rows were training rows before.
    assert set(ids(folder, "train")) < set(plain["train"])
    assert len(set(ids(folder, "train"))) == rows["train"]
    for name in ("validation", "evaluation"):
        assert ids(folder, name) == plain[name]


def test_source_that_is_too_small_for_its_weight_is_named(
    make_run_file: Callable[..., RunFile], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, statistics = prepare(weighted(make_run_file, tmp_path, (10, 1)))
    rows = statistics["weights"]["a.jsonl"]["rows"]
    assert statistics["weights"]["a.jsonl"]["used"] == rows
    assert f"because a.jsonl has only {rows} for its weight of 10" in caplog.text
    caplog.clear()
    prepare(weighted(make_run_file, tmp_path, (1, 1)))
    assert "has only" not in caplog.text


def test_weights_hold_for_the_rows_that_are_no_copies(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    """Copies of evaluation rows are removed first, from the training and from the counts."""
    run_file = weighted(make_run_file, tmp_path, (1, 2), contamination={"threshold": 0.5})
    question = "Which single drug should be given first to a child with severe croup at night?"
    write_jsonl(tmp_path / "data/choices.jsonl", [choice_rows(1)[0] | {"question": question}])
    copies = [
        {"Question": f"{question} {n}", "Complex_CoT": "So.", "Response": "insulin"}
        for n in range(30)
    ]
    write_jsonl(tmp_path / "data/a.jsonl", [*copies, *reasoning_rows(20)])
    _, statistics = prepare(run_file)
    sources = statistics["tokens"]["sources"]
    assert statistics["rows"]["contaminated"] > 20
    assert statistics["weights"]["a.jsonl"]["rows"] == sources["a.jsonl"] <= 20
    assert sources["b.jsonl"] == 2 * sources["a.jsonl"]


def test_source_of_duplicates_cannot_have_a_share(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    run_file = weighted(make_run_file, tmp_path, (1, 1))
    write_jsonl(tmp_path / "data/b.jsonl", reasoning_rows(9))
    with pytest.raises(DataError, match=r"run\.prepare\.sources\.1: no row is left for training"):
        prepare(run_file)
