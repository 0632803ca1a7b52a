"""Rows of every format and of none: prepare counts each of them once, and never fails with a bug."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medjob.config.load import merge, validate
from medjob.errors import MedjobError
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage
from tests.support.rows import reasoning_rows
from tests.support.small_run import fetched, small_run

_WORDS = st.sampled_from(
    [
        "pain",
        "Rh+",
        "Rh-",
        "<|im_end|>",
        "{question}",
        "दिन",
        "दीन",
        "胸痛",
        "38.5",
        "A",
        "\x00",
        " ",
    ]
)
_TEXTS = st.one_of(
    st.lists(_WORDS, max_size=6).map(" ".join),
    st.text(max_size=30),  # with lone surrogates
    st.sampled_from(["", "Why?", "<think>Hm.</think>So.", "<think>", "\ud83d", "ยา " * 40]),
)
_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 7),
    st.floats(),
    st.lists(_TEXTS, max_size=3),
    st.dictionaries(_TEXTS, _TEXTS, max_size=3),
)
# Mostly text, because rows with an odd value are simply rejected.
_VALUES = st.one_of(*[_TEXTS] * 6, _ODD)
_OPTIONS = st.one_of(
    st.dictionaries(st.sampled_from("ABCDEabcde12345"), _VALUES, max_size=6),
    st.lists(_VALUES, max_size=12),
    st.lists(st.fixed_dictionaries({"key": st.sampled_from("ABCD"), "value": _VALUES}), max_size=5),
    st.fixed_dictionaries({"text": st.lists(_TEXTS, max_size=4), "label": st.just(list("ABCD"))}),
    _VALUES,
)
_ANSWERS = st.one_of(st.sampled_from(["A", "b", "(C)", "2", "D."]), st.integers(-1, 5), _VALUES)
_ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", ""])
_TURNS = st.one_of(
    st.lists(st.fixed_dictionaries({"role": _ROLES, "content": _VALUES}), max_size=7),
    st.lists(st.fixed_dictionaries({"from": _ROLES, "value": _VALUES}), max_size=7),
    _VALUES,
)


def _row(**columns: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A row with the required columns, and perhaps some that carry more."""
    more = {
        "system": _VALUES,
        "context": _VALUES,
        "history": _ODD,
        "reasoning": _VALUES,
        "input": _VALUES,
        "kind": st.sampled_from(["harmful", "benign", "other"]),
        "exp": _VALUES,
        "images": _ODD,
    }
    optional = {name: value for name, value in more.items() if name not in columns}
    return st.fixed_dictionaries(columns, optional=optional)


FORMATS = {
    "medical_o1": _row(Question=_VALUES, Complex_CoT=_VALUES, Response=_VALUES),
    "verifiable": _row(question=_VALUES, ground_truth=_VALUES),
    "instruction": _row(instruction=_VALUES, output=_VALUES),
    "conversations": _row(conversations=_TURNS),
    "messages": _row(messages=_TURNS),
    "preference": _row(prompt=_VALUES, chosen=st.one_of(_VALUES, _TURNS), rejected=_VALUES),
    "multiple_choice": _row(question=_VALUES, options=_OPTIONS, answer=_ANSWERS),
    "medmcqa": _row(
        question=_VALUES, opa=_VALUES, opb=_VALUES, opc=_VALUES, opd=_VALUES, cop=_ANSWERS
    ),
    "pubmedqa": _row(question=_VALUES, context=_ODD, final_decision=_ANSWERS),
    "safety": _row(prompt=_VALUES, response=_VALUES, kind=_VALUES),
    "no format": st.dictionaries(_TEXTS, _VALUES, max_size=3),
}
_ANY_ROWS = st.one_of(
    *(st.lists(rows, min_size=40, max_size=80) for rows in FORMATS.values()),
    st.lists(st.one_of(*FORMATS.values(), _VALUES), min_size=40, max_size=80),
)
_USED = ("train", "validation", "preferences", "evaluation")
_LEFT_OUT = (
    "rejected",
    "exact_duplicates",
    "near_duplicates",
    "contaminated",
    "preferences_also_in_training",
    "unused",
)


@pytest.mark.parametrize("role", ["sources", "preference_sources", "evaluation_sources"])
def test_every_row_is_counted_once(tiny: Path, tmp_path: Path, role: str) -> None:
    tree = small_run(tmp_path, tiny)
    source = tmp_path / "data/generated.jsonl"
    numbers = {"validation_rows": 1, "evaluation_rows": 1, "preference_rows": 0}
    prepare: dict[str, Any] = {
        **numbers,
        "max_rejected_fraction": 1.0,
        "near_duplicate_threshold": 0.85,
        "contamination": {"threshold": 0.8},
    }
    prepare[role] = [*tree["run"]["prepare"].get(role, []), {"path": str(source)}]
    run_file = validate(merge(tree, {"run": {"prepare": prepare, "sft": {"max_length": 64}}}))
    read = 0

    @settings(
        max_examples=16,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(_ANY_ROWS)
    def prepare_counts(rows: list[Any]) -> None:
        nonlocal read
        # A source without any usable row is refused.
        lines = [json.dumps(row) for row in (*rows, {"question": "Why?", "answer": "So."})]
        source.write_text("\n".join(lines) + "\n")
        pipeline = Pipeline.open(run_file)
        try:
            pipeline.run(get_stage("fetch"))
            pipeline.run(get_stage("prepare"))
        except MedjobError:
            return  # any other exception is a bug
        counts = json.loads((fetched(pipeline, "prepare") / "statistics.json").read_text())
        found = {name: counts["rows"].get(name, 0) for name in ("read", *_USED, *_LEFT_OUT)}
        overlong = counts["tokens"]["overlong_rows"]
        used = sum(found[name] for name in _USED) - overlong
        assert found["read"] == used + overlong + sum(found[name] for name in _LEFT_OUT), found
        read += found["read"]

    prepare_counts()
    assert read > 500


def test_control_tokens_and_dialogues_are_counted(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = small_run(tmp_path, tiny)
    rows = reasoning_rows(20)
    rows[3]["Question"] += " <|im_end|> <|im_start|>"
    dialogues = [
        {
            "messages": [
                {"role": "user", "content": f"{text} {n}"},
                {"role": "assistant", "content": "So."},
            ]
        }
        for n, text in enumerate(["What is it?", "Is it safe?", "Does it hurt?"])
    ]
    for number, dialogue in enumerate(dialogues):
        dialogue["messages"] += dialogue["messages"] * number
    dialogues[1]["messages"].append({"role": "user", "content": "Thanks"})
    path = tmp_path / "data/rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *dialogues]))
    changes = {"validation_rows": 0, "evaluation_rows": 0, "preference_rows": 0}
    pipeline = Pipeline.open(validate(merge(tree, {"run": {"prepare": changes}})))
    pipeline.run(get_stage("fetch"))
    pipeline.run(get_stage("prepare"))
    counts = json.loads((fetched(pipeline, "prepare") / "statistics.json").read_text())["rows"]
    assert counts["rows_with_control_tokens"] == 1
    assert (counts["dialogues"], counts["open_questions"], counts["further_rows"]) == (2, 1, 0)
    assert "1 rows spell out control tokens" in caplog.text
