"""The transformers engine: reproducible answers, truncation, and exact scores."""

from pathlib import Path
from typing import Any

import pytest
import torch

from medjob.config.prepare import PromptParams
from medjob.data.render import Conversation, Renderer
from medjob.errors import ConfigError
from medjob.generate.protocol import Prompt, Sampling, answer_of
from medjob.generate.transformers_engine import TransformersEngine
from medjob.sources.locations import Location
from medjob.train.model import ModelSpec, load_model, load_tokenizer

QUESTIONS = [Conversation("a man has chest pain " * (n + 1)) for n in range(7)]
PROMPTS: list[Prompt] = []


@pytest.fixture(scope="module")
def parts(tiny: Path) -> tuple[Any, Any]:
    location = Location.of_folder(tiny)
    tokenizer = load_tokenizer(location)
    ids = renderer_of(tokenizer).prompt_ids(QUESTIONS)
    PROMPTS[:] = [Prompt(str(n), prompt) for n, prompt in enumerate(ids)]
    return load_model(ModelSpec(location, False, "float32", "sdpa")), tokenizer


def renderer_of(tokenizer: Any) -> Renderer:
    return Renderer(tokenizer, PromptParams(style="plain"))


def engine_of(parts: tuple[Any, Any], batch_size: int, seed: int = 1, **options: Any) -> Any:
    return TransformersEngine(*parts, batch_size, seed, renderer_of(parts[1]), **options)


def answers(
    parts: tuple[Any, Any], sampling: Sampling, batch_size: int = 3, **options: Any
) -> dict[str, list[str]]:
    engine = engine_of(parts, batch_size, **options)
    return {
        prompt_id: [answer.text for answer in drawn]
        for prompt_id, drawn in engine.generate(engine.batches(PROMPTS), sampling)
    }


def test_greedy_answers_do_not_depend_on_batching(parts: tuple[Any, Any]) -> None:
    alone = answers(parts, Sampling(12), batch_size=1)
    assert answers(parts, Sampling(12), batch_size=4) == alone
    assert answers(parts, Sampling(12), batch_size=7, continuous=True) == alone
    model, tokenizer = parts
    ids = torch.tensor([PROMPTS[2].ids])
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert alone["2"] == [tokenizer.decode(plain, skip_special_tokens=True).strip()]


def test_sampled_answers_depend_on_the_seed_and_differ(parts: tuple[Any, Any]) -> None:
    sampling = Sampling(16, temperature=0.7, top_p=0.95, num_return_sequences=3)
    first = answers(parts, sampling)
    assert answers(parts, sampling) == first
    assert all(len(drawn) == 3 for drawn in first.values())
    assert all(len(set(drawn)) > 1 for drawn in first.values())
    other = engine_of(parts, 3, seed=2)
    again = dict(other.generate(other.batches(PROMPTS), sampling))
    assert [answer.text for answer in again["6"]] != first["6"]


def test_continuous_batching_returns_all_answers(parts: tuple[Any, Any]) -> None:
    drawn = answers(
        parts, Sampling(8, temperature=0.7, num_return_sequences=2), batch_size=7, continuous=True
    )
    assert set(drawn) == {prompt.id for prompt in PROMPTS}
    assert all(len(texts) == 2 for texts in drawn.values())


def test_batches_have_similar_lengths_and_do_not_depend_on_order(parts: tuple[Any, Any]) -> None:
    engine = engine_of(parts, 3)
    batches = engine.batches(PROMPTS)
    assert [[prompt.id for prompt in batch] for batch in batches] == [
        ["6", "5", "4"],
        ["3", "2", "1"],
        ["0"],
    ]
    assert engine.batches(list(reversed(PROMPTS))) == batches


def test_answer_at_the_token_limit_is_truncated(parts: tuple[Any, Any]) -> None:
    engine = engine_of(parts, 8)
    ((_, (cut,)),) = engine.generate([PROMPTS[:1]], Sampling(5))
    assert (cut.truncated, cut.tokens) == (True, 5)
    end = engine._ends[0]
    for ids, tokens in (([7, 8, end, 9, 9], 2), ([7, 8, 9, 9, end], 4)):
        answer = answer_of(ids, 5, [end], parts[1], renderer_of(parts[1]))
        assert (answer.truncated, answer.tokens) == (False, tokens)


