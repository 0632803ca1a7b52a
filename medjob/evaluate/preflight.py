"""Check the models that are first used after the training, before anything is spent on it."""

from __future__ import annotations

from collections.abc import Callable

from medjob.config import Run
from medjob.config.base import ModelRef
from medjob.data.prompts import LETTER_START
from medjob.data.render import Renderer
from medjob.judge.load import key_of
from medjob.judge.questions import FORMS
from medjob.judge.scoring import plain_renderer
from medjob.sources.locations import Location
from medjob.train.model import load_tokenizer

_OPTIONS = ("A", "B", "C", "D")


def check_later_models(run: Run, locate: Callable[[ModelRef], Location | None]) -> None:
    """Load the tokenizers of the judges and of the additional models to compare, and render with
    them.

    Args:
        locate: Returns where a model is on this machine, or None if it is not there.

    Raises:
        ConfigError: a chat template is missing or fails, or the tokenizer does not tell the digits
            or letters apart that are compared.
        InputError: a tokenizer cannot be loaded.
    """
    for number, model in enumerate(run.judge.models):
        judge = model or run.base_model
        if not judge.is_endpoint:
            _check_judge(locate(judge), key_of(number))
    for number, reference in enumerate(run.evaluate.extra_models):
        location = None if reference.is_endpoint else locate(reference)
        if location is not None:
            tokenizer = load_tokenizer(location)
            key = f"run.evaluate.extra_models.{number}"
            Renderer(tokenizer, run.prompt, key).choice_tokens(LETTER_START, _OPTIONS)


def _check_judge(location: Location | None, key: str) -> None:
    if location is None:
        return
    renderer = plain_renderer(load_tokenizer(location), key)
    for form in FORMS:
        renderer.choice_tokens(form.start, form.choices)
