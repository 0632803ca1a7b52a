"""The chat template of an exported model: with plain transformers it gives the prompts of the training."""

from pathlib import Path
from typing import Any

import pytest

from medjob.config.prepare import PromptParams
from medjob.data.chat_template import chat_template_of
from medjob.data.render import Conversation, Renderer
from tests.support.families import CHAT_FAMILIES, FAMILIES

HISTORY = (("What is a cold?", "A mild infection."), ("How long?", "A week."))
THOUGHT = "<think>\nHm.\n</think>\n<response>\nA mild infection.\n</response>"
RAW = {
    "a blank at the end": "Question: {question}\nAnswer: ",
    "no blank": "### Q\n{question}\n### A\n",
    "quotes and braces": "It's \"{{x}}\" {% if \\n %}: {question}'s answer {# is #}\n",
    "other scripts": "问题🙂：{question}\n回答：",
    "a system place": "<<{system}>> {question} =>",
    "a system place after": "{question} ({system}) =>",
}
CONVERSATIONS = {
    "a question": Conversation("Does rest help, or 38.5 degrees? 胸痛"),
    "a system message": Conversation("Does rest help?", system="Be brief."),
    "earlier exchanges": Conversation("And then?", history=HISTORY),
    "an earlier thought": Conversation("And then?", history=((HISTORY[0][0], THOUGHT), HISTORY[1])),
    "both": Conversation("And then?", system='It\'s "brief".\nVery.', history=HISTORY),
}


def messages_of(conversation: Conversation) -> list[dict[str, str]]:
    turns = [("system", conversation.system)] if conversation.system else []
    for question, answer in conversation.history:
        turns += [("user", question), ("assistant", answer)]
    return [
        {"role": role, "content": text} for role, text in [*turns, ("user", conversation.question)]
    ]


def check(tokenizer: Any, params: PromptParams, conversation: Conversation, folder: Path) -> None:
    """Save and load the tokenizer with the exported template, and compare the ids of a prompt."""
    from transformers import AutoTokenizer

    renderer = Renderer(tokenizer, params)
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template = chat_template_of(tokenizer, params, renderer)
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = original
    served = AutoTokenizer.from_pretrained(folder)
    ids = served.apply_chat_template(
        messages_of(conversation), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    expected = renderer.prompt_ids([conversation])[0]
    assert served.decode(ids) == served.decode(expected)
    assert ids == expected


@pytest.fixture(scope="module", params=CHAT_FAMILIES)
def chat(request: pytest.FixtureRequest) -> Any:
    return CHAT_FAMILIES[request.param].tokenizer()


@pytest.fixture(scope="module", params=FAMILIES)
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param].tokenizer()


@pytest.mark.parametrize("system", [None, 'You\'re a "doctor".\nAnswer {briefly} 简短.'])
@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_chat_template_gives_the_trained_prompt(
    chat: Any, system: str | None, conversation: Conversation, tmp_path: Path
) -> None:
    check(chat, PromptParams(style="plain", system=system), conversation, tmp_path)


@pytest.mark.parametrize("template", RAW.values(), ids=RAW)
@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_raw_prompt_becomes_a_chat_template(
    any_tokenizer: Any, template: str, conversation: Conversation, tmp_path: Path
) -> None:
    check(any_tokenizer, PromptParams(style="plain", template=template), conversation, tmp_path)
