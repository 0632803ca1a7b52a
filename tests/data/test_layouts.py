"""Rows of many layouts: what each is converted to, or the reason why it is rejected."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from medjob.config.prepare import DataSource
from medjob.data.clean import Rejections, Role, clean
from medjob.data.columns import Row, UnusableRow
from medjob.data.dialogues import Exchange
from medjob.data.formats import Record, convert, detect
from medjob.errors import DataError
from medjob.sources.locations import locate

Q, R = "Why?", "Because."
USER, ANSWER = {"role": "user", "content": Q}, {"role": "assistant", "content": R}
SYSTEM = {"role": "system", "content": "Be brief."}
AGAIN = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Rest."}]
MORE = Exchange("And then?", "Rest.")
ABC = {"A": "liver", "B": "spleen", "C": "lung"}
LIST = [*ABC.values()]
MARK = "\ud83d"  # half of an emoji


def zero_based(column: str) -> int:
    return 0


def one_based(column: str) -> int:
    return 1


def converted(row: dict[str, Any], row_format: Any = None, base: Any = zero_based) -> Record:
    cells = Row(row)
    row_format = row_format or detect(cells)
    assert row_format is not None, "no known format"
    return convert(cells, row_format, base)


def check(record: Record, expected: dict[str, Any]) -> None:
    assert {name: getattr(record, name) for name in expected} == expected


# ---- questions and answers in columns

QA: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("case of names", {"QUESTION": Q, "Answer": R}, {"question": Q, "response": R}),
    ("separators in names", {"System Prompt": "S", "question": Q, "Chain-of-Thought": "t", "answer": R}, {"system": "S", "reasoning": "t"}),
    ("input and output", {"input": Q, "output": R}, {"question": Q, "response": R}),
    ("alpaca", {"instruction": "Answer.", "input": Q, "output": R}, {"question": f"Answer.\n\n{Q}"}),
    ("alpaca without input", {"instruction": Q, "input": "", "output": R}, {"question": Q}),
    ("task and question", {"instruction": "Answer.", "question": Q, "answer": R}, {"question": f"Answer.\n\n{Q}"}),
    ("prompt and completion", {"prompt": Q, "completion": R}, {"question": Q, "response": R}),
    ("patient and doctor", {"Description": "About a cough", "Patient": Q, "Doctor": R}, {"context": "About a cough", "question": Q, "response": R}),
    ("same question twice", {"question": Q, "prompt": Q, "answer": R}, {"question": Q}),
    ("long and short answer", {"question": Q, "response": "It is zinc.", "answer": "Zinc"}, {"response": "It is zinc.", "reference": "Zinc"}),
    ("response and truth", {"question": Q, "response": R, "ground_truth": "Zinc"}, {"response": R, "reference": "Zinc"}),
    ("unlabelled PubMedQA", {"question": Q, "context": {"contexts": ["a"], "labels": ["X"]}, "long_answer": R}, {"context": "a", "response": R}),
    ("SQuAD", {"question": Q, "context": "c", "answers": {"text": ["zinc", "zinc"], "answer_start": [1, 1]}}, {"response": "zinc", "context": "c"}),
    ("number as an answer", {"question": Q, "answer": 5}, {"response": "5"}),
    ("float as an answer", {"question": Q, "answer": 7.4}, {"response": "7.4"}),
    ("integer that pandas made a float", {"question": Q, "answer": 5.0}, {"response": "5"}),
    ("invisible characters around", {"question": "\ufeff\u200bWhy?\u200b", "answer": R}, {"question": Q}),
    ("unnamed columns", {"": 1, "Unnamed: 0": 2, "question": Q, "answer": R}, {"question": Q}),
    ("nulls of another data set", {"question": Q, "answer": R, "options": None, "chosen": None, "rejected": None, "messages": None, "complex_cot": None}, {"kind": "open", "response": R}),
    ("NaN of another data set", {"question": Q, "answer": R, "opa": float("nan"), "cop": float("nan")}, {"kind": "open"}),
    ("kind that is a topic", {"prompt": Q, "response": R, "kind": "cardiology"}, {"kind": "open"}),
    ("empty media", {"question": Q, "answer": R, "image": None, "images": [], "tools": "[]"}, {"response": R}),
    ("system", {"system": "Be brief.", "question": Q, "answer": R}, {"system": "Be brief."}),
    ("history of pairs", {"instruction": Q, "output": R, "history": [["a", "b"], ["c", "d"]]}, {"history": [Exchange("a", "b"), Exchange("c", "d")], "question": Q}),
    ("history of turns", {"instruction": Q, "output": R, "history": [USER, ANSWER]}, {"history": [Exchange(Q, R)]}),
    ("history in a CSV cell", {"instruction": Q, "output": R, "history": '[["a", "b"]]'}, {"history": [Exchange("a", "b")]}),
    ("empty history", {"instruction": Q, "output": R, "history": []}, {"history": []}),
    ("history of a patient", {"question": Q, "answer": R, "history": "Smoker."}, {"history": [], "context": "Smoker."}),
    ("TRL prompt and completion", {"prompt": [SYSTEM, USER], "completion": [ANSWER]}, {"system": "Be brief.", "question": Q, "response": R}),
    ("prompt of two exchanges", {"prompt": [USER, ANSWER, AGAIN[0]], "completion": "Rest."}, {"history": [Exchange(Q, R, is_trained=False)], "question": "And then?", "response": "Rest."}),
    ("Alpaca's text", {"instruction": Q, "output": R, "text": f"### Instruction: {Q} ### Response: {R}"}, {"context": ""}),
    ("passage in text", {"question": Q, "answer": R, "text": "A ward note."}, {"context": "A ward note."}),
    ("KTO", {"prompt": Q, "completion": R, "label": True}, {"response": R}),
    ("text in brackets", {"question": Q, "context": "[Case] A man.", "answer": "[1, 2]"}, {"context": "[Case] A man.", "response": "[1, 2]"}),
    ("SQuAD in a CSV cell", {"question": Q, "answers": "{'text': ['zinc'], 'answer_start': [1]}"}, {"response": "zinc"}),
    ("short and very long answer", {"question": Q, "answer": "yes", "long_answer": R}, {"response": R, "reference": "yes"}),
    ("verifiable", {"question": Q, "final_answer": 3}, {"response": "3", "reference": "3"}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), [c[1:] for c in QA], ids=[c[0] for c in QA])
def test_question_and_answer_columns(row: dict[str, Any], expected: dict[str, Any]) -> None:
    check(converted(row), expected)


@pytest.mark.parametrize("name", ["context", "Contexts", "passage", "article", "abstract", "background", "document", "documents", "paragraph"])  # fmt: skip
@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("A ward note.", "A ward note."),
        (["one", "two"], "one\ntwo"),
        ('["one", "two"]', "one\ntwo"),
        ({"contexts": ["one", "two"], "labels": ["AIM", "RESULT"], "meshes": ["x"]}, "one\ntwo"),
        ({"title": "T", "text": "one"}, "T\none"),
        ([{"title": "T", "text": "one"}, {"title": "U", "text": "two"}], "T\none\nU\ntwo"),
        ({"title": ["T", "U"], "sentences": [["a", "b"], ["c"]]}, "T\na\nb\nU\nc"),
    ],
)
def test_passage_precedes_the_question(name: str, value: Any, text: str) -> None:
    assert converted({"question": Q, name: value, "answer": R}).context == text
    choice = {"question": Q, name: value, "options": ABC, "answer": "A"}
    assert converted(choice).context == text


# ---- reasoning

REASONED: list[tuple[str, dict[str, Any], tuple[str, str]]] = [
    ("think", {"answer": "<think>\nHm.\n</think>\n\nYes."}, ("Hm.", "Yes.")),
    ("upper case", {"answer": "<THINK>Hm.</THINK>Yes."}, ("Hm.", "Yes.")),
    ("thinking", {"answer": "<thinking>Hm.</thinking>Yes."}, ("Hm.", "Yes.")),
    ("reasoning and answer", {"answer": "<reasoning>Hm.</reasoning>\n<answer>Yes.</answer>"}, ("Hm.", "Yes.")),
    ("think and response", {"answer": "<think>Hm.</think><response>\nYes.\n</response>"}, ("Hm.", "Yes.")),
    ("headings", {"answer": "## Thinking\n\nHm.\n\n## Final Response\n\nYes."}, ("Hm.", "Yes.")),
    ("thought tokens", {"answer": "<|begin_of_thought|>Hm.<|end_of_thought|>\n<|begin_of_solution|>Yes.<|end_of_solution|>"}, ("Hm.", "Yes.")),
    ("Magistral", {"answer": "[THINK]Hm.[/THINK]Yes."}, ("Hm.", "Yes.")),
    ("Cohere", {"answer": "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>"}, ("Hm.", "Yes.")),
    ("gpt-oss", {"answer": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"}, ("Hm.", "Yes.")),
    ("other headings", {"answer": "### Reasoning\nHm.\n### Answer:\nYes."}, ("Hm.", "Yes.")),
    ("bold headings", {"answer": "**Thinking:**\nHm.\n\n**Final Answer:**\nYes."}, ("Hm.", "Yes.")),
    ("ordinary heading", {"answer": "## Reasoning\nYes."}, ("", "## Reasoning\nYes.")),
    ("list of steps", {"reasoning": ["Hm.", "So."], "answer": "Yes."}, ("Hm.\nSo.", "Yes.")),
    ("opened by the prompt", {"answer": "Hm.\n</think>\nYes."}, ("Hm.", "Yes.")),
    ("empty thought", {"answer": "<think>\n\n</think>\n\nYes."}, ("", "Yes.")),
    ("only answer tags", {"answer": "<answer>Yes.</answer>"}, ("", "Yes.")),
    ("column of its own", {"reasoning": "Hm.", "answer": "Yes."}, ("Hm.", "Yes.")),
    ("tags in the column", {"reasoning": "<think>Hm.</think>", "answer": "Yes."}, ("Hm.", "Yes.")),
    ("column and tags, the same", {"reasoning": "Hm.", "answer": "<think>Hm.</think>Yes."}, ("Hm.", "Yes.")),
    ("column and tags", {"reasoning": "First.", "answer": "<think>Hm.</think>Yes."}, ("First.\n\nHm.", "Yes.")),
    ("two columns", {"cot": "First.", "explanation": "Second.", "answer": "Yes."}, ("First.\n\nSecond.", "Yes.")),
    *((name, {name: "Hm.", "answer": "Yes."}, ("Hm.", "Yes.")) for name in (
        "reasoning_content", "thinking", "thought", "cot", "Chain of Thought", "rationale", "explanation", "exp", "Complex_CoT")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "expected"), [c[1:] for c in REASONED], ids=[c[0] for c in REASONED]
)
def test_reasoning_is_split_off(row: dict[str, Any], expected: tuple[str, str]) -> None:
    record = converted({"question": Q, **row})
    assert (record.reasoning, record.response) == expected


def test_reasoning_is_split_off_in_every_format() -> None:
    text = "<think>Hm.</think>Yes."
    turns = [USER, {"role": "assistant", "content": text}]
    expected = {"reasoning": "Hm.", "response": "Yes."}
    check(converted({"messages": turns}), expected)
    check(converted({"question": Q, "final_answer": text}), {"reasoning": "Hm."})
    check(converted({"prompt": Q, "response": text, "kind": "benign"}), expected)
    sides = {"prompt": Q, "chosen": text, "rejected": "<think>No.</think>Perhaps."}
    check(converted(sides), {"chosen": "Yes.", "rejected": "Perhaps.", "reasoning": "Hm."})
    choice = {"question": Q, "options": ABC, "answer": "B", "explanation": "Hm."}
    check(converted(choice), {"reasoning": "Hm.", "answer_idx": "B"})
    choice = {"question": Q, "options": ABC, "output": "<think>Hm.</think>The answer is B."}
    check(converted(choice), {"reasoning": "Hm.", "answer_idx": "B"})


# ---- dialogues

DIALOGUES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("messages", {"messages": [USER, ANSWER]}, {"question": Q, "response": R, "later": []}),
    ("system turn", {"messages": [SYSTEM, USER, ANSWER]}, {"system": "Be brief."}),
    ("developer turn", {"messages": [{**SYSTEM, "role": "developer"}, USER, ANSWER]}, {"system": "Be brief."}),
    ("empty system turn", {"messages": [{"role": "system", "content": ""}, USER, ANSWER]}, {"system": "", "question": Q}),
    ("system column", {"system": "Be brief.", "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": R}]}, {"system": "Be brief.", "response": R}),
    ("from and value in messages", {"messages": [{"from": "human", "value": Q}, {"from": "gpt", "value": R}]}, {"response": R}),
    ("role and content in conversations", {"conversations": [USER, ANSWER]}, {"response": R}),
    ("conversation, singular", {"conversation": [USER, ANSWER]}, {"response": R}),
    ("patient and doctor", {"dialogue": [{"speaker": "Patient", "text": Q}, {"speaker": "Doctor", "text": R}]}, {"question": Q, "response": R}),
    ("roles as keys", {"conversation": [{"human": Q, "assistant": R}, {"human": "And?", "assistant": "So."}]}, {"response": R, "later": [Exchange("And?", "So.")]}),
    ("utterances", {"utterances": ["patient: Why?", "doctor: Because."]}, {"question": Q, "response": R}),
    ("text in a CSV cell", {"messages": json.dumps([USER, ANSWER])}, {"response": R}),
    ("Python literal in a CSV cell", {"messages": str([USER, ANSWER])}, {"response": R}),
    ("object of lists", {"conversations": {"from": ["human", "gpt"], "value": [Q, R]}}, {"response": R}),
    ("three exchanges", {"messages": [USER, ANSWER, *AGAIN, *AGAIN]}, {"response": R, "later": [MORE, MORE]}),
    ("open question at the end", {"messages": [USER, ANSWER, AGAIN[0]]}, {"response": R, "later": [], "has_open_question": True}),
    ("SlimOrca's weights", {"conversations": [{"from": "human", "value": Q, "weight": 0.0}, {"from": "gpt", "value": R, "weight": 1.0}]}, {"response": R}),
    ("input as turns", {"input": [USER], "output": f"<think>Hm.</think>{R}", "reasoning": "on", "system_prompt": "S"}, {"question": Q, "response": R, "reasoning": "Hm.", "system": "S"}),
    ("parts", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why"}, {"type": "text", "text": "so?"}]}, ANSWER]}, {"question": "Why\nso?"}),
    ("reasoning in a turn", {"messages": [USER, {**ANSWER, "reasoning_content": "Hm."}]}, {"reasoning": "Hm.", "response": R}),
    ("null tool calls", {"messages": [{**USER, "tool_calls": None}, {**ANSWER, "tool_calls": []}]}, {"response": R}),
    ("two turns of one role", {"messages": [USER, {"role": "user", "content": "Please."}, ANSWER]}, {"question": f"{Q}\n\nPlease."}),
    ("answer as the reference", {"conversations": [USER, ANSWER], "answer": "B"}, {"reference": "B", "response": R}),
    ("answer that is an object", {"conversations": [USER, ANSWER], "answer": {"content": "B"}}, {"reference": ""}),
    ("prompt repeats the question", {"prompt": Q, "messages": [USER, ANSWER]}, {"question": Q}),
    ("answer in a column", {"messages": [USER], "response": R}, {"question": Q, "response": R}),
    ("passage beside the dialogue", {"messages": [USER, ANSWER], "context": "c"}, {"context": "c"}),
    ("history repeated by the dialogue", {"messages": [USER, ANSWER, AGAIN[0]], "response": "Rest.", "history": [[Q, R]]}, {"history": [Exchange(Q, R)], "response": "Rest."}),
    ("system turn in the history", {"system": "S", "question": Q, "answer": R, "history": [SYSTEM, *AGAIN]}, {"system": "S\n\nBe brief.", "history": [Exchange("And then?", "Rest.")]}),
    ("reference of several exchanges", {"messages": [USER, ANSWER, *AGAIN], "answer": "B"}, {"reference": "", "later": [MORE]}),
    ("HH text", {"conversation": f"Human: {Q}\n\nAssistant: {R}\n\nHuman: And then?\n\nAssistant: Rest."}, {"response": R, "later": [MORE]}),
    ("pairs", {"conversations": [[Q, R], ["And then?", "Rest."]]}, {"response": R, "later": [MORE]}),
    ("reasoning in every turn", {"messages": [USER, {**ANSWER, "content": f"<think>Hm.</think>{R}"}, AGAIN[0], {**AGAIN[1], "reasoning_content": "Well."}]}, {"reasoning": "Hm.", "response": R, "later": [Exchange("And then?", "Rest.", "Well.")]}),
    ("reasoning repeated in a column", {"messages": [USER, {**ANSWER, "reasoning": "Hm, so."}, *AGAIN], "reasoning": "Hm, so."}, {"reasoning": "Hm, so.", "later": [MORE]}),
    ("reasoning in the history", {"instruction": Q, "output": R, "history": [["a", "<think>Hm.</think>b"]]}, {"history": [Exchange("a", "b", "Hm.")]}),
    ("weight of the second answer", {"messages": [USER, ANSWER, AGAIN[0], {**AGAIN[1], "weight": 0}]}, {"response": R, "later": [MORE._replace(is_trained=False)]}),
    ("weight of the first answer", {"messages": [USER, {**ANSWER, "weight": 0}, AGAIN[0], {**AGAIN[1], "weight": 1}]}, {"history": [Exchange(Q, R, is_trained=False)], "question": "And then?", "response": "Rest.", "later": []}),
    ("open question after two answers", {"messages": [USER, ANSWER, *AGAIN, AGAIN[0]]}, {"later": [MORE], "has_open_question": True}),
    ("history repeats the first exchange", {"messages": [USER, ANSWER, *AGAIN], "history": [[Q, R]]}, {"history": [], "question": Q, "later": [MORE]}),
    ("history repeats the dialogue", {"messages": [USER, ANSWER, *AGAIN], "history": [[Q, R], ["And then?", "Rest."]]}, {"history": [], "question": Q, "later": [MORE]}),
    ("history before the dialogue", {"messages": [USER, ANSWER], "history": [["a", "b"]]}, {"history": [Exchange("a", "b")]}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "expected"), [c[1:] for c in DIALOGUES], ids=[c[0] for c in DIALOGUES]
)
def test_dialogues(row: dict[str, Any], expected: dict[str, Any]) -> None:
    check(converted(row), expected)


# ---- preferences

GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))
NEXT = {"role": "user", "content": "And for my dog?"}
SIDES = {"question": Q, "chosen": "good", "rejected": "bad", "history": []}
LONGER = {
    "question": "And for my dog?",
    "history": [Exchange(Q, R)],
    "chosen": "good",
    "rejected": "bad",
}
PREFERENCES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("text", {"prompt": Q, "chosen": "good", "rejected": "bad"}, SIDES),
    ("question", {"question": Q, "system": "S", "chosen": "good", "rejected": "bad"}, SIDES | {"system": "S"}),
    ("answers as turns", {"prompt": Q, "chosen": [GOOD], "rejected": [BAD]}, SIDES),
    ("one turn as an object", {"prompt": Q, "chosen": GOOD, "rejected": BAD}, SIDES),
    ("with the prompt", {"prompt": Q, "chosen": [USER, GOOD], "rejected": [USER, BAD]}, SIDES),
    ("without a prompt column", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, SIDES),
    ("prompt as turns", {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, SIDES | {"system": "Be brief."}),
    ("two exchanges", {"prompt": Q, "chosen": [USER, ANSWER, NEXT, GOOD], "rejected": [USER, ANSWER, NEXT, BAD]}, LONGER),
    ("two exchanges in the prompt", {"prompt": [USER, ANSWER, NEXT], "chosen": [GOOD], "rejected": [BAD]}, LONGER),
    ("prompt is the last question", {"prompt": "And for my dog?", "chosen": [USER, ANSWER, NEXT, GOOD], "rejected": [USER, ANSWER, NEXT, BAD]}, LONGER),
    ("exchanges after the prompt", {"prompt": Q, "chosen": [ANSWER, NEXT, GOOD], "rejected": [ANSWER, NEXT, BAD]}, LONGER),
    ("chosen repeated in messages", {"prompt": Q, "messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, SIDES),
    ("chosen only in messages", {"messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, SIDES),
    ("HH", {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {R}\n\nHuman: And for my dog?\n\nAssistant: good", "rejected": f"\n\nHuman: {Q}\n\nAssistant: {R}\n\nHuman: And for my dog?\n\nAssistant: bad"}, LONGER),
    ("HH prompt", {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": "good", "rejected": "bad"}, SIDES),
    ("history column", {"prompt": "And for my dog?", "history": [[Q, R]], "chosen": "good", "rejected": "bad"}, LONGER),
    ("from and value", {"conversations": [{"from": "human", "value": Q}], "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}, SIDES),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "expected"), [c[1:] for c in PREFERENCES], ids=[c[0] for c in PREFERENCES]
)
def test_preferences(row: dict[str, Any], expected: dict[str, Any]) -> None:
    check(converted(row), expected)


# ---- multiple choice

B = {"options": ABC, "answer_idx": "B", "reference": "spleen"}
CHOICES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dict", {"options": ABC, "answer_idx": "B"}, B),
    ("list", {"options": LIST, "answer": "B"}, B),
    ("choices", {"choices": LIST, "answer": "B"}, B),
    ("key and value", {"options": [{"key": k, "value": v} for k, v in ABC.items()], "answer_idx": "B"}, B),
    ("label and text", {"options": [{"label": k, "text": v} for k, v in ABC.items()], "answer": "B"}, B),
    ("id and content", {"options": [{"id": k, "content": v} for k, v in ABC.items()], "answer": "B"}, B),
    ("letter and option", {"options": [{"letter": k, "option": v} for k, v in ABC.items()], "answer": "B"}, B),
    ("option and text", {"options": [{"option": k, "text": v} for k, v in ABC.items()], "answer": "B"}, B),
    ("only texts", {"options": [{"text": v} for v in LIST], "answer": "B"}, B),
    ("one key each", {"options": [{k: v} for k, v in ABC.items()], "answer": "B"}, B),
    ("number as id", {"options": [{"id": n, "text": v} for n, v in enumerate(LIST, 1)], "answer": 2}, B),
    ("marked as right", {"options": [{"text": v, "is_correct": v == "spleen"} for v in LIST]}, B),
    ("ARC", {"choices": {"text": LIST, "label": ["A", "B", "C"]}, "answerKey": "B"}, B),
    ("ARC with digits", {"choices": {"text": LIST, "label": ["1", "2", "3"]}, "answerKey": "2"}, B),
    ("datasets' sequence", {"options": {"key": ["A", "B", "C"], "value": LIST}, "answer_idx": "B"}, B),
    ("columns A to C", {"A": "liver", "B": "spleen", "C": "lung", "answer": "B"}, B),
    ("option_a", {"option_a": "liver", "option_b": "spleen", "option_c": "lung", "answer": "b"}, B),
    ("Option A", {"Option A": "liver", "Option B": "spleen", "Option C": "lung", "Correct Answer": "B"}, B),
    ("Choice A and Answer_label", {"Choice A": "A: liver", "Choice B": "B: spleen", "Choice C": "C: lung", "Answer_label": "B"}, B),
    ("opa", {"opa": "liver", "opb": "spleen", "opc": "lung", "opd": "", "cop": 1}, B),
    ("opa to ope", {"opa": "a", "opb": "b", "opc": "c", "opd": "d", "ope": "e", "cop": 4}, {"answer_idx": "E", "reference": "e"}),
    ("option1", {"option1": "liver", "option2": "spleen", "option3": "lung", "answer": 2}, B),
    ("choice_1", {"choice_1": "liver", "choice_2": "spleen", "choice_3": "lung", "answer": "2"}, B),
    ("ending0", {"sent1": Q, "sent2": "", "ending0": "liver", "ending1": "spleen", "ending2": "lung", "label": 1}, B),
    ("answer_a and correct_answers", {"answer_a": "liver", "answer_b": "spleen", "answer_c": "lung", "correct_answers": ["b"]}, B),
    ("HEAD-QA", {"qtext": Q, "answers": [{"aid": 1, "atext": "liver"}, {"aid": 2, "atext": "spleen"}, {"aid": 3, "atext": "lung"}], "ra": 2}, B),
    ("letters in another order", {"options": {"B": "spleen", "C": "lung", "A": "liver"}, "answer": "B"}, B),
    ("lower-case keys", {"options": {"a": "liver", "b": "spleen", "c": "lung"}, "answer": "B"}, B),
    ("digit keys", {"options": {"1": "liver", "2": "spleen", "3": "lung"}, "answer": "2"}, B),
    ("digit keys and a number", {"options": {"0": "liver", "1": "spleen", "2": "lung"}, "answer": 1}, B),
    ("odd key", {"options": {"A": "liver", "B": "spleen", "C<b>": "lung"}, "answer": "C<b>"}, {"options": ABC, "answer_idx": "C"}),
    ("JSON in a cell", {"options": json.dumps(ABC), "answer": "B"}, B),
    ("Python literal in a cell", {"options": str(LIST), "answer": "B"}, B),
    ("text in a cell", {"options": "A) liver B) spleen C) lung", "answer": "B"}, B),
    ("commas in a cell", {"options": "A: liver, B: spleen, C: lung", "answer": "B"}, B),
    ("keys with brackets", {"options": {"(A)": "liver", "(B)": "spleen", "(C)": "lung"}, "answer": "B"}, B),
    ("labels with a full stop", {"options": [{"label": f"{k}.", "text": v} for k, v in ABC.items()], "answer": "b"}, B),
    ("words as keys", {"options": {"option_a": "liver", "option_b": "spleen", "option_c": "lung"}, "answer": "B"}, B),
    ("word as the answer", {"options": ABC, "answer": "option_b"}, B),
    ("lines in a cell", {"options": "A. liver\nB. spleen\nC. lung", "answer": "B"}, B),
    ("brackets in a cell", {"options": "(A) liver (B) spleen (C) lung", "answer": "B"}, B),
    ("heading in a cell", {"options": "Answer Choices:\nA. liver\nB. spleen\nC. lung", "answer": "B"}, B),
    ("E. coli on a line", {"options": "A. S. aureus\nB. E. coli\nC. C. tetani", "answer": "B"}, {"reference": "E. coli"}),
    ("labels in the texts", {"options": ["A. liver", "B. spleen", "C. lung"], "answer": "B"}, B),
    ("labels in keys and texts", {"options": {"A": "A) liver", "B": "B) spleen", "C": "C) lung"}, "answer": "B"}, B),
    ("decimals are not labels", {"options": ["1.5 mg", "2.5 mg", "3.5 mg"], "answer": "B"}, {"reference": "2.5 mg"}),
    ("index where options are the same numbers", {"options": ["1", "2", "3"], "answer": 1}, {"answer_idx": "B", "reference": "2"}),
    ("index in text where options are numbers", {"options": ["1", "2", "3"], "cop": "1"}, {"answer_idx": "B"}),
    ("numbers as options", {"options": [5, 10, 15], "answer": 10}, {"answer_idx": "B", "reference": "10"}),
    ("null option at the end", {"options": {**ABC, "D": None, "E": None}, "answer": "B"}, B),
    ("null option before the right one", {"options": ["liver", None, "spleen", "lung"], "answer": 2}, B),
    ("eleven options", {"options": [f"o{n}" for n in range(11)], "answer": "K", "answer_index": 10}, {"answer_idx": "K", "reference": "o10"}),
    ("26 options", {"options": [f"o{n}" for n in range(26)], "answer": "Z"}, {"answer_idx": "Z"}),
    ("same text twice", {"options": ["liver", "liver", "lung"], "answer": "C"}, {"answer_idx": "C"}),
    ("text of the option", {"options": LIST, "answer": "Spleen."}, B),
    ("text that is a letter", {"options": {"A": "D", "B": "C", "C": "B"}, "answer": "C", "answer_idx": "B"}, {"answer_idx": "B", "reference": "C"}),
    *((f"answer {text}", {"options": LIST, "answer": text}, B) for text in (
        "b", "(B)", "B.", "B)", "[B]", "Option B", "option (b)", "B) spleen", "B. Spleen", "B: spleen", "Answer: B", "The answer is B.", " B ")),
    *((f"column {name}", {"options": LIST, name: "B"}, B) for name in (
        "correct_answer", "correct_option", "Correct Option", "answerKey", "gold", "target", "label", "answer_letter", "correct", "ground_truth", "final_answer")),
    ("index", {"options": LIST, "answer": 1}, B),
    ("index as text", {"options": LIST, "answer": "1"}, B),
    ("index as a float", {"options": LIST, "answer": 1.0}, B),
    ("index as a float in text", {"options": LIST, "answer": "1.0"}, B),
    ("one-hot", {"options": LIST, "labels": [0, 1, 0]}, B),
    ("one-hot of bools", {"options": LIST, "answer": [False, True, False]}, B),
    ("list of one", {"options": LIST, "answer": ["B"]}, B),
    ("list of one index", {"options": LIST, "gold": [1]}, B),
    ("letter, index and text agree", {"options": LIST, "answer": "spleen", "answer_idx": "B", "answer_index": 1}, B),
    ("bool", {"options": ["yes", "no", "true", "false"], "answer": True}, {"reference": "true"}),
    ("final_decision", {"final_decision": "no"}, {"answer_idx": "B", "options": {"A": "yes", "B": "no", "C": "maybe"}}),
    ("response explains", {"options": LIST, "answer": "B", "response": "It filters the blood."}, B | {"response": "It filters the blood.\n\nThe answer is B. spleen"}),
    ("answer explains", {"options": LIST, "answer": "Spleen. Explanation: it filters the blood.", "reasoning": "Hm."}, B | {"response": "Spleen. Explanation: it filters the blood.\n\nThe answer is B. spleen", "reasoning": "Hm."}),
    ("letter, text and explanation", {"options": LIST, "answer": "B) spleen. It filters the blood, as you know."}, B | {"response": "B) spleen. It filters the blood, as you know.\n\nThe answer is B. spleen"}),
    ("one option begins another", {"options": ["liver", "liver. lobe", "lung"], "answer": "Liver. lobe: it is."}, {"answer_idx": "B"}),
    ("columns in one column", {"data": {"Question": Q, "Options": ABC, "Correct Option": "B", "Correct Answer": "Spleen"}}, B),
    ("AfriMedQA", {"answer_options": '{"option1": "liver", "option2": "spleen", "option3": "lung"}', "correct_answer": "option2"}, B),
    ("text that is a letter, where labels are digits", {"options": {"1": "C", "2": "A", "3": "D"}, "answer": "C"}, {"answer_idx": "A", "reference": "C"}),
    ("letter where labels are digits", {"option1": "liver", "option2": "spleen", "option3": "lung", "answer_id": "B", "answer": "spleen"}, B),
    ("label and space on each line", {"options": "A liver\nB spleen\nC lung", "answer": "B"}, B),
    ("one-hot in a cell", {"options": LIST, "labels": "[0, 1, 0]"}, B),
    ("list in a cell", {"options": LIST, "answer": "['B']"}, B),
    ("response is the letter", {"options": LIST, "output": "B"}, B | {"response": "The answer is B. spleen"}),
    ("label that is a topic", {"options": LIST, "answer": "B", "label": "anatomy"}, B),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), [c[1:] for c in CHOICES], ids=[c[0] for c in CHOICES])
def test_multiple_choice(row: dict[str, Any], expected: dict[str, Any]) -> None:
    record = converted({"question": Q, **row} if "qtext" not in row and "sent1" not in row else row)
    check(record, {"question": Q, "kind": "multiple_choice", **expected})
    assert record.reference == record.options[record.answer_idx]


@pytest.mark.parametrize(("number", "reference"), [(1, "liver"), ("3", "lung"), (2.0, "spleen")])
def test_index_from_one(number: Any, reference: str) -> None:
    row = {"question": Q, "options": LIST, "answer": number}
    assert converted(row, base=one_based).reference == reference


# ---- rejected rows

C = {"question": Q, "options": LIST}
REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"question": Q, "answer": " \u200b\ufeff"}, "answer is empty"),
    ({"question": "\u2060", "answer": R}, "question is empty"),
    ({"question": 5, "answer": R}, "question is not text (int)"),
    ({"question": Q, "answer": True}, "answer is not text (bool)"),
    ({"question": Q, "response": {"a": 1}}, "turn 1 of response does not say whose it is"),
    ({"question": Q, "answers": ["a", "b"]}, "answers has different answers (2)"),
    ({"question": Q, "prompt": "Other?", "answer": R}, "question and prompt differ"),
    ({"question": Q, "response": R, "output": "Other."}, "response and output differ"),
    ({"question": f"a{MARK}", "answer": R}, "question is not UTF-8"),
    ({"question": Q, "answer": f"a{MARK}"}, "answer is not UTF-8"),
    ({"question": Q, "context": {"contexts": ["a", MARK]}, "answer": R}, "context is not UTF-8"),
    ({"question": Q, "context": {"odd": "a"}, "answer": R}, "context is an object without a text (1 keys)"),
    ({"question": Q, "answer": "a\0b"}, "answer contains a NUL character"),
    ({"question": Q, "answer": R, "history": [["a", MARK]]}, "turn 1 of history is not UTF-8"),
    ({"question": Q, "answer": R, "history": [["a", "b", "c"]]}, "turn 1 of history has 3 texts instead of 2"),
    ({"question": Q, "answer": R, "history": [USER]}, "history ends with a question"),
    ({"question": Q, "Question": "Other?", "answer": R}, "two columns have the same name"),
    ({"question": Q, "answer": R, "image": {"bytes": b"x"}}, "the row has image, which medjob cannot use"),
    ({"question": Q, "answer": R, "tools": '[{"name": "x"}]'}, "the row has tools, which medjob cannot use"),
    ({"question": Q, "answer": R, "audio": "x.wav"}, "the row has audio, which medjob cannot use"),
    ({"question": Q, "answer": "<think>Hm. Yes."}, "response has reasoning without an end"),
    ({"question": Q, "answer": "<think>Hm.</think>"}, "response has reasoning, but no answer"),
    ({"question": Q, "answer": "## Thinking\n\nHm."}, "response has 0 answer headings after its reasoning"),
    ({"question": Q, "answer": "<think>a</think>b<think>c</think>d"}, "response has a reasoning tag inside the answer"),
    ({"question": Q, "answer": "Yes. <think>Hm.</think>"}, "response has a reasoning tag inside the answer"),
    ({"question": Q, "answer": "<answer>Yes."}, "response has <answer> without its end"),
    ({"question": Q, "reasoning": {"a": 1}, "answer": R}, "reasoning is not text (dict)"),
    ({"question": Q, "reasoning": ["a", 1], "answer": R}, "reasoning is not text (int)"),
    ({"question": Q, "answer": "<|channel|>commentary<|message|>a<|end|>"}, "response has channels other than analysis and final"),
    ({"prompt": Q, "completion": R, "label": False}, "label is false, so the answer is a bad one"),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "every answer of messages is marked as not to be trained on"),
    ({"question": Q, "correct_answer": R, "distractor1": "a", "distractor2": "b"}, "the row has distractor1, which medjob cannot use"),
    # dialogues
    ({"messages": [USER]}, "messages has no answer"),
    ({"messages": [USER, ANSWER, *AGAIN], "reasoning": "Hm."}, "the reasoning can belong to 2 answers"),
    ({"messages": [ANSWER, USER, ANSWER]}, "messages does not begin with a question"),
    ({"messages": [USER, SYSTEM, ANSWER]}, "messages has a system turn after the first turn"),
    ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "turn 2 of messages is from a tool, which medjob cannot use"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [{"id": 1}]}]}, "turn 2 of messages has tool_calls, which medjob cannot use"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]}, "turn 1 of messages has a part of type image_url, which medjob cannot use"),
    *(({"messages": [USER, {"role": role, "content": "x"}, ANSWER]}, "turn 2 of messages is from a tool, which medjob cannot use") for role in (
        "function", "observation", "ipython", "tool_response", "function_call")),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}, *AGAIN]}, "turn 2 of messages has tool_calls, which medjob cannot use"),
    ({"messages": [USER, {**ANSWER, "function_call": {"name": "x"}}]}, "turn 2 of messages has function_call, which medjob cannot use"),
    ({"messages": [USER, ANSWER, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, ANSWER]}, "turn 3 of messages has a part of type image, which medjob cannot use"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "tool_use", "name": "x"}]}]}, "turn 2 of messages has a part of type tool_use, which medjob cannot use"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "SECRET", "name": "x"}]}]}, "turn 2 of messages has a part that is not text"),
    ({"messages": [{**USER, "images": ["x.png"]}, ANSWER]}, "turn 1 of messages has images, which medjob cannot use"),
    ({"messages": [USER, ANSWER, AGAIN[0]], "reasoning": "Hm."}, "the reasoning can belong to 2 answers"),
    ({"messages": [USER, {**ANSWER, "weight": 0}, AGAIN[0], {**AGAIN[1], "weight": 0}]}, "every answer of messages is marked as not to be trained on"),
    ({"prompt": Q, "completion": [{**ANSWER, "weight": 0}]}, "completion is marked as not to be trained on"),
    ({"messages": [{"role": "narrator", "content": "x"}, ANSWER]}, "turn 1 of messages has an unknown role"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, "turn 2 of messages is null"),
    ({"messages": [USER, 5]}, "turn 2 of messages is not an object (int)"),
    ({"messages": ["Why?", "So."]}, "turn 1 of messages does not say whose it is"),
    ({"messages": [USER, {**ANSWER, "content": MARK}]}, "turn 2 of messages is not UTF-8"),
    ({"messages": '[{"role": "user"'}, "messages cannot be parsed"),
    ({"messages": [USER, ANSWER], "question": "Another?"}, "question is not in messages"),
    ({"messages": [USER, ANSWER], "response": "Another."}, "the response is not in messages"),
    ({"messages": [USER, ANSWER], "conversations": [USER, GOOD]}, "messages and conversations differ"),
    # preferences
    ({"prompt": Q, "chosen": "good", "rejected": ""}, "rejected is empty"),
    ({"prompt": Q, "chosen": None, "rejected": "bad"}, "chosen is null"),
    ({"prompt": Q, "chosen": "good", "rejected": " good"}, "chosen and rejected are the same answer"),
    ({"chosen": "good", "rejected": "bad"}, "chosen has no question before its last answer"),
    ({"chosen": [USER, ANSWER, NEXT, GOOD], "rejected": [USER, BAD]}, "chosen and rejected differ before the last answer"),
    ({"chosen": [USER, ANSWER, NEXT], "rejected": [USER, BAD]}, "chosen does not end with an answer"),
    ({"prompt": [USER, ANSWER], "chosen": [GOOD], "rejected": [BAD]}, "chosen has no question before its last answer"),
    ({"prompt": "Other?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "the prompt is not in chosen"),
    ({"prompt": Q, "chosen": ["a", "b"], "rejected": "bad"}, "turn 1 of chosen does not say whose it is"),
    ({"prompt": Q, "chosen": MARK, "rejected": "bad"}, "chosen is not UTF-8"),
    # multiple choice
    (C, "answer_idx is missing"),
    ({"question": Q, "options": None, "answer_idx": "B", "answer": "B"}, "options are missing"),
    ({"question": Q, "options": [], "answer": "B", "cop": 1}, "options are missing"),
    (C | {"answer": "B", "response": "It is large, so the answer is C."}, "the response names another option than the right one"),
    (C | {"answer": None}, "answer is null"),
    (C | {"answer": "E"}, "answer is not one of the options"),
    (C | {"answer": 3}, "answer is not one of the options"),
    (C | {"answer": -1}, "answer is -1, so the right option is unknown"),
    (C | {"answer": 1.5}, "answer is not one of the options"),
    (C | {"answer": "B) lung"}, "answer is not one of the options"),
    (C | {"answer": ["A", "C"]}, "several options are right (2 values in answer)"),
    (C | {"answer": [1, 1, 0]}, "several options are right (3 values in answer)"),
    (C | {"answer": "A,C"}, "several options are right (2 labels in answer)"),
    (C | {"answer": "A and C"}, "several options are right (2 labels in answer)"),
    (C | {"answer": "AC"}, "several options are right (2 labels in answer)"),
    (C | {"answer": "A", "answer_idx": "B"}, "answer_idx and answer mean different options"),
    (C | {"answer": "lung", "answer_idx": 1}, "answer_idx and answer mean different options"),
    (C | {"answer": {"key": "B"}}, "answer is not text (dict)"),
    ({"question": Q, "options": ["1", "2", "3"], "answer": "1"}, "answer fits 2 options"),
    ({"question": Q, "options": [1, 2, 3], "answer": 1}, "answer fits 2 options"),
    ({"question": Q, "options": ["liver", "Liver", "lung"], "answer": "LIVER"}, "answer fits 2 options"),
    ({"question": Q, "options": ["liver", "lung", None], "answer": "C"}, "answer means an option that is empty"),
    ({"question": Q, "options": {"A": "liver"}, "answer": "A"}, "options are missing (1 found)"),
    ({"question": Q, "options": [f"o{n}" for n in range(27)], "answer": "A"}, "too many options (27"),
    ({"question": Q, "options": "liver, lung", "answer": "A"}, "options cannot be parsed"),
    ({"question": Q, "options": "A. vitamin B. complex B. iron", "answer": "A"}, "options cannot be parsed (label 2 occurs twice)"),
    ({"question": Q, "options": "A) liver B) spleen D) lung", "answer": "A"}, "options cannot be parsed (label 3 is missing)"),
    ({"question": Q, "options": "[1,", "answer": "A"}, "options cannot be parsed"),
    ({"question": Q, "options": "[" * 100_000, "answer": "A"}, "options cannot be parsed"),
    ({"question": Q, "options": "__import__('os')", "answer": "A"}, "options cannot be parsed"),
    ({"question": Q, "options": 5, "answer": "A"}, "options is not a list of options (int)"),
    ({"question": Q, "options": [{"odd": 1, "odder": 2}], "answer": "A"}, "option 1 of options has no text, label or key"),
    ({"question": Q, "options": [{"text": "a"}, "b"], "answer": "A"}, "options mixes objects and str"),
    ({"question": Q, "options": {"text": ["a", "b"], "label": ["A"]}, "answer": "A"}, "options has 2 texts, but 1 labels"),
    ({"question": Q, "options": {"A": ["a"], "B": ["b"]}, "answer": "A"}, "options is an object of lists without a list of texts"),
    ({"question": Q, "options": {"A": {"a": 1}, "B": "b"}, "answer": "A"}, "option is not text (dict)"),
    ({"question": Q, "options": ["a", MARK], "answer": "A"}, "option is not UTF-8"),
    ({"question": Q, "opa": "a", "opb": "b", "opd": "d", "cop": 1}, "the columns of the options have gaps"),
    ({"question": Q, "options": [{"text": v, "correct": True} for v in LIST]}, "several options are right (3 are marked)"),
    (C | {"answer": "B", "messages": [USER, ANSWER]}, "the row has messages, which multiple_choice would drop"),
    (C | {"answer": "B", "complex_cot": 5}, "complex_cot is not text (int)"),
    ({"prompt": Q, "chosen": "a", "rejected": "b", "options": LIST}, "the row has options, which preference would drop"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason"), REJECTED, ids=[f"{i} {c[1][:50]}" for i, c in enumerate(REJECTED)]
)
def test_rejected_rows_have_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRow) as rejected:
        converted(row)
    assert str(rejected.value).startswith(reason)


@pytest.mark.parametrize(
    ("row_format", "row", "reason"),
    [
        ("instruction", C | {"answer": "B"}, "the row has options, which instruction would drop"),
        ("medical_o1", {"question": Q, "response": R}, "complex_cot is missing"),
        ("verifiable", {"question": Q, "answer": R}, "ground_true_answer is missing"),
        ("messages", {"question": Q, "answer": R}, "messages is missing"),
        ("conversations", {"conversations": "text"}, "conversations is not a list of turns"),
        ("multiple_choice", {"question": Q, "answer": R}, "options are missing"),
        ("preference", {"question": Q, "answer": R}, "chosen is missing"),
        (
            "instruction",
            {"prompt": Q, "response": R, "chosen": "a", "rejected": "b"},
            "the row has chosen and rejected, which instruction would drop",
        ),
        (
            "safety",
            {"prompt": Q, "response": R, "kind": "Jane Roe"},
            "kind is neither harmful nor benign",
        ),
    ],
)
def test_rows_that_do_not_fit_the_set_format(
    row_format: str, row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnusableRow, match=f"^{reason}"):
        converted(row, row_format)


@pytest.mark.parametrize("row", [{"colour": "red"}, {"text": R}, {"id": 1, "label": "x"}])
def test_unknown_columns_have_no_format(row: dict[str, Any]) -> None:
    assert detect(Row(row)) is None


# ---- whole files


def cleaned(
    folder: Path, files: dict[str, list[Any]], role: Role = "sources", **options: Any
) -> tuple[list[Record], list[dict[str, Any]]]:
    """Return the records and the rejected rows of a folder of JSON Lines files."""
    data = folder / "data"
    data.mkdir()
    for name, rows in files.items():
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(path=str(data), **options)
    rejected = io.StringIO()
    rejected.name = "rejected.jsonl"
    table = clean(
        [source],
        {source.key: locate(source, {}, folder)},
        folder / "clean.parquet",
        Rejections(rejected),
        0,
        lambda rows: None,
        role,
    )
    records = [record for record, _ in table.records()]
    return records, [json.loads(line) for line in rejected.getvalue().splitlines()]


def medmcqa(*answers: int, **more: Any) -> list[dict[str, Any]]:
    options = {"opa": "w", "opb": "x", "opc": "y", "opd": "z"}
    return [{"question": f"Q{n}?", **options, "cop": n, **more} for n in answers]


def test_format_is_detected_for_each_row(tmp_path: Path) -> None:
    rows = [
        {"question": Q, "answer": R},
        {"question": "Which?", "options": LIST, "answer": "B"},
        {"messages": [{"role": "user", "content": "How?"}, ANSWER]},
        {"colour": "red"},
        {"question": "Where?", "complex_cot": "Hm.", "response": R},
    ]
    records, rejected = cleaned(tmp_path, {"x.jsonl": rows})
    assert [record.kind for record in records] == ["open", "multiple_choice", "open", "open"]
    assert records[1].options == ABC
    assert records[3].reasoning == "Hm."
    reason = "the columns match no known format (1 columns; known: none)"
    assert rejected == [{"file": "x.jsonl", "line": 4, "reason": reason}]


@pytest.mark.parametrize(
    ("answers", "references"),
    [((0, 1, 2), ["w", "x", "y"]), ((1, 2, 4), ["w", "x", "z"]), ((3, 0), ["z", "w"])],
)
def test_index_base_is_decided_over_the_whole_column(
    answers: tuple[int, ...], references: list[str], tmp_path: Path
) -> None:
    records, _ = cleaned(tmp_path, {"x.jsonl": medmcqa(*answers)}, "evaluation")
    assert [record.reference for record in records] == references


def test_index_base_is_read_past_the_limit(tmp_path: Path) -> None:
    records, _ = cleaned(tmp_path, {"x.jsonl": medmcqa(1, 2, 3, 4)}, "evaluation", limit=2)
    assert [record.reference for record in records] == ["w", "x"]


def test_other_answer_columns_show_the_index_base(tmp_path: Path) -> None:
    rows = [
        {"question": "One?", "options": LIST, "answer": "B", "answer_index": 1},
        {"question": "Two?", "options": LIST, "answer": "C", "answer_index": 2},
        {"question": "Three?", "options": LIST, "answer": None, "answer_index": 1},
    ]
    records, _ = cleaned(tmp_path, {"x.jsonl": rows}, "evaluation")
    assert [record.answer_idx for record in records] == ["B", "C", "B"]


def test_file_without_evidence_follows_the_others(tmp_path: Path) -> None:
    files = {"a.jsonl": medmcqa(2), "b.jsonl": medmcqa(1, 4)}
    records, _ = cleaned(tmp_path, files, "evaluation")
    assert [record.reference for record in records] == ["x", "w", "z"]


def test_each_file_has_its_own_index_base(tmp_path: Path) -> None:
    files = {"a.jsonl": medmcqa(0, 2), "b.jsonl": medmcqa(2, 4)}
    records, _ = cleaned(tmp_path, files, "evaluation")
    assert [record.reference for record in records] == ["w", "y", "x", "z"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            (1, 3, 2),
            "(its values are 1 to 3, and rows have 4 options)",
        ),
        (
            (0, 4, 2),
            "(its values are 0 to 4, and rows have 4 options; some rows only fit 0, and others only fit 1)",
        ),
    ],
)
def test_undecided_index_base_is_refused(
    answers: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as refused:
        cleaned(tmp_path, {"x.jsonl": medmcqa(*answers)}, "evaluation")
    place = "x.jsonl: cannot tell whether cop counts the options from 0 or from 1"
    assert refused.value.message == f"{place} {message}"
    assert "letters" in refused.value.hint


def test_letters_need_no_index_base(tmp_path: Path) -> None:
    rows = [{"question": Q, "options": LIST, "answer": "B"}]
    records, _ = cleaned(tmp_path, {"x.jsonl": rows}, "evaluation")
    assert records[0].reference == "spleen"


def test_unknown_right_options_are_rejected(tmp_path: Path) -> None:
    records, rejected = cleaned(tmp_path, {"x.jsonl": medmcqa(0, -1, 3)}, "evaluation")
    assert [record.reference for record in records] == ["w", "z"]
    assert rejected[0]["reason"] == "cop is -1, so the right option is unknown"


@pytest.mark.parametrize("role", ["sources", "evaluation", "safety"])
def test_preference_rows_belong_in_their_own_list(role: Any, tmp_path: Path) -> None:
    rows = [{"prompt": Q, "chosen": "good", "rejected": "bad"}, {"question": Q, "answer": R}]
    records, rejected = cleaned(tmp_path, {"x.jsonl": rows}, role)
    assert [record.response for record in records] == [R]
    assert "run.prepare.preference_sources" in rejected[0]["reason"]


def test_only_preference_rows_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "good", "rejected": "bad"} for n in range(3)]
    with pytest.raises(DataError, match=r"x.jsonl:1: .*run.prepare.preference_sources"):
        cleaned(tmp_path, {"x.jsonl": rows})


def test_source_without_a_usable_row_is_refused(tmp_path: Path) -> None:
    rows = [{"Jane Roe has a cough": "take 7"}] * 3
    with pytest.raises(DataError, match="none of the 3 rows can be used") as refused:
        cleaned(tmp_path, {"x.jsonl": rows})
    assert "x.jsonl:1: the columns match no known format" in refused.value.message
    assert "Jane" not in str(refused.value)


def test_row_that_breaks_a_converter_is_rejected(tmp_path: Path) -> None:
    nested = "[" * 900 + '"x"' + "]" * 900
    rows: list[Any] = [
        {"question": Q, "answer": R},
        {"question": Q, "context": nested, "answer": R},
    ]
    records, rejected = cleaned(tmp_path, {"x.jsonl": rows})
    assert len(records) == 1
    reason = "cannot be converted (RecursionError)"
    assert rejected == [{"file": "x.jsonl", "line": 2, "reason": reason}]


SECRET = "Jane Roe"
ODD_VALUES = [None, 5, True, 2.5, SECRET, [SECRET], {SECRET: SECRET}, [[SECRET]], [{SECRET: 1}], MARK + SECRET]  # fmt: skip


@pytest.mark.parametrize("column", ["question", "answer", "options", "messages", "chosen", "rejected", "context", "history", "reasoning", "system", "answer_idx", "kind", "instruction", "opa", "final_decision", "conversations", "prompt", "completion", "answers", "image"])  # fmt: skip
def test_odd_values_neither_crash_nor_show_in_reasons(column: str) -> None:
    templates: list[dict[str, Any]] = [
        {"question": Q, "answer": R},
        {"question": Q, "options": LIST, "answer_idx": "B"},
        {"messages": [USER, ANSWER]},
        {"prompt": Q, "chosen": "a", "rejected": "b"},
        {"prompt": Q, "response": R, "kind": "benign"},
        {"question": Q, "complex_cot": "Hm.", "response": R},
        {"question": Q, "opa": "a", "opb": "b", "cop": 1},
    ]
    reasons = []
    for template in templates:
        for value in ODD_VALUES:
            try:
                cells = Row({**template, column: value})
                row_format = detect(cells)
                if row_format:
                    json.dumps(convert(cells, row_format, zero_based).parts).encode()
            except UnusableRow as rejected:
                reasons.append(str(rejected))
    assert not [reason for reason in reasons if SECRET in reason]
