"""Converters from the row formats of known medical data sets to `Record`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import get_args

from medjob.config.prepare import Format
from medjob.data import known_columns as known
from medjob.data.columns import Row, UnusableRow, checked, is_empty, strip, to_text
from medjob.data.criteria import as_json, has_criteria, read_criteria
from medjob.data.dialogues import (
    Dialogue,
    Exchange,
    Turn,
    arrange,
    is_dialogue,
    read_dialogue,
    read_turns,
)
from medjob.data.options import LETTERS, Options, has_options, read_options
from medjob.data.reasoning import join_reasoning, split_reasoning
from medjob.data.right_option import (
    IndexBase,
    Reading,
    check_stated,
    no_answer,
    read_answer,
    read_answers,
    right_option,
)
from medjob.data.scored_answers import SIDES, has_sides, has_single_label, with_sides


@dataclass(slots=True)
class Record:
    """One question and the data about its answer. An empty string is a missing value.

    Of a dialogue, this is the first exchange whose answer can be trained. Evaluation and preference
    prompts end with its question; training continues with the later exchanges.
    """

    question: str
    id: str = ""
    """16 hex digits derived from the question and its options. `clean` sets it."""
    response: str = ""
    reasoning: str = ""
    reference: str = ""
    """Short ground truth, such as the answer of a verifiable problem."""
    options: dict[str, str] = field(default_factory=dict)
    answer_idx: str = ""
    chosen: str = ""
    rejected: str = ""
    chosen_reasoning: str = ""
    """Reasoning inside the chosen answer, which is not in `chosen`."""
    rejected_reasoning: str = ""
    label_type: str = ""
    rubric: str = ""
    """Criteria of a good answer, as `criteria.as_json` writes them."""
    system: str = ""
    context: str = ""
    """Passage that the question is about. It precedes the question in the prompt."""
    history: list[Exchange] = field(default_factory=list)
    """Exchanges before the question."""
    later: list[Exchange] = field(default_factory=list)
    """Exchanges after the answer."""
    has_open_question: bool = False
    """Whether the dialogue went on with a question that has no answer, and that is left out."""
    kind: str = "open"
    """`open`, `multiple_choice`, `harmful` or `benign`."""
    subject: str = ""
    """Of a multiple-choice question, for a figure per subject."""

    @property
    def earlier_turns(self) -> list[str]:
        """The texts of the exchanges before the question."""
        return [text for exchange in self.history for text in exchange[:2]]

    @property
    def later_turns(self) -> list[str]:
        """The texts between the question and the last answer of a longer dialogue."""
        texts = [self.response, *(text for exchange in self.later for text in exchange[:2])]
        return texts[:-1]

    @property
    def final_answer(self) -> str:
        """The last answer of the dialogue."""
        return self.later[-1].answer if self.later else self.response

    @property
    def other_trained(self) -> list[Exchange]:
        """The other exchanges of the dialogue whose answers can be trained."""
        return [exchange for exchange in (*self.history, *self.later) if exchange.is_trained]

    @property
    def prompt_parts(self) -> tuple[str, ...]:
        """The texts that identify a prompt. They include the options, because many questions share
        a text such as "All of these are true except"."""
        options = self.options.values()
        return (self.system, *self.earlier_turns, self.context, self.question, *options)

    @property
    def parts(self) -> tuple[str, ...]:
        """The texts that identify a row: dialogues that begin in the same way can differ later."""
        return (*self.prompt_parts, *self.later_turns)

    @property
    def identity(self) -> str:
        """The non-empty parts as one text."""
        return _joined(self.parts)

    @property
    def prompt_identity(self) -> str:
        """The non-empty parts of the prompt as one text."""
        return _joined(self.prompt_parts)


def _joined(parts: tuple[str, ...]) -> str:
    return "\n".join(part for part in parts if part)


# ---- questions and answers

_ANSWERS = (*known.RESPONSES, *known.LONG_ANSWERS, *known.ANSWERS, *known.TRUTHS)


def _open(row: Row) -> Record:
    """Convert a question and its answer, in columns or in a dialogue."""
    for name, value in row.present(known.VERDICTS):
        if known.is_false(name, value):
            raise UnusableRow(f"{name} is false, so the answer is a bad one")
    if _dialogue_columns(row):
        record = _from_dialogue(row)
    else:
        question = known.question(row)
        thought, response = _response_if_needed(row)
        record = Record(question, response=response, reasoning=thought)
    reasoning = known.reasoning(row)
    if reasoning and (record.later or record.has_open_question):
        _check_reasoning(reasoning, record)
    else:
        record.reasoning = join_reasoning(reasoning, record.reasoning)
    if not record.later:
        record.reference = _reference(row, record)
    return _surrounded(record, row)


def _check_reasoning(reasoning: str, record: Record) -> None:
    """Refuse a column of reasoning beside several answers, unless it repeats that of the turns."""
    thoughts = [record.reasoning, *(exchange.reasoning for exchange in record.later)]
    if not any(known.squeezed(reasoning) in known.squeezed(thought) for thought in thoughts):
        answers = len(thoughts) + record.has_open_question
        raise UnusableRow(f"the reasoning can belong to {answers} answers")


def _response_if_needed(row: Row) -> tuple[str, str]:
    """Return the reasoning and the answer. A row with criteria needs none, such as HealthBench's,
    some of which have an ideal answer."""
    if row.has(*_ANSWERS) or not has_criteria(row):
        return _response(row)
    ideal = row.get("ideal_completions_data")
    text = ideal.get("ideal_completion") if isinstance(ideal, dict) else None
    return ("", "") if is_empty(text) else split_reasoning(to_text(text, "ideal_completion"), "")


def _response(row: Row) -> tuple[str, str]:
    """Return the reasoning and the answer in the columns of answers."""
    name, value = next(row.present(known.RESPONSES), ("", None))
    if isinstance(value, list | dict):
        turns = read_turns(value, name)
        if [turn.role for turn in turns] != ["assistant"]:
            raise UnusableRow(f"{name} is not a single answer")
        _check_trained(turns, name)
        return turns[0].reasoning, turns[0].text
    text = known.answer_text(row) or row.text(*known.TRUTHS, numbers=True)
    if not text:
        raise row.missing(_ANSWERS)
    return split_reasoning(text, "response")


def _reference(row: Row, record: Record) -> str:
    """Return the short ground truth. It can be the answer column if the response is elsewhere."""
    if truth := row.text(*known.TRUTHS, numbers=True):
        return truth
    if _dialogue_columns(row):
        answer = row.get("answer")  # UltraMedical's can also be an object
        return strip(answer) if isinstance(answer, str) and answer != record.response else ""
    if row.has(*known.RESPONSES, *known.LONG_ANSWERS):
        return known.short_answer(row)
    return ""


def _surrounded(record: Record, row: Row) -> Record:
    """Add what precedes the question: the system message, earlier exchanges and the passage."""
    earlier = Dialogue()
    if known.holds_turns(row, "history"):
        earlier = read_dialogue(row.get("history"), "history")
    if earlier.question:
        raise UnusableRow("history ends with a question")
    own = [*record.earlier_turns, record.question]
    if record.later:
        own += [*record.later_turns, record.final_answer]
    turns = [text for exchange in earlier.exchanges for text in exchange[:2]]
    if own[: len(turns)] != turns:  # else the dialogue repeats the history
        record.history = [*earlier.exchanges, *record.history]
    systems = (row.text(*known.SYSTEMS), earlier.system, record.system)
    record.system = "\n\n".join(dict.fromkeys(filter(None, systems)))
    record.context = known.context(row)
    return record


# ---- dialogues

_PROMPTS = ("prompt", "input")


def _dialogue_columns(row: Row) -> list[str]:
    """Return the columns that hold turns: those of dialogues, and a prompt that is a list."""
    return [name for name in (*known.DIALOGUES, *_PROMPTS) if known.holds_turns(row, name)]


def _dialogue(row: Row) -> Dialogue:
    names = _dialogue_columns(row)
    dialogues = [read_dialogue(row.get(name), name) for name in names]
    for name, dialogue in zip(names[1:], dialogues[1:], strict=True):
        if dialogue != dialogues[0] and name not in _PROMPTS:
            raise UnusableRow(f"{names[0]} and {name} differ")
    _check_repeated(row, names[0], dialogues[0])
    return dialogues[0]


def _check_repeated(row: Row, name: str, dialogue: Dialogue) -> None:
    """Reject rows that have a question in a column, and another one in their dialogue."""
    said = [exchange.question for exchange in dialogue.exchanges]
    said += [dialogue.question, dialogue.system]
    for column, value in row.present((*known.QUESTIONS, "instruction", "input")):
        if known.holds_turns(row, column):
            continue
        text = known.squeezed(to_text(value, column))
        if not any(text in known.squeezed(turn) for turn in said):
            raise UnusableRow(f"{column} is not in {name}")


def _from_dialogue(row: Row) -> Record:
    """Convert a dialogue. If it ends with a question whose answer is in a column, that answer is
    the last one."""
    dialogue = _dialogue(row)
    name = _dialogue_columns(row)[0]
    if dialogue.question and (row.has(*_ANSWERS) or has_criteria(row)):
        thought, response = _response_if_needed(row)
        return Record(
            dialogue.question,
            response=response,
            reasoning=thought,
            system=dialogue.system,
            history=[_context(each) if name in _PROMPTS else each for each in dialogue.exchanges],
        )
    first = _first_trained(dialogue, name)
    question, response, thought, _ = dialogue.exchanges[first]
    if row.has(*known.RESPONSES):
        answers = [known.squeezed(exchange.answer) for exchange in dialogue.exchanges]
        if not any(known.squeezed(_response(row)[1]) in text for text in answers):
            raise UnusableRow(f"the response is not in {name}")
    return Record(
        question,
        response=response,
        reasoning=thought,
        system=dialogue.system,
        history=dialogue.exchanges[:first],
        later=dialogue.exchanges[first + 1 :],
        has_open_question=bool(dialogue.question),
    )


def _context(exchange: Exchange) -> Exchange:
    """An exchange of a prompt: where prompt and completion are apart, TRL trains the completion."""
    return exchange._replace(is_trained=False)


def _first_trained(dialogue: Dialogue, name: str) -> int:
    """Return the position of the first exchange whose answer can be trained."""
    if not dialogue.exchanges:
        raise UnusableRow(f"{name} has no answer")
    for number, exchange in enumerate(dialogue.exchanges):
        if exchange.is_trained:
            return number
    raise UnusableRow(f"every answer of {name} is marked as not to be trained on")


def _check_trained(turns: list[Turn], name: str) -> None:
    if not turns[-1].is_trained:
        raise UnusableRow(f"{name} is marked as not to be trained on")


# ---- preferences


def _preference(row: Row) -> Record:
    """Convert two answers to the same dialogue, which differ only in their last turn."""
    row = with_sides(row)
    if has_single_label(row) and not row.has(*SIDES):
        raise UnusableRow(
            "label says whether one answer is good, as in TRL's rows for KTO, and a pair needs a "
            "chosen and a rejected answer to the same prompt"
        )
    for name in SIDES:
        if not row.has(name):
            raise row.missing((name,))
    prompt = _prompt_turns(row)
    chosen, rejected = (_side(row, name, prompt) for name in SIDES)
    before = chosen[:-1]
    if [(turn.role, turn.text) for turn in before] != [
        (turn.role, turn.text) for turn in rejected[:-1]
    ]:
        raise UnusableRow("chosen and rejected differ before the last answer")
    sides = [(side[-1].reasoning, side[-1].text) for side in (chosen, rejected)]
    if sides[0] == sides[1]:
        raise UnusableRow("chosen and rejected are the same answer")
    dialogue = arrange(before, "chosen")
    record = Record(
        dialogue.question,
        system=dialogue.system,
        history=dialogue.exchanges,
        reasoning=join_reasoning(known.reasoning(row), chosen[-1].reasoning),
        chosen=chosen[-1].text,
        rejected=rejected[-1].text,
        chosen_reasoning=chosen[-1].reasoning,
        rejected_reasoning=rejected[-1].reasoning,
        label_type=row.text("label_type", numbers=True),
        reference=row.text(*known.TRUTHS, "reference", numbers=True),
    )
    return _surrounded(record, row)


def _prompt_turns(row: Row) -> list[Turn]:
    columns = _dialogue_columns(row)
    questions = (*known.QUESTIONS, "instruction", "input", *known.PATIENTS)
    if row.has(*questions) and not {*columns} & {*_PROMPTS}:
        return [Turn("user", known.question(row))]
    return read_turns(row.get(columns[-1]), columns[-1]) if columns else []


def _side(row: Row, name: str, prompt: list[Turn]) -> list[Turn]:
    """Return the whole dialogue up to one of the two answers."""
    value = row.get(name)
    if is_dialogue(value):
        turns = read_turns(value, name)
    else:
        thought, answer = split_reasoning(to_text(value, name, numbers=True), name)
        turns = [Turn("assistant", answer, thought)]
    if not turns or turns[-1].role != "assistant":
        raise UnusableRow(f"{name} does not end with an answer")
    _check_trained(turns, name)
    if turns[0].role == "assistant":
        turns = [*prompt, *turns]
    else:
        turns = [*_missing_system(prompt, turns), *turns]
        _check_prompt(prompt, turns, name)
    if len(turns) < 2 or turns[-2].role != "user":
        raise UnusableRow(f"{name} has no question before its last answer")
    return turns


def _missing_system(prompt: list[Turn], turns: list[Turn]) -> list[Turn]:
    return [turn for turn in prompt[:1] if turn.role == "system" and turns[0].role != "system"]


def _check_prompt(prompt: list[Turn], turns: list[Turn], name: str) -> None:
    if prompt and prompt[-1].role == "assistant":
        prompt = prompt[:-1]  # some data sets repeat the chosen dialogue in `messages`
    said = [known.squeezed(turn.text) for turn in turns]
    if any(known.squeezed(turn.text) not in said for turn in prompt):
        raise UnusableRow(f"the prompt is not in {name}")


# ---- multiple choice

_LABEL_WIDTH = 20  # characters, enough for "The answer is (B). "


def _multiple_choice(row: Row, index_base: IndexBase) -> Record:
    for name in _dialogue_columns(row):
        raise UnusableRow(f"the row has {name}, which multiple_choice would drop")
    question = known.question(row)
    options = read_options(row)
    readings, thought, response = _choice_answers(row, options)
    position = right_option(readings, options, index_base)
    letters = options.letters()
    text = options.texts[position]
    check_stated(response, position, options)
    answer = f"The answer is {letters[position]}. {text}"
    record = Record(
        question,
        response=f"{response}\n\n{answer}" if response else answer,
        reasoning=join_reasoning(known.reasoning(row, "long_answer"), thought),
        reference=text,
        options={letter: options.texts[place] for place, letter in letters.items()},
        answer_idx=letters[position],
        kind="multiple_choice",
        subject=known.subject(row),
    )
    return _surrounded(record, row)


def _choice_answers(row: Row, options: Options) -> tuple[dict[str, Reading], str, str]:
    """Return what the columns say about the right option, and the reasoning and the text of a
    response, which can be the only column that names the option."""
    readings = read_answers(row, options)
    if not row.has(*known.RESPONSES):
        if not readings:
            raise no_answer(row)
        return readings, "", _explained(row, options)
    thought, response = _response(row)
    try:
        return {**readings, "response": read_answer(response, options, "response")}, thought, ""
    except UnusableRow:
        if not readings:
            raise
        return readings, thought, response


def _explained(row: Row, options: Options) -> str:
    """Return the text of an answer that is longer than an option and its label."""
    longest = max(map(len, options.texts)) + _LABEL_WIDTH
    for _, answer in row.present(("answer", "correct_answer")):
        if isinstance(answer, str) and len(answer) > longest:
            return strip(answer)
    return ""


# ---- safety


def _safety(row: Row) -> Record:
    kind = row.text("kind").casefold() or "harmful"
    if kind not in ("harmful", "benign"):
        raise UnusableRow("kind is neither harmful nor benign")
    record = _open(row)
    record.kind = kind
    return record


# ---- formats


def _turns(row: Row) -> Record:
    if not _dialogue_columns(row):
        for name, value in row.present(known.DIALOGUES):
            raise UnusableRow(f"{name} is not a list of turns ({type(value).__name__})")
        raise row.missing(known.DIALOGUES)
    return _open(row)


def _needs(*names: str) -> Callable[[Row], Record]:
    """Return a converter of questions and answers that needs one of these columns."""

    def convert_row(row: Row) -> Record:
        if not row.has(*names):
            raise row.missing(names)
        return _open(row)

    return convert_row


_CONVERTERS: dict[Format, Callable[[Row], Record]] = {
    "medical_o1": _needs("complex_cot"),
    "verifiable": _needs(*known.TRUTHS),
    "instruction": _open,
    "conversations": _turns,
    "preference": _preference,
    "messages": _turns,
    "safety": _safety,
}
assert {*_CONVERTERS, "multiple_choice"} == set(get_args(Format))


def convert(row: Row, row_format: Format, index_base: IndexBase) -> Record:
    """Convert a row.

    Args:
        index_base: Whether the indices in a column count from 0 or 1.

    Raises:
        UnusableRow: the row does not fit the format, or has columns that the format would drop.
    """
    wrong = () if row_format == "preference" else known.WRONG_ANSWERS
    for name, value in row.present((*known.UNUSABLE, *wrong)):
        if value not in (False, "[]", "{}"):
            raise UnusableRow(f"the row has {name}, which medjob cannot use")
    if row_format != "preference" and row.has("chosen") and row.has("rejected"):
        raise UnusableRow(f"the row has chosen and rejected, which {row_format} would drop")
    if row_format in ("multiple_choice", "safety") and has_criteria(row):
        raise UnusableRow(f"the row has criteria, which {row_format} would drop")
    if row_format == "multiple_choice":
        return _checked(_multiple_choice(row, index_base))
    if has_options(row):
        raise UnusableRow(f"the row has options, which {row_format} would drop")
    return _checked(_with_criteria(_CONVERTERS[row_format](row), row))


def _with_criteria(record: Record, row: Row) -> Record:
    record.rubric = as_json(read_criteria(row))
    if record.rubric and record.later:
        raise UnusableRow(f"the criteria can belong to {1 + len(record.later)} answers")
    return record


_CHECKED = (
    *("response", "reasoning", "reference", "label_type", "subject", "rubric"),
    *("chosen", "rejected", "chosen_reasoning", "rejected_reasoning"),
)


def _checked(record: Record) -> Record:
    """Check all texts, whichever converter they come from: Parquet cannot hold lone surrogates."""
    for name in _CHECKED:
        checked(getattr(record, name), name)
    for part in (*record.parts, record.final_answer, *record.options):
        checked(part, "the question")
    for exchange in (*record.history, *record.later):
        checked(exchange.reasoning, "reasoning")
    if is_empty(record.question):
        raise UnusableRow("question is empty")
    return record


def detect(row: Row) -> Format | None:
    """Return the format that fits the values of a row best, or None if it is unknown."""
    if row.has("complex_cot") and not (has_options(row) or row.has(*LETTERS)):
        return "medical_o1"
    if has_sides(row):
        return "preference"
    # A right letter without options is a damaged row, and must not become an open question.
    if has_options(row) or row.has(*LETTERS):
        return "multiple_choice"
    if _dialogue_columns(row):
        return "conversations" if row.has("conversations") else "messages"
    if row.has(*known.TRUTHS):
        return "verifiable"
    if row.has("safe_response") or _is_safety(row):
        return "safety"
    questions = (*known.QUESTIONS, "instruction", "input", *known.PATIENTS)
    if row.mentions(*questions) and row.mentions(*_ANSWERS) and row.has(*questions, *_ANSWERS):
        return "instruction"
    if row.has(*questions) and has_criteria(row):
        return "instruction"
    return None


def _is_safety(row: Row) -> bool:
    """Whether `kind` says what a safety row is. Other data sets use it for topics."""
    kind = row.get("kind")
    return isinstance(kind, str) and kind.strip().casefold() in ("harmful", "benign")


def known_names(row: Row) -> list[str]:
    """Return the columns of a row that have a meaning in some format."""
    groups = (
        *(known.QUESTIONS, _ANSWERS, known.REASONING),
        *(known.CONTEXTS, known.DIALOGUES, SIDES, ("instruction", "input", "options")),
    )
    return [name for group in groups for name in group if row.mentions(name)]
