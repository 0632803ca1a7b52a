"""Thoughts that reasoning models and chat templates write before an answer of any style."""

from typing import Any

import pytest

from medjob.data.styles import format_answer, take_apart

LAYOUT = {"thinking": "## Thinking\n\nHm.\n\n## Final Response\n\nSo.", "plain": "So."}
LAYOUT["tags"] = "<think>\nHm.\n</think>\n<response>\nSo.\n</response>"


@pytest.mark.parametrize("style", ["thinking", "tags", "plain"])
@pytest.mark.parametrize(
    "thought", ["<think>\n\n</think>\n\n", "<think></think>", " <thinking>\n</thinking>\n", "\n"]
)
def test_empty_thought_before_the_layout_is_skipped(style: Any, thought: str) -> None:
    answer = take_apart(style, thought + LAYOUT[style])
    assert answer == take_apart(style, LAYOUT[style])
    assert answer.complies
    assert answer.response == "So."


@pytest.mark.parametrize(
    ("style", "text", "reasoning", "response", "complies"),
    [
        ("plain", "<think>\nLong.\n</think>\n\nSo.", "Long.", "So.", True),
        ("plain", "Long.\n</think>\n\nSo.", "Long.", "So.", True),
        ("plain", "<THINK>Long.</THINK>So.", "Long.", "So.", True),
        ("plain", "[THINK]Long.[/THINK]So.", "Long.", "So.", True),
        ("plain", "<think>Long, and cut", "Long, and cut", "", False),
        ("plain", "<think>Long.</think>", "Long.", "", False),
        ("plain", "So. <think>Long, and cut", "Long, and cut", "So.", False),
        ("thinking", "<think>Long, and cut", "Long, and cut", "", False),
        ("thinking", "<think>Long.</think>So.", "Long.", "So.", False),
        ("thinking", "<think>A.</think>\n" + LAYOUT["thinking"], "Hm.", "So.", True),
        ("tags", "<think>Long, and cut", "Long, and cut", "", False),
        ("tags", "<think>Long.</think>So.", "Long.", "So.", False),
        ("tags", "Before <think>Hm.</think><response>So.</response>", None, "So.", False),
        ("tags", "<think>Hm.</think><response>So.", "Hm.", "So.", False),
    ],
)
def test_thought_is_no_part_of_the_response(
    style: Any, text: str, reasoning: str | None, response: str, complies: bool
) -> None:
    answer = take_apart(style, text)
    assert (answer.response, answer.complies) == (response, complies)
    assert reasoning in (None, answer.reasoning)


@pytest.mark.parametrize("style", ["thinking", "tags", "plain"])
@pytest.mark.parametrize(
    "response", ["So.", "A\n\nB", "# Heading\n- item", "1 < 2 > 0", "x" * 5000]
)
def test_written_layout_is_read_back(style: Any, response: str) -> None:
    answer = take_apart(style, format_answer(style, "First.\n\nThen.", response))
    assert answer.complies
    assert answer.response == response
