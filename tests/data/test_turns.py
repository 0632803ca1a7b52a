"""Labels of dialogues: every answer with its end token, after the tokens that inference shows before it.

The reference is transformers: templates of the families with `{% generation %}` around what the model writes, and TRL's `assistant_only_loss` with the templates that TRL ships.
"""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from medjob.config.prepare import PromptParams
from medjob.data.dialogues import Exchange
from medjob.data.formats import Record
from medjob.data.labels import answers_in, is_trained, trained_turns, with_labels
from medjob.data.prompts import RowBuilder
from medjob.data.styles import format_answer
from medjob.errors import ConfigError
from medjob.train.labels import check_earlier_labels
from tests.support.families import CHAT_FAMILIES, FAMILIES, Family

EXCHANGES = [
    Exchange("Does rest help, or 38.5 degrees?", "Rest helps: 2 days.", "It is a cold."),
    Exchange("And 胸痛?", "休息。 🙂", "So.\n\nOr not."),
    Exchange("How long?", "A week.\n\nOr two.", "Hm."),
    Exchange("Thanks", "You are welcome", "Polite."),
]
GENERATION = {
    name: template.replace("[[", "{%- generation -%}").replace("]]", "{%- endgeneration -%}")
    for name, template in {
        "llama-3": (
            "{{ bos_token }}{%- for m in messages -%}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
            "{%- if m['role'] == 'assistant' -%}[[{{ m['content'] | trim + '<|eot_id|>' }}]]"
            "{%- else -%}{{ m['content'] | trim + '<|eot_id|>' }}{%- endif -%}{%- endfor -%}"
        ),
        "qwen2.5": (
            "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif -%}"
            "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' }}"
            "{%- if m['role'] == 'assistant' -%}[[{{ m['content'] + '<|im_end|>' }}]]{{ '\n' }}"
            "{%- else -%}{{ m['content'] + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
        ),
        "gemma": (
            "{{ bos_token }}{%- for m in messages -%}"
            "{%- if m['role'] == 'assistant' -%}{{ '<start_of_turn>model\n' }}[[{{ m['content'] | trim + '<end_of_turn>' }}]]{{ '\n' }}"
            "{%- else -%}{{ '<start_of_turn>user\n' + m['content'] | trim + '<end_of_turn>\n' }}{%- endif -%}{%- endfor -%}"
        ),
        "phi-4": (
            "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' }}"
            "{%- if m['role'] == 'assistant' -%}[[{{ m['content'] + '<|im_end|>' }}]]"
            "{%- else -%}{{ m['content'] + '<|im_end|>' }}{%- endif -%}{%- endfor -%}"
        ),
        "mistral": (
            "{{ bos_token }}{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}[[{{ ' ' + m['content'] + eos_token }}]]"
            "{%- else -%}{{ '[INST] ' + m['content'] + '[/INST]' }}{%- endif -%}{%- endfor -%}"
        ),
        "deepseek-r1-distill": (
            "{{ bos_token }}{%- for m in messages -%}{%- if m['role'] == 'system' -%}{{ m['content'] }}"
            "{%- elif m['role'] == 'user' -%}{{ '<｜User｜>' + m['content'] }}"
            "{%- else -%}{{ '<｜Assistant｜>' }}[[{{ m['content'] + eos_token }}]]{%- endif -%}{%- endfor -%}"
        ),
    }.items()
}
GENERATION["smollm2"] = GENERATION["qwen2.5"]
MOVES_SYSTEM = ("mistral",)
DROPS_THOUGHTS = ("deepseek-r1-distill", "qwen3")
STYLES = ("plain", "tags", "thinking")
TOKENIZERS: dict[str, Any] = {}


def tokenizer_of(name: str) -> Any:
    return TOKENIZERS.setdefault(name, FAMILIES[name].tokenizer())


def dialogue(count: int, system: str = "") -> Record:
    question, answer, thought, _ = EXCHANGES[0]
    later = EXCHANGES[1:count]
    return Record(question, response=answer, reasoning=thought, system=system, later=later)


def messages_of(family: Family, count: int, system: str, style: Any) -> list[dict[str, str]]:
    messages = []
    for question, answer, thought, _ in EXCHANGES[:count]:
        messages.append({"role": "user", "content": question})
        text = format_answer(style, thought, answer)
        messages.append({"role": "assistant", "content": text})
    if system and family.takes_system:
        return [{"role": "system", "content": system}, *messages]
    if system:
        messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
    return messages


def rows_of(name: str, record: Record, style: Any) -> list[dict[str, Any]]:
    return RowBuilder(tokenizer_of(name), PromptParams(style=style)).train([(record, "s")])


