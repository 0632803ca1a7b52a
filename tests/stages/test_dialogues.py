"""Dialogues in prepare and sft: splits, duplicates, counts, and which answers are trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from medjob.cli.main import main
from medjob.config import RunFile
from medjob.data.labels import answers_in
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from medjob.stages.sft import load_rows
from tests.support.families import FAMILIES
from tests.support.in_process import in_this_process
from tests.support.rows import SIGNS, TOPICS, write_jsonl
from tests.support.small_run import fetched
from tests.support.tiny_model import make_tiny_model

MakeRunFile = Callable[..., RunFile]
NO_SPLITS = {"validation_rows": 0, "evaluation_rows": 0, "preference_rows": 0, "safety": None}


def dialogue(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": t} for n, t in enumerate(texts)]}


def opening(number: int) -> str:
    return f"Case {number}: {TOPICS[number % 10]} {SIGNS[number % 6]}. What is it?"


def prepare(run_file: RunFile) -> tuple[Path, dict[str, Any]]:
    pipeline = Pipeline.open(run_file)
    for name in ("fetch", "prepare"):
        pipeline.run(get_stage(name))
    folder = fetched(pipeline, "prepare")
    return folder, json.loads((folder / "statistics.json").read_text())["rows"]


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(pq.read_table(folder / f"{name}.parquet").to_pylist())


def test_dialogues_with_the_same_beginning_are_rows_of_one_split(
    make_run_file: MakeRunFile, tmp_path: Path
) -> None:
    rows = [
        dialogue(opening(n), f"Cause {n}.", follow_up, "Rest.")
        for n in range(20)
        for follow_up in ("What helps?", "Is it dangerous?", "What helps?")
    ]
    write_jsonl(tmp_path / "data/rows.jsonl", rows)
    sizes = {"validation_rows": 3, "evaluation_rows": 4, "preference_rows": 5, "safety": None}
    folder, counts = prepare(make_run_file({"run": {"prepare": sizes}}))
    parts = {
        name: rows_of(folder, name) for name in ("train", "validation", "evaluation", "preferences")
    }
    # Evaluation and preferences use the first question, so two dialogues give one prompt.
    held_out = [row for row in parts["evaluation"] if row["source"] == "rows.jsonl"]
    assert (len(held_out), len(parts["preferences"])) == (4, 5)
    assert (len(parts["train"]), len(parts["validation"])) == (2 * 8, 2 * 3)
    assert all("What helps?" not in row["prompt"] for row in (*held_out, *parts["preferences"]))
    firsts = [
        {row["question"].split("What is it?")[0][-60:] for row in rows}
        for rows in (parts["train"], parts["validation"])
    ]
    assert not firsts[0] & firsts[1]
    questions = [row["question"] for row in held_out]
    assert not any(question in row["question"] for question in questions for row in parts["train"])
    ids = [row["id"] for name in parts for row in parts[name]]
    assert len(ids) == len(set(ids))
    used = sum(counts[name] for name in ("train", "validation", "evaluation", "preferences"))
    assert counts["read"] == used + counts["exact_duplicates"] == 66
    assert counts["dialogues"] == 22


@pytest.mark.parametrize(
    "row",
    [
        dialogue("My knee hurts.", "Rest it.", "Which treatment fits scurvy?", "Fruit."),
        {
            "instruction": "My knee hurts.",
            "output": "Rest it.",
            "history": [["Which treatment fits scurvy?", "Fruit."]],
        },
    ],
)
def test_any_question_of_a_dialogue_can_copy_an_evaluation_row(
    make_run_file: MakeRunFile, tmp_path: Path, row: dict[str, Any]
) -> None:
    rows = [dialogue(opening(n), f"Cause {n}.", "What helps?", "Rest.") for n in range(9)]
    write_jsonl(tmp_path / "data/rows.jsonl", [*rows, row])
    choice = {"question": "Which treatment fits scurvy?", "answer": "Vitamin C"}
    write_jsonl(tmp_path / "data/choices.jsonl", [choice])
    _, counts = prepare(make_run_file({"run": {"prepare": NO_SPLITS}}))
    assert (counts["contaminated"], counts["train"]) == (1, 9)


def test_near_duplicates_compare_all_turns(make_run_file: MakeRunFile, tmp_path: Path) -> None:
    long = "My father, who is 70 years old and smokes, has had a dry cough for three weeks now. What is it?"
    rows = [
        dialogue(
            long,
            "Perhaps bronchitis.",
            "And if he has a fever as well since yesterday?",
            "See a doctor.",
        ),
        dialogue(
            "Hello! " + long,
            "Perhaps bronchitis.",
            "And if he has a fever as well since yesterday?",
            "See a doctor.",
        ),
        dialogue(
            long,
            "Perhaps bronchitis.",
            "Which tests should he ask his own doctor to make?",
            "An X-ray.",
        ),
        dialogue(long, "Perhaps bronchitis."),
        dialogue(long, "Perhaps a cold."),
    ]
    write_jsonl(tmp_path / "data/rows.jsonl", rows)
    changes = {**NO_SPLITS, "near_duplicate_threshold": 0.8}
    _, counts = prepare(make_run_file({"run": {"prepare": changes}}))
    found = [counts[name] for name in ("near_duplicates", "exact_duplicates", "train")]
    assert found == [1, 1, 3]


def test_history_columns_are_trained_like_dialogues(
    make_run_file: MakeRunFile, tmp_path: Path
) -> None:
    history = [[opening(1), "A cold."], ["What helps?", "Rest."]]
    rows: list[Any] = [
        {
            "instruction": "How long?",
            "input": "",
            "output": "A week.",
            "system": "Be brief.",
            "history": history,
        },
        dialogue("Sys", "x"),
    ]
    rows[1] = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            *dialogue(opening(1), "A cold.", "What helps?", "Rest.", "How long?", "A week.")[
                "messages"
            ],
        ]
    }
    folders = []
    for number, row in enumerate(rows):
        other = dialogue(opening(7), "A sprain.")
        write_jsonl(tmp_path / "data/rows.jsonl", [row, other])
        changes = {"run": {"name": f"n{number}", "prepare": NO_SPLITS}}
        folder, counts = prepare(make_run_file(changes))
        folders.append(rows_of(folder, "train"))
        assert (counts["dialogues"], counts["train"]) == (1, 2)
    assert folders[0] == folders[1]
    assert len(answers_in(folders[0][0])) == 3


@pytest.fixture
def dialogues(tmp_path: Path, tree: dict[str, Any]) -> None:
    rows = [dialogue(opening(n), f"Cause {n}.", "What helps?", f"Rest {n}.") for n in range(12)]
    write_jsonl(tmp_path / "data/rows.jsonl", rows)
    tree["run"]["prepare"].update(NO_SPLITS)
    tree["run"]["sft"].update({"max_steps": 1, "save_steps": 1, "eval_steps": 1})


def test_choosing_the_trained_turns_does_not_prepare_the_rows_again(
    make_run_file: MakeRunFile,
    dialogues: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The end token of the tiny model is in the labels once per trained answer."""
    from medjob.stages import sft

    trained: list[int] = []
    step = sft._SftTrainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        end = self.processing_class.eos_token_id
        trained.extend((labels == end).sum().item() for labels in inputs["labels"])
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(sft._SftTrainer, "training_step", training_step)
    keys = []
    for turns, answers in (("all", 2), ("last", 1)):
        changes = {
            "run": {"sft": {"assistant_turns": turns}},
            "cluster": {"workDir": f"{tmp_path}/{turns}"},
        }
        pipeline = Pipeline.open(make_run_file(changes))
        for name in ("fetch", "prepare"):
            pipeline.run(get_stage(name))
        metrics = sft.run(in_this_process(pipeline, "sft"))
        assert (metrics["rows"], metrics["overlong_rows_left_out"]) == (12, 0)
        assert set(trained) == {answers}
        trained.clear()
        keys.append([pipeline.artifact(get_stage(name)).key for name in ("prepare", "sft")])
    assert keys[0][0] == keys[1][0]
    assert keys[0][1] != keys[1][1]


