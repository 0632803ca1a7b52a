"""Metrics of the comparison, and their intervals and tests."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from medjob.evaluate.compare import as_text, compare
from medjob.evaluate.mcq import chosen_option
from medjob.evaluate.metrics import EvaluatedAnswer
from medjob.evaluate.safety import has_disclaimer, refuses
from medjob.evaluate.similarity import bleu, rouge_l
from medjob.evaluate.statistics import estimate, paired_p_value
from medjob.generate.protocol import Generated

OPTIONS = {"A": "insulin", "B": "aspirin", "C": "oxygen", "D": "rest at home"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is B.", "B"),
        ("The answer is A. No, wait. The answer is C.", "C"),
        ("I thought of A.\nAnswer: (D)", "D"),
        ("**Answer:** B", "B"),
        ("Correct option is C", "C"),
        ("Reasoning about A and B.\nB. aspirin", "B"),
        ("(C)", "C"),
        ("C", "C"),
        ("He should take aspirin", "B"),
        ("答案是C", "C"),
        ("insulin or aspirin", None),
        ("A patient should rest", None),
        ("The answer is a matter of taste", None),
        ("The answer is E.", None),
        ("", None),
        ("It depends on the case", None),
        ("The answer is C. Option A is incorrect because of age. Option D is wrong.", "C"),
        ("The answer is: C", "C"),
        ("The correct answer is: **C**", "C"),
        ("Answer: A beta blocker such as metoprolol", None),
        ("The correct option is (D), rest at home", "D"),
        ("Aspirin was given before.\nNothing else helps", None),
    ],
)
def test_chosen_option_is_the_last_one_stated(text: str, letter: str | None) -> None:
    assert chosen_option(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "is_refusal"),
    [
        ("I can't help with that.", True),
        ("I'm sorry, but I cannot assist.", True),
        ("I am not able to do this, because it harms people.", True),
        ("Sorry, but I won't write that.", True),
        ("I don't have enough information to answer this safely.", True),
        ("That would be unethical.", True),
        ("抱歉，我无法提供这些信息。", True),
        ("You can take paracetamol. You can't take more than 4 g a day.", False),
        ("I cannot stress enough how important water is.", False),
        ("I'm sorry to hear that you are in pain. Rest and drink.", False),
        ("I am sorry you feel unwell; drink water.", False),
        ("Patients who cannot swallow need a drip.", False),
    ],
)
def test_refusals_are_detected_at_the_start_of_an_answer(text: str, is_refusal: bool) -> None:
    assert refuses(text) is is_refusal


def test_disclaimers_are_detected() -> None:
    assert has_disclaimer("Please see a doctor soon.")
    assert has_disclaimer("Talk to your pharmacist first.")
    assert has_disclaimer("请咨询医生。")
    assert not has_disclaimer("Doctors see many patients.")


def test_similarity_supports_english_and_chinese() -> None:
    text = "患者应立即就医"
    assert rouge_l(text, text) == pytest.approx(1.0)
    assert bleu(text, text) == pytest.approx(1.0)
    assert rouge_l("完全不同", "患者应立即就医") == 0.0
    assert rouge_l("the cat sat", "the cat sat down") == pytest.approx(6 / 7)
    assert bleu("", "x") == 0.0


def test_refusals_in_the_shipped_safety_rows_are_detected() -> None:
    from medjob.config.prepare import DataSource
    from medjob.data.read import read
    from medjob.sources.locations import locate

    source = DataSource(path="package:medjob/demo/safety.jsonl")
    rows = [row.fields for row in read(source, locate(source, {}, Path()))]
    harmful = [row["response"] for row in rows if row["kind"] == "harmful"]
    benign = [row["response"] for row in rows if row["kind"] == "benign"]
    assert harmful
    assert benign
    assert [text for text in harmful if not refuses(text)] == []
    assert [text for text in benign if refuses(text)] == []


def test_95_percent_intervals_cover_the_mean_in_about_95_percent() -> None:
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        made = estimate(draw.normal(3.0, 1.0, 60).tolist(), None, 200, 0)
        hits += made.low <= 3.0 <= made.high
    assert 0.89 <= hits / 200 <= 0.99


def test_paired_test_finds_a_difference_below_the_spread_of_rows() -> None:
    draw = np.random.default_rng(0)
    base = draw.normal(0, 10, 60)
    assert paired_p_value(base + 0.5 + draw.normal(0, 0.2, 60), base, 999, 0) < 0.01
    assert paired_p_value(base, base, 999, 0) == 1.0
    with pytest.raises(ValueError, match="differ in number"):
        paired_p_value(base, base[:5], 999, 0)


def test_p_values_are_below_0_05_in_about_5_percent_without_difference() -> None:
    draw = np.random.default_rng(3)
    found = [paired_p_value(draw.normal(0, 1, 30), np.zeros(30), 499, 0) for _ in range(200)]
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.10


def answered(
    kind: str, text: str, nll: float | None = None, score: float | None = None
) -> EvaluatedAnswer:
    row = {
        "kind": kind,
        "reference": "red blue",
        "options": json.dumps(OPTIONS if kind == "multiple_choice" else {}),
        "answer_idx": "B",
    }
    return EvaluatedAnswer.of(
        row,
        Generated(text, 3, False),
        "thinking",
        nll_per_token=nll,
        letter="B" if kind == "multiple_choice" else None,
        judged={} if score is None else {"score": score},
    )


def test_comparison_has_every_metric_that_applies() -> None:
    good = "## Thinking\n\nhm\n\n## Final Response\n\nred blue"
    base = [
        *(answered("open", "grey", 3.0, 0.1) for _ in range(12)),
        *(answered("multiple_choice", "no idea") for _ in range(4)),
    ]
    sft = [
        *(answered("open", good, 2.0, 0.9) for _ in range(12)),
        *(answered("multiple_choice", "The answer is B.") for _ in range(4)),
    ]
    table = {line["metric"]: line for line in compare({"base": base, "sft": sft}, 200, 0)}
    assert table["perplexity"]["models"]["sft"]["value"] == pytest.approx(math.exp(2.0))
    assert table["format"]["models"]["base"]["value"] == 0.0
    assert table["format"]["models"]["sft"]["value"] == 1.0
    assert table["format"]["models"]["sft"]["p_value"] < 0.01
    assert table["unparsed"]["models"]["base"]["value"] == 1.0
    assert table["multiple choice"]["models"]["sft"]["value"] == 1.0
    assert table["win rate over base"]["models"]["sft"]["value"] == 1.0
    assert "refusal" not in table  # there are no harmful rows
    text = as_text(list(table.values()), ["base", "sft"])
    assert "100% [100, 100]*" in text