def labels_of(row: dict[str, Any]) -> list[int]:
    return with_labels(row, len(row["input_ids"]))["labels"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("name", GENERATION)
def test_labels_are_what_the_template_marks_as_generated(
    name: str, count: int, system: str, style: Any
) -> None:
    if (system and name in MOVES_SYSTEM) or (style == "tags" and name in DROPS_THOUGHTS):
        pytest.skip("the template changes earlier turns; the next test covers it")
    family, tokenizer = CHAT_FAMILIES[name], tokenizer_of(name)
    (row,) = rows_of(name, dialogue(count, system), style)
    expected = tokenizer.apply_chat_template(
        messages_of(family, count, system, style),
        chat_template=GENERATION[name],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    ids, masks = expected["input_ids"], expected["assistant_masks"]
    assert row["input_ids"] == ids
    labels = [token if mask else -100 for token, mask in zip(ids, masks, strict=True)]
    assert labels_of(row) == labels
    assert len(answers_in(row)) == count


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CHAT_FAMILIES)
def test_every_answer_is_trained_once_after_the_prompt_of_inference(
    name: str, count: int, system: str, style: Any
) -> None:
    family, tokenizer = CHAT_FAMILIES[name], tokenizer_of(name)
    messages = messages_of(family, count, system, style)
    turns = [
        (row["input_ids"][:start], tokenizer.decode(row["input_ids"][start:end]))
        for row in rows_of(name, dialogue(count, system), style)
        for start, end in answers_in(row)
    ]
    questions = [n for n, message in enumerate(messages) if message["role"] == "user"]
    assert len(turns) == len(questions)
    for (before, trained), n in zip(turns, questions, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[: n + 1], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        # A thought that the generation prompt opens belongs to the answer.
        assert prompt[: len(before)] == before
        assert tokenizer.decode(prompt[len(before) :]).strip() in ("", "<think>")
        answer = trained.strip().removeprefix("<think>\n\n</think>").strip()
        assert answer.removesuffix(family.end).rstrip() == messages[n + 1]["content"]
        assert answer.endswith(family.end)


@pytest.mark.parametrize(
    ("name", "system", "style", "number"),
    [
        ("llama-3", "Be brief.", "tags", 1),
        ("mistral", "", "tags", 1),
        ("mistral", "Be brief.", "plain", 4),  # its system message moves to the last question
        ("deepseek-r1-distill", "", "plain", 1),
        ("deepseek-r1-distill", "", "tags", 4),  # it drops earlier thoughts
        ("deepseek-r1-distill", "", "thinking", 1),
        ("qwen3", "", "plain", 4),  # it drops even the empty ones
    ],
)
def test_answers_that_a_template_changes_later_have_rows_of_their_own(
    name: str, system: str, style: Any, number: int
) -> None:
    rows = rows_of(name, dialogue(4, system), style)
    assert [len(answers_in(row)) for row in rows] == ([4] if number == 1 else [1] * 4)
    assert [row["is_last"] for row in rows] == [False] * (number - 1) + [True]
    assert len({row["id"] for row in rows}) == 1


def test_only_answers_with_thoughts_need_rows_of_their_own() -> None:
    record = dialogue(4)
    record.later[0] = record.later[0]._replace(reasoning="")
    record.later[1] = record.later[1]._replace(reasoning="")
    first, second = rows_of("deepseek-r1-distill", record, "tags")
    assert (len(answers_in(first)), len(answers_in(second))) == (1, 3)
    text = tokenizer_of("deepseek-r1-distill").decode(second["input_ids"])
    assert "It is a cold." not in text
    assert "Polite." in text


def test_answer_that_joins_the_blank_before_it_has_a_row_of_its_own() -> None:
    """Before the answer, the blank is a token. In a later prompt, " Rest" is one, and " (" is two."""
    tokenizer = FAMILIES["qwen2.5"].tokenizer()
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
    )
    record = dialogue(2)
    for answers, number in ((("Rest helps.", "So."), 2), (("(Rest.)", "So."), 1)):
        record.response, record.later[0] = answers[0], record.later[0]._replace(answer=answers[1])
        rows = RowBuilder(tokenizer, PromptParams(style="plain")).train([(record, "s")])
        assert len(rows) == number
        turns = [(row["input_ids"], *turn) for row in rows for turn in answers_in(row)]
        trained = [tokenizer.decode(ids[start:end]) for ids, start, end in turns]
        assert trained == [f"{answer}<|im_end|>" for answer in answers]
        ids, start, _ = turns[0]
        question = [{"role": "user", "content": record.question}]
        assert (
            ids[:start]
            == tokenizer.apply_chat_template(
                question, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )


TRL_TEMPLATES = {
    "llama-3": "llama3",
    "qwen2.5": "qwen2_5",
    "gemma": "gemma",
    "deepseek-r1-distill": "deepseek_r1_distill",
}


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_labels_are_those_of_trl_s_assistant_only_loss(
    name: str, system: str, tmp_path: Path
) -> None:
    """But for what some of TRL's templates also train: line breaks around an answer, and the header of DeepSeek-R1's."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    family = CHAT_FAMILIES[name]
    tokenizer = family.tokenizer()
    folder = resources.files("trl") / "chat_templates"
    tokenizer.chat_template = (folder / f"{TRL_TEMPLATES[name]}.jinja").read_text("utf-8")
    rows = [{"messages": messages_of(family, count, system, "plain")} for count in range(1, 5)]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = SFTConfig(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        assistant_only_loss=True,
        max_length=None,
    )
    trainer = SFTTrainer(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(len(rows))])
    builder = RowBuilder(tokenizer, PromptParams(style="plain"))
    for count, ids, theirs in zip(range(1, 5), batch["input_ids"], batch["labels"], strict=True):
        (row,) = builder.train([(dialogue(count, system), "s")])
        length = len(row["input_ids"])
        assert ids[:length].tolist() == row["input_ids"]
        ours = labels_of(row)
        for token, label, other in zip(row["input_ids"], ours, theirs.tolist(), strict=False):
            if label != other:
                assert (label, other) == (-100, token)
                assert tokenizer.decode([token]).strip() in ("", "<｜Assistant｜>")
        assert len(answers_in(row)) == count


@pytest.mark.parametrize("name", FAMILIES)
def test_raw_prompt_repeats_for_each_exchange(name: str) -> None:
    tokenizer, family = tokenizer_of(name), FAMILIES[name]
    params = PromptParams(style="plain", template="Question: {question}\nAnswer: ")
    (row,) = RowBuilder(tokenizer, params).train([(dialogue(3, "Be brief."), "s")])
    trained = [
        tokenizer.decode(row["input_ids"][start:end]).strip() for start, end in answers_in(row)
    ]
    assert trained == [f"{exchange.answer}{family.eos}" for exchange in EXCHANGES[:3]]
    text = tokenizer.decode(row["input_ids"]).removeprefix(family.bos or "").strip()
    assert text.startswith("Question: Be brief.\n\nDoes rest help")
    assert text.count("Question: ") == text.count("Answer: ") == 3


def test_earlier_answers_can_be_context_only() -> None:
    record = dialogue(4)
    record.later[1] = record.later[1]._replace(is_trained=False)
    record.history = [Exchange("Before?", "Yes.", is_trained=False)]
    (row,) = rows_of("llama-3", record, "plain")
    tokenizer = tokenizer_of("llama-3")
    trained = [tokenizer.decode(row["input_ids"][start:end]) for start, end in answers_in(row)]
    assert trained == [f"{EXCHANGES[n].answer}<|eot_id|>" for n in (0, 1, 3)]
    assert "Before?" in row["prompt"]
    record.later[2] = record.later[2]._replace(is_trained=False)
    (row,) = rows_of("llama-3", record, "plain")
    assert row["completion"] == f"{EXCHANGES[1].answer}<|eot_id|>"  # what follows is left out
    assert "How long?" not in tokenizer.decode(row["input_ids"])


def test_only_the_last_answer_of_a_dialogue_can_be_chosen() -> None:
    (row,) = rows_of("llama-3", dialogue(3), "plain")
    assert trained_turns(row, "last") == answers_in(row)[-1:]
    labels = with_labels(row, 999, "last")["labels"]
    start, end = answers_in(row)[-1]
    assert [n for n, label in enumerate(labels) if label != -100] == [*range(start, end)]
    rows = rows_of("qwen3", dialogue(3), "plain")
    assert [is_trained(row, 999, "drop", "last") for row in rows] == [False, False, True]
    assert all(is_trained(row, 999, "drop") for row in rows)


@pytest.mark.parametrize("turns", ["all", "last"])
def test_truncated_dialogue_ends_with_the_last_answer_that_fits(turns: Any) -> None:
    (row,) = rows_of("llama-3", dialogue(3), "plain")
    spans = trained_turns(row, turns)
    for length in range(1, len(row["input_ids"]) + 1):
        cut = with_labels(row, length, turns)
        fitting = [end for _, end in spans if end <= length]
        whole = fitting and length < len(row["input_ids"])
        assert len(cut["input_ids"]) == (fitting[-1] if whole else length)
        assert cut["input_ids"] == row["input_ids"][: len(cut["input_ids"])]
        learned = [n for n, label in enumerate(cut["labels"]) if label != -100]
        end = len(cut["input_ids"])
        assert learned == [n for a, b in spans for n in range(a, b) if n < end]
        assert is_trained(row, length, "truncate", turns) == bool(learned)
        assert is_trained(row, length, "drop", turns) == (length >= len(row["input_ids"]))


def test_labels_beside_an_earlier_answer_are_refused() -> None:
    tokenizer = tokenizer_of("llama-3")
    (row,) = rows_of("llama-3", dialogue(3), "plain")
    turns = [row["input_ids"][start:end] for start, end in answers_in(row)[:-1]]
    check_earlier_labels(tokenizer, [(turns, row["prompt"])])
    with pytest.raises(ConfigError, match="row 2: trained answer 2 is not in the conversation"):
        check_earlier_labels(tokenizer, [([], ""), (turns[::-1], row["prompt"])])
    with pytest.raises(ConfigError, match="row 1: trained answer 2"):
        check_earlier_labels(tokenizer, [([turns[0], [*turns[1], turns[0][0]]], row["prompt"])])
