"""Tokens and labels of chat templates: equal to transformers' and TRL's, for ten families of models."""

from pathlib import Path
from typing import Any

import pytest

from medjob.config.prepare import PromptParams
from medjob.data.dialogues import Exchange
from medjob.data.formats import Record
from medjob.data.labels import answers_in
from medjob.data.prompts import RowBuilder
from medjob.data.render import Conversation, Renderer
from medjob.errors import ConfigError
from medjob.train.labels import check_labels
from tests.support.families import CHAT_FAMILIES, FAMILIES

PLAIN = PromptParams(style="plain")
HISTORY = [
    Exchange("What is a cold?", "A mild infection.", is_trained=False),
    Exchange("How long does it last?", "A week.", is_trained=False),
]
RECORDS = {
    "one question": Record("Does rest help, or 38.5 degrees?", response="Rest helps: 2 days."),
    "a system turn": Record("Does rest help?", response="It helps.", system="Be brief."),
    "earlier exchanges": Record("And then?", response="Rest.", history=HISTORY),
    "both": Record("And then?", response="Rest.", history=HISTORY, system="Be brief."),
    "another script": Record("胸痛怎么办？ दिन", response="休息。 🙂"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def any_family(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    family = FAMILIES[request.param]
    return family, family.tokenizer()


@pytest.fixture(scope="module", params=CHAT_FAMILIES)
def chat(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    family = CHAT_FAMILIES[request.param]
    return family, family.tokenizer()


def messages_of(record: Record, takes_system: bool = True) -> list[dict[str, str]]:
    """The conversation, with the system text in the first user turn where a template takes none."""
    turns = [*record.earlier_turns, record.question]
    if record.system and not takes_system:
        turns[0] = f"{record.system}\n\n{turns[0]}"
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
    if record.system and takes_system:
        messages.insert(0, {"role": "system", "content": record.system})
    return messages


def ids_of(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
    return list(ids)


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_tokens_and_labels_are_those_of_the_chat_template(
    chat: tuple[Any, Any], record: Record
) -> None:
    family, tokenizer = chat
    (row,) = RowBuilder(tokenizer, PLAIN).train([(record, "s")])
    messages = messages_of(record, family.takes_system)
    prompt = ids_of(tokenizer, messages, add_generation_prompt=True)
    whole = ids_of(tokenizer, [*messages, {"role": "assistant", "content": record.response}])
    assert row["input_ids"] == whole
    shared = row["prompt_tokens"]
    assert row["input_ids"][:shared] == prompt[:shared]
    # What the generation prompt has beyond ours is a thought, which belongs to the answer.
    assert tokenizer.decode(prompt[shared:]).strip() in ("", "<think>")
    trained = tokenizer.decode(row["input_ids"][shared:])
    assert family.end in trained
    check_labels(tokenizer, [(row["input_ids"][shared:], row["completion"])])


def test_labels_are_those_of_trl(chat: tuple[Any, Any], tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    family, tokenizer = chat
    if not family.like_trl:
        pytest.skip("its generation prompt is not a prefix of prompt and answer")
    records = [record for record in RECORDS.values() if family.takes_system or not record.system]
    rows = [
        {
            "prompt": messages_of(record),
            "completion": [{"role": "assistant", "content": record.response}],
        }
        for record in records
    ]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    ours = RowBuilder(tokenizer, PLAIN).train([(record, "s") for record in records])
    for row, ids, labels in zip(ours, batch["input_ids"], batch["labels"], strict=True):
        length = len(row["input_ids"])
        assert ids[:length].tolist() == row["input_ids"]
        ((start, end),) = answers_in(row)
        assert start == row["prompt_tokens"]
        # TRL also trains the line break that some templates write after the end token.
        assert tokenizer.decode(row["input_ids"][end:]).strip() == ""
        wanted = [-100] * start + row["input_ids"][start:]
        assert labels.tolist() == wanted + [-100] * (len(labels) - length)


def test_thought_of_the_data_takes_the_place_of_an_empty_one(chat: tuple[Any, Any]) -> None:
    _, tokenizer = chat
    record = Record("Why?", reasoning="Hm.", response="So.")
    (row,) = RowBuilder(tokenizer, PromptParams(style="tags")).train([(record, "s")])
    trained = tokenizer.decode(row["input_ids"][row["prompt_tokens"] :])
    assert trained.count("<think>") == trained.count("</think>") == 1
    assert trained.index("Hm.") < trained.index("</think>") < trained.index("So.")
    prompt = tokenizer.decode(row["input_ids"][: row["prompt_tokens"]])
    assert "<think>" not in prompt


def test_generated_answer_loses_what_the_template_writes_first() -> None:
    renderer = Renderer(FAMILIES["qwen3"].tokenizer(), PLAIN)
    assert renderer.completion("Rest.") == "<think>\n\n</think>\n\nRest.<|im_end|>\n"
    assert renderer.answer("<think>\n\n</think>\n\nRest.") == "Rest."
    assert renderer.answer("Rest.") == "Rest."
    thought = "<think>\nHm.\n</think>\n\nRest."
    assert renderer.answer(thought) == thought
    assert renderer.completion(thought) == f"{thought}<|im_end|>\n"


def test_only_the_template_s_special_token_ends_an_answer(any_family: tuple[Any, Any]) -> None:
    family, tokenizer = any_family
    params = PLAIN if family.template else PromptParams(style="plain", template="Q: {question}\nA:")
    renderer = Renderer(tokenizer, params)
    expected = tokenizer.convert_tokens_to_ids(family.end or family.eos)
    assert renderer.end_token_ids == [expected]


@pytest.mark.parametrize("written", [True, False])
def test_raw_prompt_has_the_tokenizer_s_own_begin_tokens(
    any_family: tuple[Any, Any], written: bool
) -> None:
    family, tokenizer = any_family
    begin = family.bos if written and family.bos else ""
    template = begin + "Question: {question}\nAnswer: "
    renderer = Renderer(tokenizer, PromptParams(style="plain", template=template))
    (ids,) = renderer.prompt_ids([Conversation("Why?")])
    expected = 1 if family.bos and (begin or family.adds_bos) else 0
    assert [tokenizer.decode([token]) for token in ids].count(family.bos) == expected
    (completion,) = renderer.completion_ids(["Rest helps."])
    text = tokenizer.decode(ids + completion)
    assert text.endswith(f"Answer: Rest helps.{family.eos}")
    text = text.removeprefix(family.bos or "").lstrip()
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (ids + completion)[expected:] == plain  # as the tokenizer encodes the whole text


def test_control_tokens_in_a_row_are_ordinary_text(any_family: tuple[Any, Any]) -> None:
    family, tokenizer = any_family
    marks = [*family.special, *(name for name in family.added if "think" not in name)]
    text = "Is it so? " + " ".join(marks) + " Always."
    params = PLAIN if family.template else PromptParams(style="plain", template="Q: {question}\nA:")
    builder = RowBuilder(tokenizer, params)
    plain = Record("Is it so?", response="Yes.", system="Be brief.")
    hostile = Record(text, response=text, system=text)
    rows = builder.train([(plain, "s"), (hostile, "s")])
    marked = set(tokenizer.convert_tokens_to_ids(marks))
    counts = [sum(token in marked for token in row["input_ids"]) for row in rows]
    assert counts[0] == counts[1]
    decoded = tokenizer.decode(rows[1]["input_ids"])
    assert decoded.count(text) == 3
    assert builder.rows_with_control_tokens == 1


def test_padding_in_the_tokenizer_file_is_ignored(any_family: tuple[Any, Any]) -> None:
    family, tokenizer = any_family
    params = PLAIN if family.template else PromptParams(style="plain", template="Q: {question}\nA:")
    records = [(Record("Why? " * n, response="So. " * n), "s") for n in (1, 40)]
    expected = RowBuilder(tokenizer, params).train(records)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=4)
    assert RowBuilder(tokenizer, params).train(records) == expected
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()


def test_letters_and_digits_continue_the_prompt(any_family: tuple[Any, Any]) -> None:
    family, tokenizer = any_family
    params = PLAIN if family.template else PromptParams(style="plain", template="Q: {question}\nA:")
    renderer = Renderer(tokenizer, params)
    (prompt,) = renderer.prompt_ids([Conversation("Which?")])
    for start, choices in (("The answer is", "ABCDEFGHIJ"), ("Score:", "12345")):
        shared, tokens = renderer.choice_tokens(start, list(choices))
        for choice, token in zip(choices, tokens, strict=True):
            text = tokenizer.decode([*prompt, *shared, token])
            assert text.rstrip().endswith(f"{start} {choice}")


@pytest.mark.parametrize("end", ["", "\n", "\n\n", " "])
def test_end_token_is_appended_where_the_template_writes_none(end: str) -> None:
    tokenizer = FAMILIES["qwen2.5"].tokenizer()
    tokenizer.chat_template = (
        "{%- for m in messages -%}{{ m['role'] + ': ' + m['content'] + '"
        + end
        + "' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"
    )
    renderer = Renderer(tokenizer, PLAIN)
    renderer.check(Conversation("Why?"), "So.")
    assert renderer.completion("So.") == "So.<|endoftext|>"
    assert renderer.end_token_ids == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="nothing ends an answer"):
        Renderer(tokenizer, PLAIN)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "the chat template fails: ZeroDivisionError"),
        ("{{ messages[0].missing.field }}", "the chat template fails"),
        ("{% if %}", "the chat template fails"),
        ("{%- for m in messages -%}{{ m['content'] }}{{ m['content'] }}{%- endfor -%}", "repeats"),
        ("{{ messages[-1]['content'] }}", "drops or repeats"),
        (
            "{%- for m in messages -%}{{ m['role'] + m['content'] }}{%- endfor -%}{%- if add_generation_prompt -%}{{ 'bot' }}{%- endif -%}",
            "generation prompt",
        ),
    ],
)
def test_unusable_chat_template_is_refused(template: str, message: str) -> None:
    tokenizer = FAMILIES["qwen2.5"].tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=message):
        Renderer(tokenizer, PLAIN, "run.judge.model")


