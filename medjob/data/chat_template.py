"""Writes the chat template of an exported model, which gives the prompts of its training.

A server applies the template to the messages of a request, and knows neither `run.prompt` nor the
corrections that `Renderer` makes to the base model's template.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from medjob.config.prepare import PromptParams
from medjob.data.render import Conversation, Renderer

_log = logging.getLogger(__name__)
_SYSTEM, _QUESTION = "\u2042system\u2042", "\u2042question\u2042"
_PLACES = re.compile(r"(\{system\}|\{question\})")

_RAW = """\
{{%- set state = namespace(system={system}, first=true) -%}}
{{{{- {begin} -}}}}
{{%- for message in messages -%}}
{{%- if message['role'] == 'system' -%}}
{{%- set state.system = message['content'] -%}}
{{%- elif message['role'] == 'user' -%}}
{{%- set question = message['content'] -%}}
{{%- if state.first -%}}
{fold}{first}{{%- set state.first = false -%}}
{{%- else -%}}
{later}{{%- endif -%}}
{{%- elif message['role'] == 'assistant' -%}}
{{{{- {lead} ~ (message['content'].split('</think>') | last | trim) ~ {end} -}}}}
{{%- endif -%}}
{{%- endfor -%}}
"""
_DEFAULT_SYSTEM = """\
{{%- if messages[0]['role'] != 'system' -%}}
{{%- set messages = [{{'role': 'system', 'content': {system}}}] + messages -%}}
{{%- endif -%}}
"""
_FOLD_IN_RAW = """\
{%- if state.system -%}{%- set question = state.system ~ '\n\n' ~ question -%}{%- endif -%}
"""
_FOLD = """\
{{%- set system_message = {system} -%}}
{{%- if messages[0]['role'] == 'system' -%}}
{{%- set system_message = messages[0]['content'] -%}}{{%- set messages = messages[1:] -%}}
{{%- endif -%}}
{{%- if system_message and messages and messages[0]['content'] is string -%}}
{{%- set first_message = system_message ~ '\\n\\n' ~ messages[0]['content'] -%}}
{{%- set messages = [{{'role': 'user', 'content': first_message}}] + messages[1:] -%}}
{{%- endif -%}}
"""
_WITHOUT_ENDING = """\
{{%- set rendered -%}}{template}{{%- endset -%}}
{{{{- rendered[:-{length}] if add_generation_prompt else rendered -}}}}
"""


def chat_template_of(tokenizer: Any, params: PromptParams, renderer: Renderer) -> str:
    """Return a Jinja template with which `apply_chat_template` gives the trained prompt.

    `run.prompt.system` becomes the default system message. A raw prompt becomes a template that
    takes system messages and earlier exchanges as `Renderer` does. A base model's own template is
    kept, with a system message in the first user turn if it has no place for it, and without an
    opening `<think>` at its end, which belongs to the answer.
    """
    if params.template is not None:
        template = _raw_template(tokenizer, params, renderer)
    else:
        template = _with_system(tokenizer, params)
    expected = renderer.prompt(Conversation(_QUESTION))
    given = _render(tokenizer, template)
    if given != expected and given.startswith(expected):
        length = len(given) - len(expected)
        template = _WITHOUT_ENDING.format(template=template, length=length)
        given = _render(tokenizer, template)
    if given != expected:
        _log.warning("the exported chat template does not give the prompts of the training")
    return template


def _render(tokenizer: Any, template: str, system: str = "") -> str:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": _QUESTION})
    return str(
        tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    )


def _with_system(tokenizer: Any, params: PromptParams) -> str:
    template = str(tokenizer.get_chat_template())
    system = _literal(params.system or "")
    if not _takes_system(tokenizer, template):
        return _FOLD.format(system=system) + template
    return (_DEFAULT_SYSTEM.format(system=system) if params.system else "") + template


def _takes_system(tokenizer: Any, template: str) -> bool:
    """Whether the template has a place for a system message. Some raise an error, others drop
    it."""
    try:
        return _SYSTEM in _render(tokenizer, template, _SYSTEM)
    except Exception:  # templates are programs, so they can raise anything
        return False


def _raw_template(tokenizer: Any, params: PromptParams, renderer: Renderer) -> str:
    """Translate `run.prompt.template`. Messages after the first repeat it without the system
    message."""
    template = params.template or ""
    bos = tokenizer.bos_token or ""
    begins = bool(bos) and renderer.prompt(Conversation(_QUESTION)).startswith(bos)
    return _RAW.format(
        system=_literal(params.system or ""),
        begin=_literal(bos if begins and not template.startswith(bos) else ""),
        fold="" if "{system}" in template else _FOLD_IN_RAW,
        first=_turn(template, renderer.lead),
        later=_turn(template.replace("{system}", ""), renderer.lead),
        lead=_literal(renderer.lead),
        end=_literal(renderer.completion("").removeprefix(renderer.lead)),
    )


def _turn(template: str, lead: str) -> str:
    """Return the Jinja expression of a user turn. A blank at its end can belong to the answer."""
    names = {"{system}": "state.system", "{question}": "question"}
    pieces = [piece for piece in _PLACES.split(template.removesuffix(lead)) if piece]
    expression = " ~ ".join(names.get(piece) or _literal(piece) for piece in pieces)
    return f"{{{{- {expression} -}}}}\n"


def _literal(text: str) -> str:
    """Return the text as a Jinja string. Jinja decodes the escapes of Python."""
    return "'" + text.encode("unicode_escape").decode("ascii").replace("'", "\\'") + "'"
