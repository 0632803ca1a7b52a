"""Styles, rendering, duplicates, contamination and splits of rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medjob.config.prepare import Contamination, PromptParams
from medjob.data.contamination import Detector
from medjob.data.dedup import find_duplicates
from medjob.data.formats import Record
from medjob.data.prompts import RowBuilder
from medjob.data.render import Conversation, Renderer
from medjob.data.splits import assign_splits
from medjob.data.styles import format_answer, take_apart
from medjob.data.text import question_hash, words
from medjob.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.mark.parametrize("style", ["thinking", "tags", "plain"])
def test_formatted_answer_parses_to_its_parts(style: Any) -> None:
    answer = take_apart(style, format_answer(style, "First.\nThen.", "So."))
    assert answer.complies
    assert answer.response == "So."
    assert answer.reasoning == ("" if style == "plain" else "First.\nThen.")


@pytest.mark.parametrize(
    ("style", "text", "response"),
    [
        ("thinking", "## Thinking\n\nIt is long and was cut", "It is long and was cut"),
        ("thinking", "Just an answer", "Just an answer"),
        ("thinking", "## Final Response\n\nOnly this", "Only this"),
        ("thinking", "## Thinking\n\n\n\n## Final Response\n\nNo reasoning", "No reasoning"),
        ("tags", "<think>a</think><response>b", "b"),
        ("tags", "<response>b</response>", "b"),
        ("plain", "   ", ""),
    ],
)
def test_text_without_the_layout_does_not_comply(style: Any, text: str, response: str) -> None:
    answer = take_apart(style, text)
    assert not answer.complies
    assert answer.response.endswith(response)


def test_rendering_equals_the_chat_template(tokenizer: Any) -> None:
    for params in (PromptParams(), PromptParams(system="Be kind.")):
        renderer = Renderer(tokenizer, params)
        messages = [{"role": "system", "content": params.system}] if params.system else []
        messages.append({"role": "user", "content": "Why {x}?"})
        assert renderer.prompt(Conversation("Why {x}?")) == tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        messages.append({"role": "assistant", "content": "Because."})
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert renderer.prompt(Conversation("Why {x}?")) + renderer.completion("Because.") == whole


def test_rows_are_tokenised_as_trl_does(tokenizer: Any) -> None:
    record = Record("Why does it hurt?", reasoning="Hm.", response="Because.")
    (row,) = RowBuilder(tokenizer, PromptParams()).train([(record, "s")])
    messages = [
        {"role": "user", "content": record.question},
        {"role": "assistant", "content": format_answer("thinking", "Hm.", "Because.")},
    ]
    assert (
        row["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    )
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert row["prompt_tokens"] == len(prompt)


def test_raw_template_ends_with_the_end_token(tokenizer: Any) -> None:
    maker = RowBuilder(
        tokenizer, PromptParams(template="Question: {question}\nAnswer: ", style="plain")
    )
    (row,) = maker.train([(Record("Why?", response="So."), "s")])
    assert row["prompt"] + row["completion"] == "Question: Why?\nAnswer: So.<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == "Question: Why?\nAnswer: So.<|im_end|>"
    assert row["input_ids"][-1] == tokenizer.eos_token_id


def test_words_and_hashes_ignore_case_and_punctuation() -> None:
    assert words("Fever, 38.5 C; Ｆｅｖｅｒ") == ["fever", "38.5", "c", "fever"]
    assert words("胸痛三天") == ["胸", "痛", "三", "天"]
    assert question_hash("What is  ASTHMA?") == question_hash("what is asthma")
    assert question_hash("what is asthma") != question_hash("what is anaemia")
    assert question_hash("???") != question_hash("!!")


LONG = "a 45 year old man comes to the clinic with fever and cough and pain in the left side of his chest since yesterday evening after work"


def duplicates_of(questions: list[str], threshold: float | None = 0.8) -> Any:
    hashes = np.array([question_hash(question) for question in questions], dtype=np.uint64)
    records = [Record(question, response="It is pneumonia.") for question in questions]
    return find_duplicates(hashes, lambda: records, threshold, lambda _: None)


def test_exact_and_near_duplicates_are_distinguished() -> None:
    near = LONG.replace("after work", "after lunch")
    found = duplicates_of(
        [LONG, "something else entirely about the eyes of a child", LONG.upper() + "?", near]
    )
    assert found.exact == {2: 0}
    assert found.near == {3: 0}
    assert 1 not in found
    assert duplicates_of([LONG, near], None).near == {}


def test_first_row_of_a_cluster_is_kept() -> None:
    rows = [LONG + f" and {word}" for word in ("so on", "now", "more", "less", "then", "also")]
    assert set(duplicates_of(rows).near) == {1, 2, 3, 4, 5}


CHOICE = Record(
    "A boy of 7 has had a barking cough and a hoarse voice since last night; what is the most likely cause of it?",
    options={
        "A": "parainfluenza virus infection of the larynx",
        "B": "a foreign body in the right main bronchus",
        "C": "asthma after exercise",
    },
    answer_idx="A",
    reference="parainfluenza virus infection of the larynx",
    response="The answer is A. parainfluenza virus infection of the larynx",
    kind="multiple_choice",
)


def test_copied_question_is_found() -> None:
    detector = Detector(
        [Record("Unrelated question about the liver and its many vessels in the adult"), CHOICE],
        Contamination(),
    )
    copied = Record(CHOICE.question, response="Croup.")
    hit = detector.find(copied)
    assert hit is not None
    assert (hit.evaluation_row, round(hit.ratio, 2)) == (1, 1.0)
    assert (
        detector.find(
            Record("Is brought to the physician because of a barking cough", response="Croup.")
        )
        is None
    )


def test_reworded_question_is_found_by_its_options() -> None:
    reworded = Record(
        "Which pathogen explains these symptoms in a child?",
        options=CHOICE.options,
        reference=CHOICE.reference,
        response=CHOICE.response,
    )
    assert Detector([CHOICE], Contamination(threshold=0.3)).find(reworded) is not None


def test_shared_boilerplate_is_not_a_copy() -> None:
    boilerplate = "is brought to the physician because of a two day history of fever and cough. His temperature is"
    evaluation = Record(
        f"A 4-year-old boy {boilerplate} 38 and a rash covers his trunk, sparing palms and soles; what explains these findings best?"
    )
    train = Record(
        f"A 60-year-old woman {boilerplate} 39 and she has lost weight over three months while working in a quarry.",
        response="Silicosis.",
    )
    assert Detector([evaluation], Contamination()).find(train) is None


def test_chinese_copy_is_found() -> None:
    text = "患者男性四十五岁因胸痛三天入院心电图显示前壁导联抬高最可能的诊断是什么"
    assert (
        Detector([Record(text)], Contamination()).find(Record(text, response="心肌梗死"))
        is not None
    )


def test_question_is_in_one_split() -> None:
    hashes = np.array([n % 50 for n in range(200)], dtype=np.uint64)
    splits = assign_splits(hashes, np.ones(200, dtype=bool), {"validation": 5, "evaluation": 7})
    by_hash: dict[int, set[str]] = {}
    for value, split in zip(hashes.tolist(), splits.tolist(), strict=True):
        by_hash.setdefault(value, set()).add(split)
    assert all(len(names) == 1 for names in by_hash.values())
    assert sum(names == {"validation"} for names in by_hash.values()) == 5
    assert sum(names == {"evaluation"} for names in by_hash.values()) == 7


def test_removed_rows_are_in_no_split_and_too_few_rows_fail() -> None:
    usable = np.array([True, False, True, True])
    splits = assign_splits(np.arange(4, dtype=np.uint64), usable, {"validation": 1})
    assert splits.tolist() == ["validation", "", "train", "train"]
    removed = {"rejected": 2, "near duplicates": 5}
    with pytest.raises(
        DataError, match=r"3 usable rows are too few.* 7 other .* 5 near duplicates"
    ):
        assign_splits(np.arange(4, dtype=np.uint64), usable, {"validation": 3}, removed)
