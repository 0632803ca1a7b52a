"""The transformers engine: reproducible answers, truncation, and exact scores."""

from pathlib import Path
from typing import Any

import pytest
import torch

from medjob.errors import ConfigError
from medjob.generate.engine import Prompt, Sampling, TransformersEngine
from medjob.sources.locations import Location
from medjob.train.model import ModelSpec, load_model, load_tokenizer

PROMPTS = [
    Prompt(
        str(n),
        "<|im_start|>user\n"
        + "a man has chest pain " * (n + 1)
        + "<|im_end|>\n<|im_start|>assistant\n",
    )
    for n in range(7)
]


@pytest.fixture(scope="module")
def parts(tiny: Path) -> tuple[Any, Any]:
    location = Location.of_folder(tiny)
    return load_model(ModelSpec(location, False, "float32", "sdpa")), load_tokenizer(location)


def answers(
    parts: tuple[Any, Any], sampling: Sampling, batch_size: int = 3, **options: Any
) -> dict[str, list[str]]:
    engine = TransformersEngine(*parts, batch_size, seed=1, **options)
    return {
        prompt.id: [answer.text for answer in drawn]
        for batch in engine.batches(PROMPTS)
        for prompt, drawn in zip(batch, engine.generate(batch, sampling), strict=True)
    }


def test_greedy_answers_do_not_depend_on_batching(parts: tuple[Any, Any]) -> None:
    alone = answers(parts, Sampling(12), batch_size=1)
    assert answers(parts, Sampling(12), batch_size=4) == alone
    assert answers(parts, Sampling(12), batch_size=7, continuous=True) == alone
    model, tokenizer = parts
    ids = tokenizer(PROMPTS[2].text, return_tensors="pt", add_special_tokens=False)
    plain = model.generate(**ids, max_new_tokens=12, do_sample=False)[
        0, ids["input_ids"].shape[1] :
    ]
    assert alone["2"] == [tokenizer.decode(plain, skip_special_tokens=True).strip()]


def test_sampled_answers_depend_on_the_seed_and_differ(parts: tuple[Any, Any]) -> None:
    sampling = Sampling(16, temperature=0.7, top_p=0.95, num_return_sequences=3)
    first = answers(parts, sampling)
    assert answers(parts, sampling) == first
    assert all(len(drawn) == 3 for drawn in first.values())
    assert all(len(set(drawn)) > 1 for drawn in first.values())
    other = TransformersEngine(*parts, 3, seed=2)
    assert [a.text for a in other.generate(other.batches(PROMPTS)[0], sampling)[0]] != first[
        other.batches(PROMPTS)[0][0].id
    ]


def test_continuous_batching_returns_all_answers(parts: tuple[Any, Any]) -> None:
    drawn = answers(
        parts, Sampling(8, temperature=0.7, num_return_sequences=2), batch_size=7, continuous=True
    )
    assert set(drawn) == {prompt.id for prompt in PROMPTS}
    assert all(len(texts) == 2 for texts in drawn.values())


def test_batches_have_similar_lengths_and_do_not_depend_on_order(parts: tuple[Any, Any]) -> None:
    engine = TransformersEngine(*parts, 3, seed=1)
    batches = engine.batches(PROMPTS)
    assert [[prompt.id for prompt in batch] for batch in batches] == [
        ["6", "5", "4"],
        ["3", "2", "1"],
        ["0"],
    ]
    assert engine.batches(list(reversed(PROMPTS))) == batches


def test_answer_at_the_token_limit_is_truncated(parts: tuple[Any, Any]) -> None:
    engine = TransformersEngine(*parts, 8, seed=1)
    (cut,) = engine.generate(PROMPTS[:1], Sampling(5))[0]
    assert (cut.truncated, cut.tokens) == (True, 5)
    end = engine._ends[0]
    assert engine._to_answer([7, 8, end, 9, 9], limit=5).truncated is False
    assert engine._to_answer([7, 8, end, 9, 9], limit=5).tokens == 2
    assert engine._to_answer([7, 8, 9, 9, end], limit=5).truncated is False


def test_likelihoods_equal_those_of_single_rows(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    engine = TransformersEngine(model, tokenizer, 8, seed=1)
    rows = [(prompt.text, "the answer " * (n + 1)) for n, prompt in enumerate(PROMPTS)]
    for (prompt, completion), (total, count) in zip(
        rows, engine.negative_log_likelihoods(rows), strict=True
    ):
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after = tokenizer(completion, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_p = torch.log_softmax(model(input_ids=torch.tensor([before + after])).logits[0], -1)
        expected = -sum(log_p[len(before) - 1 + i, token].item() for i, token in enumerate(after))
        assert (count, total) == (len(after), pytest.approx(expected, rel=1e-4))


def test_choice_probabilities_are_a_softmax_over_the_choices(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    engine = TransformersEngine(model, tokenizer, 2, seed=1)
    texts = [prompt.text + "Score:" for prompt in PROMPTS]
    digits = ["1", "2", "3"]
    tokens = [tokenizer(d, add_special_tokens=False)["input_ids"][0] for d in digits]
    for text, found in zip(texts, engine.choice_probabilities(texts, digits), strict=True):
        with torch.no_grad():
            logits = model(
                **tokenizer(text + " ", return_tensors="pt", add_special_tokens=False)
            ).logits[0, -1, tokens]
        assert found == pytest.approx(torch.softmax(logits, -1).tolist(), abs=1e-4)


def test_choices_are_scored_as_the_tokens_a_model_would_write(parts: tuple[Any, Any]) -> None:
    """Most vocabularies have " A" as one token. A model never writes a space token and then "A"."""
    model, tokenizer = parts
    engine = TransformersEngine(model, tokenizer, 2, seed=1)
    assert engine._choice_tokens(["1", "2"])[0] == " "  # a space and a digit
    word = " chest"  # one token of the tiny tokenizer
    assert engine._choice_tokens(["chest"]) == (
        "",
        tokenizer(word, add_special_tokens=False)["input_ids"],
    )
    with pytest.raises(ConfigError, match="no single tokens"):
        engine._choice_tokens(["xyzzy", "A"])


def test_layout_adds_an_end_token_and_sampling_defaults_are_dropped(tiny: Path) -> None:
    location = Location.of_folder(tiny)
    model = load_model(ModelSpec(location, False, "float32", "sdpa"))
    tokenizer = load_tokenizer(location)
    model.generation_config.repetition_penalty = 1.5
    engine = TransformersEngine(model, tokenizer, 2, seed=1, end="<|endoftext|>\n")
    assert engine._ends == sorted(
        [tokenizer.eos_token_id, tokenizer("<|endoftext|>")["input_ids"][0]]
    )
    assert model.generation_config.repetition_penalty in (None, 1.0)
