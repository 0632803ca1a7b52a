"""Which columns of known data sets hold the question, the answer, the reasoning and so on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medjob.data.columns import Row, UnusableRow, is_empty, normal_name, to_text, unpacked
from medjob.data.dialogues import is_dialogue
from medjob.data.reasoning import bare_reasoning, join_reasoning

# Columns by what they hold. The first names are those of the formats in the documentation.
QUESTIONS = (
    *("open_ended_verifiable_question", "question", "query", "prompt", "problem"),
    *("question_text", "question_stem", "qtext", "stem", "sent1"),
)
RESPONSES = (
    *("response", "output", "completion", "safe_response", "free_form_answer", "solution"),
    *("reply", "doctor", "assistant"),
)
LONG_ANSWERS = ("long_answer", "ideal_answer")
ANSWERS = ("answer", "answer_text", "answers", "correct_answer")
TRUTHS = (
    *("ground_true_answer", "ground_truth_answer", "ground_truth", "standard_answer"),
    "final_answer",
)
REASONING = (
    *("complex_cot", "reasoning", "reasoning_content", "reasoning_trace", "thinking", "thought"),
    *("thoughts", "cot", "chain_of_thought", "rationale", "answer_rationale", "explanation", "exp"),
)
CONTEXTS = (
    *("context", "contexts", "passage", "passages", "article", "abstract", "background"),
    *("document", "documents", "paragraph", "paragraphs", "snippet", "snippets", "transcript"),
    *("vignette", "scenario", "clinical_case", "case_presentation", "case_report"),
    *("note", "clinical_note", "clinical_notes", "premise"),
)
PATIENTS = ("patient", "user", "human")
_SWITCHES = ("on", "off", "yes", "no", "true", "false", "low", "medium", "high")
"""What a column named `reasoning` says if it only tells whether the answer has any."""
_PASSAGE_KEYS = ("contexts", "context", "sentences", "text", "abstract", "content", "paragraphs")
SYSTEMS = ("system", "system_prompt", "system_message")
DIALOGUES = (
    *("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "chat"),
    "utterances",
)
SUBJECTS = (
    *("subject_name", "subject", "specialty", "discipline", "medical_task", "category"),
    "meta_info",
)
_SUBJECT_LENGTH = 80  # characters. Longer texts are topics of single questions
VERDICTS = ("label", "is_correct", "correct", "accepted")
"""If one of these is false, the answer is a bad one, as in TRL's rows for KTO."""
_FALSE = ("false", "no", "0")
UNUSABLE = (
    *("image", "images", "image_path", "image_paths", "image_url", "image_file", "image_name"),
    *("img", "img_path", "figure_path", "pixel_values", "picture", "jpg", "png"),
    *("audio", "audios", "audio_path", "video", "videos", "video_path"),
    *("tools", "tool_calls", "functions", "function_call", "sent2"),
)
WRONG_ANSWERS = (
    *("distractor1", "distractor_1", "distractors", "incorrect_answers", "wrong_answers"),
)
"""Wrong answers, without a place for the right one among them. Preference rows have their own
answers, and UltraFeedback has such a column in every row."""


def is_false(name: str, value: Any) -> bool:
    """Whether a verdict is negative. A CSV file holds it as text. The numbers of a column named
    `label` are classes more often than verdicts."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value.strip().casefold() in (_FALSE[:1] if name == "label" else _FALSE)
    return name != "label" and isinstance(value, int | float) and value == 0


def question(row: Row) -> str:
    """Join the task, the question and Alpaca's input.

    Raises:
        UnusableRow: there is no question, or two different ones.
    """
    names = (name for name in QUESTIONS if not holds_turns(row, name))
    more = "" if holds_turns(row, "input") else row.text("input")
    texts = (row.text("instruction"), row.text(*names), more)
    joined = "\n\n".join(dict.fromkeys(filter(None, texts))) or row.text(*PATIENTS)
    if not joined:
        raise row.missing(("question", *QUESTIONS, "instruction", "input", *PATIENTS))
    return joined


def holds_turns(row: Row, name: str) -> bool:
    """Whether a column holds a dialogue. Alpaca's input can be a text that looks like one."""
    value = row.get(name)
    if name == "input":
        return isinstance(value, list)
    return name in (*DIALOGUES, "prompt", "history") and value is not None and is_dialogue(value)


