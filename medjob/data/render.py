"""Render prompts and answers with a model's template, and encode them as token ids."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medjob.config.prepare import PromptParams
from medjob.data.tokens import Encoder, shared_length, special_tokens
from medjob.errors import ConfigError
from medjob.runtime.time_limit import time_limit

_log = logging.getLogger(__name__)

# Placeholders for the texts of a conversation. The asterisms occur in no template and in no row.
_TEMPLATE_LIMIT_S = 30.0  # a prompt takes well under a millisecond
_SYSTEM, _QUESTION, _ANSWER = "\u2042system\u2042", "\u2042question\u2042", "\u2042answer\u2042"
_OPEN_THOUGHT = "<think>"
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_THINKING_ANSWER = re.compile(r"<think>(.*)</think>(.*)", re.DOTALL)
_THOUGHT_MARKS = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a model is asked: the question, and what comes before it."""

    question: str
    system: str = ""
    """The row's own system message. It replaces `run.prompt.system`."""
    history: Sequence[tuple[str, str]] = ()
    """Earlier exchanges, each a question and its whole answer. The template decides whether the
    thought of an answer is shown."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """A rendered template, with places for the texts of a conversation."""

    literals: tuple[str, ...]
    """The template's own text before, between and after the places."""
    places: tuple[str, ...]
    """The placeholder of each place, in the order of the template."""
    lead: str = ""
    """What the template writes between the prompt and an answer, such as Qwen3's empty thought."""
    end: str = ""
    """What it writes after an answer."""
    appended: str = ""
    """The part of `end` that the template does not write: the tokenizer's end token, or nothing."""
    folds_system: bool = False
    """Whether the system message goes into the first user turn, because the template has no place
    for it."""

    def fill(self, texts: Mapping[str, str]) -> str:
        """Put the texts in their places."""
        parts = [self.literals[0]]
        for place, literal in zip(self.places, self.literals[1:], strict=True):
            parts += (texts[place], literal)
        return "".join(parts)


_Shape = tuple[bool, tuple[bool, ...]]
"""Whether a conversation has a system message, and which of its earlier answers have a thought."""