def test_likelihoods_equal_those_of_single_rows(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    completions = renderer_of(tokenizer).completion_ids(["the answer " * n for n in range(1, 8)])
    after_each = {prompt.id: ids for prompt, ids in zip(PROMPTS, completions, strict=True)}
    found = dict(engine_of(parts, 8).negative_log_likelihoods([PROMPTS], after_each))
    for prompt in PROMPTS:
        before, after = prompt.ids, after_each[prompt.id]
        total, count = found[prompt.id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*before, *after]])).logits[0]
        log_p = torch.log_softmax(logits, -1)
        expected = -sum(log_p[len(before) - 1 + i, token].item() for i, token in enumerate(after))
        assert (count, total) == (len(after), pytest.approx(expected, rel=1e-4))


def test_choice_probabilities_are_a_softmax_over_the_choices(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    digits = ["1", "2", "3"]
    tokens = [tokenizer(d, add_special_tokens=False)["input_ids"][0] for d in digits]
    found = dict(engine_of(parts, 2).choice_probabilities([PROMPTS], "Score:", digits))
    for prompt in PROMPTS:
        probabilities = found[prompt.id]
        ids = [*prompt.ids, *tokenizer("Score: ", add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1, tokens]
        assert probabilities == pytest.approx(torch.softmax(logits, -1).tolist(), abs=1e-4)


def test_choices_are_scored_as_the_tokens_a_model_would_write(parts: tuple[Any, Any]) -> None:
    """Most vocabularies have " A" as one token. A model never writes a space token and then "A"."""
    _, tokenizer = parts
    renderer = renderer_of(tokenizer)
    shared, _ = renderer.choice_tokens("Score:", ["1", "2"])
    assert tokenizer.decode(shared) == "Score: "  # a space and a digit
    shared, tokens = renderer.choice_tokens("The", ["chest", "A"])
    assert tokenizer.decode(shared) == "The"
    assert tokenizer.decode(tokens[0]) == " chest"  # one token of the tiny tokenizer
    with pytest.raises(ConfigError, match="does not tell x, xy apart"):
        renderer.choice_tokens("The", ["x", "xy"])


def test_answers_end_at_the_last_position(parts: tuple[Any, Any]) -> None:
    engine = engine_of(parts, 8)
    engine._positions = len(PROMPTS[3].ids) + 4
    drawn = dict(engine.generate([PROMPTS[:4]], Sampling(12)))
    assert [(drawn[n][0].tokens, drawn[n][0].truncated) for n in "0123"] == [(4, True)] * 4
    engine._positions = len(PROMPTS[3].ids)
    drawn = dict(engine.generate([PROMPTS[:4]], Sampling(12, 0.7, num_return_sequences=2)))
    assert all(drawn[n][0].tokens > 0 for n in "012")
    assert [(answer.text, answer.truncated) for answer in drawn["3"]] == [("", True)] * 2
    found = dict(engine.choice_probabilities([[PROMPTS[6], PROMPTS[0]]], "Score:", ["1", "2"]))
    assert found["6"] == [0.5, 0.5]
    assert found["0"] != [0.5, 0.5]
    after = {"6": [5, 6], "2": [5] * 99}
    scored = dict(engine.negative_log_likelihoods([[PROMPTS[6], PROMPTS[2]]], after))
    assert scored["6"] == (0.0, 0)
    assert scored["2"][1] == engine._positions - len(PROMPTS[2].ids)


def test_layout_adds_an_end_token_and_sampling_defaults_are_dropped(tiny: Path) -> None:
    location = Location.of_folder(tiny)
    model = load_model(ModelSpec(location, False, "float32", "sdpa"))
    tokenizer = load_tokenizer(location)
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template != template
    model.generation_config.repetition_penalty = 1.5
    engine = engine_of((model, tokenizer), 2)
    assert engine._ends == sorted(
        [tokenizer.eos_token_id, tokenizer("<|endoftext|>")["input_ids"][0]]
    )
    assert model.generation_config.repetition_penalty in (None, 1.0)


def test_prompts_with_a_common_beginning_get_the_same_probabilities(
    parts: tuple[Any, Any],
) -> None:
    """What they share is computed once, and padding takes no positions."""
    ends = [[5, 6, 7], [5, 9], [8, 8, 8, 8, 9]]
    prompts = [
        Prompt(f"row{n}/{k}", [*prompt.ids, *end])
        for n, prompt in enumerate(PROMPTS[:4])
        for k, end in enumerate(ends)
    ]
    engine = engine_of(parts, 8)
    batches = engine.batches(prompts)
    for batch in batches:
        assert len({prompt.id[:4] for prompt in batch}) * 3 == len(batch)  # none is divided
    together = dict(engine.choice_probabilities(batches, "Score:", ["1", "2", "3"]))
    engine._keeps_prefixes = False
    for prompt in prompts:
        ((_, alone),) = engine.choice_probabilities([[prompt]], "Score:", ["1", "2", "3"])
        assert together[prompt.id] == pytest.approx(alone, abs=1e-5)