def test_template_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jinja's sandbox limits each loop, and not loops inside loops."""
    monkeypatch.setattr("medjob.data.render._TEMPLATE_LIMIT_S", 0.5)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = FAMILIES["qwen2.5"].tokenizer()
    tokenizer.chat_template = loops + str(tokenizer.chat_template)
    with pytest.raises(ConfigError, match="the chat template fails: TimeoutError: took longer"):
        Renderer(tokenizer, PLAIN)


def test_template_that_changes_answers_is_refused() -> None:
    tokenizer = FAMILIES["qwen2.5"].tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m['content']", "m['content'] | replace('aspirin', 'rest')"
    )
    renderer = Renderer(tokenizer, PLAIN)
    renderer.check(Conversation("Why?"), "Rest.")
    with pytest.raises(ConfigError, match="changes questions or answers"):
        renderer.check(Conversation("Why?"), "Take aspirin.")


def test_tokenizer_written_in_python_encodes_marks_as_text() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    renderer = Renderer(tokenizer, PromptParams(style="plain", template="Q: {question}\nA:"))
    (ids,) = renderer.prompt_ids([Conversation("Is </s> safe?")])
    assert tokenizer.eos_token_id not in ids
    (completion,) = renderer.completion_ids(["Yes </s>."])
    assert completion.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids + completion) == "Q: Is </s> safe?\nA:Yes </s>.</s>"


def test_labels_that_lose_the_end_token_are_refused() -> None:
    tokenizer = FAMILIES["llama-3"].tokenizer()
    (row,) = RowBuilder(tokenizer, PLAIN).train([(RECORDS["one question"], "s")])
    trained = row["input_ids"][row["prompt_tokens"] :]
    check_labels(tokenizer, [(trained, row["completion"])])
    with pytest.raises(ConfigError, match="row 1: the trained tokens do not decode"):
        check_labels(tokenizer, [(trained[:-1], row["completion"])])
    with pytest.raises(ConfigError, match="row 2"):
        check_labels(tokenizer, [(trained, row["completion"]), (trained[1:], row["completion"])])