def context(row: Row) -> str:
    """Join the passages before the question."""
    names = [*CONTEXTS, *(name for name in (*DIALOGUES, "history") if _is_plain(row, name))]
    if row.has(*PATIENTS) and row.has("doctor"):
        names.append("description")
    if isinstance(row.get("text"), str) and not _is_rendered(row):
        names.append("text")
    texts = (_passage(unpacked(value), name) for name, value in row.present(names))
    return "\n\n".join(dict.fromkeys(filter(None, texts)))


def _is_rendered(row: Row) -> bool:
    """Whether `text` repeats the other columns, such as Alpaca's, rather than being a passage."""
    text = squeezed(row.get("text"))
    others = row.present((*QUESTIONS, "instruction", "input", *RESPONSES))
    return any(isinstance(value, str) and squeezed(value) in text for _, value in others)


def squeezed(text: str) -> str:
    """Return `text` with single spaces, to compare it."""
    return " ".join(text.split())


def _is_plain(row: Row, name: str) -> bool:
    """Whether a column named like a dialogue holds a text, such as a patient's medical history."""
    return isinstance(row.get(name), str) and not holds_turns(row, name)


def _passage(value: Any, name: str) -> str:
    """Join the texts of a passage, which may be a list or an object, such as PubMedQA's."""
    if is_empty(value):
        return ""
    if isinstance(value, list | tuple):
        return "\n".join(filter(None, (_passage(part, name) for part in value)))
    if not isinstance(value, Mapping):
        return to_text(value, name)
    cells = {normal_name(str(key)): part for key, part in value.items()}
    key = next((key for key in map(normal_name, _PASSAGE_KEYS) if key in cells), None)
    if key is None:
        raise UnusableRow(f"{name} is an object without a text ({len(cells)} keys)")
    title = cells.get("title")
    if isinstance(title, list) and isinstance(cells[key], list):
        return _passage([*zip(title, cells[key], strict=True)], name)
    return "\n".join(filter(None, (_passage(title, name), _passage(cells[key], name))))


def reasoning(row: Row, *more: str) -> str:
    """Join the reasoning in its columns, and in the columns `more`."""
    names = (*REASONING, *more)
    return join_reasoning(
        *(bare_reasoning(_steps(value, name), name) for name, value in row.present(names))
    )


def _steps(value: Any, name: str) -> str:
    """Return reasoning, which can be a list of steps."""
    if isinstance(value, list | tuple):
        return "\n".join(to_text(step, name) for step in value)
    text = to_text(value, name)
    return "" if text.casefold() in _SWITCHES else text


def answer_text(row: Row) -> str:
    """Return the answer. If a row has a long one and a short one, the long one."""
    long = row.text(*RESPONSES, numbers=True) or row.text(*LONG_ANSWERS)
    return long or short_answer(row)


def short_answer(row: Row) -> str:
    """Return the text of the columns that hold the ground truth, or else the only answer."""
    answers = {name: _only(value, name) for name, value in row.present(ANSWERS)}
    texts = {name: to_text(value, name, numbers=True) for name, value in answers.items()}
    return Row(texts).text(*ANSWERS)


def _only(value: Any, name: str) -> Any:
    """Return the answer in a list, or in SQuAD's object with a list of texts."""
    if name == "answers":
        value = unpacked(value)
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        value = value["text"]
    if isinstance(value, list | tuple):
        if not value:
            raise UnusableRow(f"{name} is empty")
        if any(answer != value[0] for answer in value):
            raise UnusableRow(f"{name} has different answers ({len(value)})")
        return value[0]
    return value


def subject(row: Row) -> str:
    """Return the subject of a question, such as MedMCQA's, or nothing."""
    texts = (squeezed(value) for _, value in row.present(SUBJECTS) if isinstance(value, str))
    return next((text for text in texts if 0 < len(text) <= _SUBJECT_LENGTH), "")