def test_answers_in_rows_of_their_own_are_counted_and_can_be_left_out(
    make_run_file: MakeRunFile,
    dialogues: None,
    tree: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Qwen3's template shows earlier answers without the empty thought that the model writes."""
    from transformers import AutoTokenizer

    model = make_tiny_model(tmp_path / "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = FAMILIES["qwen3"].template
    tokenizer.save_pretrained(model)
    run_file = make_run_file({"run": {"base_model": str(model)}})
    folder, counts = prepare(run_file)
    assert (counts["train"], counts["further_rows"], counts["dialogues"]) == (12, 12, 12)
    rows = rows_of(folder, "train")
    assert [row["is_last"] for row in rows] == [False, True] * 12
    path = tmp_path / "run.yaml"
    for turns, number in (("all", 24), ("last", 12)):
        tree["run"]["base_model"] = str(model)
        tree["run"]["sft"] |= {"assistant_turns": turns, "max_steps": None}
        run_file = make_run_file()
        loaded, dropped = load_rows(folder / "train.parquet", run_file.run.sft)
        assert (len(loaded), dropped) == (number, 0)
        path.write_text(yaml.safe_dump(tree))
        with pytest.raises(SystemExit):
            main(["plan", "-f", str(path)])
        assert f"steps {number // 4}, " in " ".join(capsys.readouterr().out.split())