class Renderer:
    """Renders prompts and answers by joining strings, about 20 times faster than the chat template.

    The template is rendered once per shape of a conversation, with placeholders. `check` compares a
    row with the output of the template.
    """

    def __init__(self, tokenizer: Any, params: PromptParams, key: str = "run.base_model") -> None:
        """Render the template for a plain question.

        Args:
            key: The run file's key of the model, for messages.

        Raises:
            ConfigError: the template is missing or fails, or nothing could end an answer.
        """
        self._tokenizer = tokenizer
        self._params = params
        self._model = f"{key} ({Path(tokenizer.name_or_path).name})"
        if params.template is None and not tokenizer.chat_template:
            raise ConfigError(
                f"{self._model}: the tokenizer has no chat template",
                'set run.prompt.template, for example "Question: {question}\\nAnswer: "',
            )
        self._stops = _stop_tokens(tokenizer)
        self._frames: dict[_Shape, _Frame] = {}
        plain = self._frame((False, ()))
        texts = [*plain.literals, plain.lead, plain.end]
        self._encoder = Encoder(tokenizer, _controls(tokenizer, texts))
        self._sealed: dict[_Shape, _Frame] = {}
        self._tail = self._encoder.seal(plain.literals[-1])
        self._lead, self._end = plain.lead, plain.end
        self._stop = re.findall("|".join(map(re.escape, self._stops)), self._end)[0]
        self._turn_end = self._end.partition(self._stop)[0] + self._stop
        if params.template is not None:
            self._move_blanks_to_lead()

    @property
    def end_token_ids(self) -> list[int]:
        """The token with which the template ends an answer."""
        return [self._tokenizer.convert_tokens_to_ids(self._stop)]

    @property
    def lead(self) -> str:
        """Text that the template writes before every answer. The model is trained to write it."""
        return self._lead

    def prompt(self, conversation: Conversation) -> str:
        """Return the text that a model continues with its answer."""
        frame = self._frame_of(conversation)
        return self._without_lead(frame.fill(self._texts(conversation, frame)))

    def prompt_ids(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Return the token ids of each prompt. Control tokens in its texts are ordinary text."""
        return self._encoder.encode([self.sealed_prompt(each) for each in conversations])

    def sealed_prompt(self, conversation: Conversation) -> str:
        """Return the text of a prompt, with the template's control tokens under secret names."""
        shape = self._shape(conversation)
        frame = self._frame(shape)
        if shape not in self._sealed:
            literals = tuple(map(self._encoder.seal, frame.literals))
            self._sealed[shape] = _Frame(literals, frame.places)
        return self._without_lead(self._sealed[shape].fill(self._texts(conversation, frame)))

    def sealed_turn(self, answer: str) -> str:
        """Return the text that follows the prompt, up to the end token, as `sealed_prompt`."""
        seal = self._encoder.seal
        return seal(self._lead_of(answer)) + answer + seal(self._turn_end)

    def stops_in(self, sealed: str) -> int:
        """Return how often a sealed text has the end token of answers."""
        return sealed.count(self._encoder.seal(self._stop))

    def encode(self, sealed: Sequence[str]) -> list[list[int]]:
        """Return the token ids of sealed texts."""
        return self._encoder.encode(sealed)

    def turn_length(self, completion_ids: Sequence[int]) -> int:
        """Return the number of a completion's tokens up to its end token. Some templates write a
        line break after it, which no model has to generate."""
        after = completion_ids[::-1].index(self.end_token_ids[0])
        return len(completion_ids) - after

    def completion(self, answer: str) -> str:
        """Return the text that a model is trained to write, including its end token."""
        return self._lead_of(answer) + answer + self._end

    def completion_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each completion, as they follow a prompt."""
        seal = self._encoder.seal
        end = seal(self._end)
        return self._continue([seal(self._lead_of(text)) + text + end for text in answers])

    def choice_tokens(self, start: str, choices: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the ids of an answer's start, and the token with which each choice continues it.

        Both come from encoding `start` and a choice together, after the template's text: " A" is
        one token in most vocabularies, a blank and a letter in some.

        Raises:
            ConfigError: two choices begin with the same token.
        """
        lead = self._encoder.seal(self._lead)
        ids = self._continue([f"{lead}{start} {choice}" for choice in choices])
        shared = shared_length(ids)
        tokens = [each[shared] for each in ids if len(each) > shared]
        if len(set(tokens)) != len(choices):
            raise ConfigError(
                f"{self._model}: the tokenizer does not tell {', '.join(choices)} apart",
                "use another model, or run.judge.kind=overlap if it is the judge",
            )
        return ids[0][:shared], tokens

    def has_control_token(self, text: str) -> bool:
        """Whether a row's text spells out a control token."""
        return self._encoder.has_control_token(text)

    def answer(self, generated: str) -> str:
        """Return a generated text without the template's lead, which `completion` writes again."""
        lead = self._lead.strip()
        text = generated.strip()
        return text.removeprefix(lead).strip() if lead else text

    def check(self, conversation: Conversation, answer: str) -> None:
        """Compare the joined strings with the output of the chat template.

        Blanks and a thought in front of the answer may differ: some templates lay the thought out
        in their own way, and DeepSeek-R1's drops it.

        Raises:
            ConfigError: the template changes questions or answers.
        """
        if self._params.template is not None:
            return
        frame = self._frame_of(conversation)
        texts = self._texts(conversation, frame)
        answers = [answer.strip() for _, answer in conversation.history]
        messages = self._messages(texts, answers, frame.folds_system)
        try:
            rendered = self._apply([*messages, {"role": "assistant", "content": answer}])
        except ConfigError:  # its message may quote the row
            rendered = ""
        joined = self.prompt(conversation) + self.completion(answer)
        if _essence(rendered + frame.appended) != _essence(joined):
            raise ConfigError(
                f"{self._model}: the chat template changes questions or answers",
                "set run.prompt.template to a raw prompt",
            )

    def _frame_of(self, conversation: Conversation) -> _Frame:
        return self._frame(self._shape(conversation))

    def _shape(self, conversation: Conversation) -> _Shape:
        thinks = (_THINKING_ANSWER.fullmatch(answer.strip()) for _, answer in conversation.history)
        return bool(conversation.system or self._params.system), tuple(map(bool, thinks))

    def _frame(self, shape: _Shape) -> _Frame:
        if shape not in self._frames:
            build = self._chat_frame if self._params.template is None else self._raw_frame
            self._frames[shape] = build(shape)
        return self._frames[shape]

    def _texts(self, conversation: Conversation, frame: _Frame) -> dict[str, str]:
        """Return the text for each place of a frame."""
        texts = {_SYSTEM: conversation.system or self._params.system or ""}
        for number, (question, answer) in enumerate(conversation.history):
            texts[_place("question", number)] = question
            texts |= _answer_texts(answer.strip(), number)
        texts[_QUESTION] = conversation.question
        if frame.folds_system and texts[_SYSTEM]:
            first = _place("question", 0) if conversation.history else _QUESTION
            texts[first] = f"{texts[_SYSTEM]}\n\n{texts[first]}"
        return texts

    def _messages(
        self, texts: Mapping[str, str], answers: Sequence[str], folds_system: bool
    ) -> list[dict[str, str]]:
        messages = []
        if texts.get(_SYSTEM) and not folds_system:
            messages.append({"role": "system", "content": texts[_SYSTEM]})
        for number, answer in enumerate(answers):
            messages.append({"role": "user", "content": texts[_place("question", number)]})
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": texts[_QUESTION]}]

    def _chat_frame(self, shape: _Shape) -> _Frame:
        has_system, thinks = shape
        numbers = range(len(thinks))
        questions = [_place("question", number) for number in numbers]
        answers = [_place("answer", number) for number in numbers]
        thoughts = [_place("thought", number) for number in numbers if thinks[number]]
        needed = [*([_SYSTEM] if has_system else []), *questions, *answers, _QUESTION]
        contents = [
            f"<think>\n{_place('thought', n)}\n</think>\n{answers[n]}" if thinks[n] else answers[n]
            for n in numbers
        ]
        messages = self._messages({place: place for place in needed}, contents, False)
        try:
            prompt = self._apply(messages, add_generation_prompt=True)
            text = self._apply([*messages, {"role": "assistant", "content": _ANSWER}])
        except ConfigError:
            if not has_system:
                raise
            return self._folded(thinks)  # Gemma's template, for example, takes no system message
        if has_system and _SYSTEM not in prompt:
            return self._folded(thinks)
        prompt, lead, end = self._split_answer(prompt, text)
        appended = self._missing_stop(end)
        pieces = re.split(f"({'|'.join([*needed, *thoughts])})", prompt)
        # Many templates drop the thoughts of earlier answers.
        if sorted(set(pieces[1::2]) - {*thoughts}) != sorted(needed) or _repeats(pieces[1::2]):
            raise ConfigError(
                f"{self._model}: the chat template drops or repeats a message of the conversation",
                "set run.prompt.template to a raw prompt",
            )
        if appended:
            end = end.rstrip() + appended
        return _Frame(tuple(pieces[0::2]), tuple(pieces[1::2]), lead, end, appended)

    def _folded(self, thinks: tuple[bool, ...]) -> _Frame:
        return replace(self._frame((False, thinks)), folds_system=True)

    def _split_answer(self, prompt: str, text: str) -> tuple[str, str, str]:
        """Return the prompt, and the template's texts before and after an answer."""
        before, found, end = text.partition(_ANSWER)
        if found and before.startswith(prompt):
            lead = before.removeprefix(prompt)
        elif found and prompt.startswith(before):
            prompt, lead = before, ""  # the generation prompt opens a thought
        else:
            raise ConfigError(
                f"{self._model}: the chat template's generation prompt is not what it writes "
                "before an answer",
                "set run.prompt.template to a raw prompt",
            )
        if prompt.rstrip().endswith(_OPEN_THOUGHT):  # it belongs to the answer
            cut = prompt.rindex(_OPEN_THOUGHT)
            prompt, lead = prompt[:cut], prompt[cut:] + lead
        return prompt, lead, end

    def _missing_stop(self, end: str) -> str:
        """Return the tokenizer's end token if the text after an answer has no special token."""
        if any(stop in end for stop in self._stops):
            return ""
        eos = self._tokenizer.eos_token
        if not eos:
            raise ConfigError(
                f"{self._model}: nothing ends an answer: the chat template writes no special token "
                "after it, and the tokenizer has no end token",
                "set eos_token in the model's tokenizer_config.json",
            )
        if self._params.template is None:
            _log.info(
                "%s: the chat template ends no answer with a special token, so %s is appended",
                self._model,
                eos,
            )
        return str(eos)

    def _raw_frame(self, shape: _Shape) -> _Frame:
        """The frame of `run.prompt.template`. Earlier exchanges repeat the template, without the
        thoughts of their answers."""
        has_system, thinks = shape
        exchanges = len(thinks)
        template = self._params.template or ""
        end = self._missing_stop("")
        folds = has_system and "{system}" not in template
        later = template.replace("{system}", "")
        turns = [
            _fill(later if n else template, _place("question", n)) + _place("answer", n) + end
            for n in range(exchanges)
        ]
        turns.append(_fill(later if exchanges else template, _QUESTION))
        text = _begin_token(self._tokenizer, template) + "".join(turns)
        if not has_system:
            text = text.replace(_SYSTEM, "")
        pieces = re.split("(\u2042[a-z0-9]+\u2042)", text)
        return _Frame(tuple(pieces[0::2]), tuple(pieces[1::2]), "", end, "", folds)

    def _move_blanks_to_lead(self) -> None:
        """Let the answer begin with the blanks at the end of a raw prompt, if a tokenizer joins
        them with its first word: "Answer: " and "Rest" are not the tokens of "Answer: Rest"."""
        blanks = self._tail[len(self._tail.rstrip(" ")) :]
        probes = self._encoder.encode([self._tail + word for word in ("The", "a", "1")])
        tail = self._encoder.encode([self._tail])[0]
        if blanks and any(ids[: len(tail)] != tail for ids in probes):
            self._tail = self._tail.removesuffix(blanks)
            self._lead = blanks

    def _without_lead(self, prompt: str) -> str:
        raw = self._params.template is not None
        return prompt.removesuffix(self._lead) if raw else prompt

    def _lead_of(self, answer: str) -> str:
        """The lead of one answer. An answer with a thought needs no empty one before it."""
        thinks = answer.startswith(_OPEN_THOUGHT) and _OPEN_THOUGHT in self._lead
        return "" if thinks else self._lead

    def _continue(self, sealed: Sequence[str]) -> list[list[int]]:
        """Encode texts as they follow the template's last words before an answer."""
        tail = self._encoder.encode([self._tail])[0]
        joined = self._encoder.encode([self._tail + text for text in sealed])
        return [
            ids[len(tail) :] if ids[: len(tail)] == tail else self._encoder.encode([text])[0]
            for ids, text in zip(joined, sealed, strict=True)
        ]

    def _apply(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """Render messages with the chat template. Templates are programs, so they can raise
        anything, or loop for ever."""
        try:
            with time_limit(_TEMPLATE_LIMIT_S):
                text = self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, **options
                )
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ConfigError(
                f"{self._model}: the chat template fails: {reason}",
                "correct the template, or set run.prompt.template to a raw prompt",
            ) from None
        return str(text)


def _place(name: str, number: int) -> str:
    return f"\u2042{name}{number}\u2042"


def _answer_texts(answer: str, number: int) -> dict[str, str]:
    """Split an earlier answer into the texts of its thought and of the rest."""
    parts = _THINKING_ANSWER.fullmatch(answer)
    thought, rest = parts.groups() if parts else ("", answer)
    return {_place("thought", number): thought.strip(), _place("answer", number): rest.strip()}


def _repeats(places: Sequence[str]) -> bool:
    return len(set(places)) < len(places)


def _fill(template: str, question: str) -> str:
    return template.replace("{system}", _SYSTEM).replace("{question}", question)


def _begin_token(tokenizer: Any, template: str) -> str:
    """The begin token of a raw prompt: one, if the tokenizer itself puts one before a text, and the
    template does not begin with it."""
    bos = tokenizer.bos_token
    if not bos or template.startswith(bos):
        return ""
    return bos if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else ""


def _stop_tokens(tokenizer: Any) -> list[str]:
    """Tokens that can end an answer: special ones, and added ones that are no ordinary text."""
    added = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    names = special_tokens(tokenizer) | {name for name in added if _is_mark(name)}
    return sorted(names, key=len, reverse=True)


def _controls(tokenizer: Any, literals: Iterable[str]) -> set[str]:
    """Added tokens that the template uses, although they are not declared as special."""
    text = "".join(literals)
    added = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    return {name for name in added if _is_mark(name) and name in text}


def _is_mark(name: str) -> bool:
    """Whether an added token is a mark such as `<|im_end|>`. Thoughts are part of an answer."""
    return name.startswith("<") and name.endswith(">") and name not in _THOUGHT_MARKS


def _essence(text: str) -> str:
    """The text without thoughts and blanks."""
    return "".join(_THOUGHT.sub("", text).split())
