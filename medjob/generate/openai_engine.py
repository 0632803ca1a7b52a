"""The `openai` engine: sends prompts to an OpenAI-compatible endpoint.

Its answers are not reproducible: a provider may change the model, and batches its requests. So no
finished row is ever asked again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from medjob.config.endpoints import Endpoint
from medjob.errors import ConfigError, MedjobError
from medjob.generate.endpoint_replies import Reply, choice_format, chosen, probabilities
from medjob.generate.endpoint_requests import Requests, size_of
from medjob.generate.endpoint_spending import Spending
from medjob.generate.protocol import Batches, Generated, Prompt, Sampling
from medjob.runtime import signals

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_log = logging.getLogger(__name__)
R = TypeVar("R")
_FEW_TOKENS = 8  # a choice, and blanks or a quotation mark before it
_TOP_LOGPROBS = 20  # the most that OpenAI and vLLM give
# A model may think before it answers, and its thought counts. The smallest that gives an answer is
# used from then on.
_STRUCTURED_LIMITS = (64, 2048, 16384)


class OpenAIEngine:
    """A model behind an endpoint."""

    name = "openai"

    def __init__(
        self,
        requests: Requests,
        spending: Spending,
        endpoint: Endpoint,
        seed: int,
        system: str | None = None,
    ) -> None:
        """Prepare the engine; nothing is sent.

        Args:
            system: System message of conversations without one.
        """
        self._requests = requests
        self._spending = spending
        self._endpoint = endpoint
        self._seed = seed
        self._system = system
        self._gives_logprobs: bool | None = None
        self._structured_limit = _STRUCTURED_LIMITS[0]
        self._honours_n = True

    def figures(self) -> Mapping[str, float]:
        """What the stage has spent at the endpoint, in all of its attempts."""
        return self._spending.figures()

    def batches(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """Each prompt alone: no result depends on another prompt."""
        return single_batches(prompts)

    def generate(
        self, batches: Batches, sampling: Sampling
    ) -> Iterator[tuple[str, list[Generated]]]:
        """Yield `num_return_sequences` answers to each prompt, as they arrive.

        A prompt that the endpoint refuses gets empty answers, marked as truncated.

        Raises:
            GateError: the next prompt could exceed the limit of the cost.
            MedjobError: as `Requests.send`. In both cases, what is answered was yielded before.
        """
        tokens = sampling.max_new_tokens * sampling.num_return_sequences
        yield from self._each(
            _flat(batches), tokens, lambda client, prompt: self._generate(client, prompt, sampling)
        )

    def choice_probabilities(
        self,
        batches: Batches,
        start: str,  # noqa: ARG002  part of the protocol
        choices: Sequence[str],
    ) -> Iterator[tuple[str, list[float]]]:
        """Yield the probabilities of `choices` as the answer to each prompt, as they arrive.

        The first prompt decides how: by the log-probabilities of the answer's first word, or, if
        the endpoint gives none, by strict structured output, where the given answer gets 1. A
        prompt without a readable answer gets equal probabilities, and is counted.

        Args:
            start: Not used: the messages themselves ask for one of the choices, and not every
                endpoint continues an answer that has begun.

        Raises:
            ConfigError: the endpoint offers neither.
            GateError, MedjobError: as in `generate`.
        """
        prompts = _flat(batches)
        for some in (prompts[:1], prompts[1:]) if self._gives_logprobs is None else (prompts,):
            tokens = _FEW_TOKENS if self._gives_logprobs else self._structured_limit
            yield from self._each(
                some, tokens, lambda client, each: self._choose(client, each, choices)
            )

    def negative_log_likelihoods(
        self,
        batches: Batches,  # noqa: ARG002
        completions: Mapping[str, Sequence[int]],  # noqa: ARG002
    ) -> Iterator[tuple[str, tuple[float, int]]]:
        """Yield nothing: a chat endpoint scores no given answers, so the metric is left out."""
        return iter(())

    def close(self) -> None:
        """Do nothing: connections are closed after each task."""

    def _each(
        self,
        prompts: Sequence[Prompt],
        output_tokens: int,
        ask: Callable[[AsyncOpenAI, Prompt], Coroutine[Any, Any, R]],
    ) -> Iterator[tuple[str, R]]:
        """Ask for several prompts at a time, and yield the results as they arrive.

        Args:
            output_tokens: The most that the answers to one prompt can have.
        """
        left = deque(prompts)
        running: _Running[R] = {}
        failure: MedjobError | None = None
        with self._connected() as (loop, client):
            while True:
                if failure is None:
                    for prompt, reserved in self._affordable(left, running, output_tokens):
                        future = asyncio.run_coroutine_threadsafe(ask(client, prompt), loop)
                        running[future] = (prompt, reserved)
                if not running:
                    break
                for prompt_id, outcome in self._next_finished(running):
                    if isinstance(outcome, MedjobError):
                        failure = failure or outcome
                        self._requests.stop_retrying()
                    else:
                        yield prompt_id, outcome
                self._spending.store()
        if failure is not None:
            raise failure
        if left:
            raise self._spending.limit_reached(len(left))

    def _affordable(
        self, left: deque[Prompt], running: _Running[R], output_tokens: int
    ) -> Iterator[tuple[Prompt, float]]:
        """Take the prompts that can be sent now, and reserve what they can cost."""
        while left and len(running) < self._endpoint.max_concurrent_requests:
            size = size_of(self._messages(left[0]))
            reserved = self._spending.reserve(size, output_tokens)
            if reserved is None:
                return
            yield left.popleft(), reserved

    def _next_finished(self, running: _Running[R]) -> Iterator[tuple[str, R | MedjobError]]:
        """Wait until some prompts are answered or have failed."""
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            prompt, reserved = running.pop(future)
            self._spending.release(reserved)
            error = future.exception()
            if error is not None and not isinstance(error, MedjobError):
                raise error
            yield prompt.id, error or future.result()

    @contextmanager
    def _connected(self) -> Iterator[tuple[asyncio.AbstractEventLoop, AsyncOpenAI]]:
        """Run an event loop in another thread, so that requests continue while rows are stored."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="endpoint", daemon=True)
        thread.start()
        client = self._requests.connect()
        try:
            with signals.before_exit(lambda: self._spending.store(now=True)):
                yield loop, client
        finally:
            asyncio.run_coroutine_threadsafe(_close(client), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()
            self._spending.store(now=True)

    def _messages(self, prompt: Prompt) -> list[dict[str, str]]:
        """The conversation of a prompt in the API's form."""
        conversation = prompt.conversation
        assert conversation is not None, "prompts for endpoints have a conversation"
        system = conversation.system or self._system
        turns = [{"role": "system", "content": system}] if system else []
        for question, answer in conversation.history:
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": answer})
        return [*turns, {"role": "user", "content": conversation.question}]

    async def _generate(
        self, client: AsyncOpenAI, prompt: Prompt, sampling: Sampling
    ) -> list[Generated]:
        """Ask for all answers in one request, and for those that are missing one by one: not every
        endpoint honours `n`."""
        wanted = sampling.num_return_sequences
        answers: list[Generated] = []
        while len(answers) < wanted:
            n = wanted - len(answers) if self._honours_n else 1
            reply = await self._send(client, prompt, len(answers), n, _sampled(sampling))
            if reply.refusal:
                return [Generated("", 0, truncated=True)] * wanted
            if len(reply.answers) < n:
                self._honours_n = False
            answers += _generated(reply)
        return answers[:wanted]

    async def _send(
        self,
        client: AsyncOpenAI,
        prompt: Prompt,
        number: int,
        n: int,
        parameters: Mapping[str, Any],
    ) -> Reply:
        """Send a prompt. Its seed depends on its id, and on the number of its first answer."""
        body = {
            "messages": self._messages(prompt),
            "seed": _seed_of(prompt.id, number, self._seed),
            **({"n": n} if n > 1 else {}),
            **parameters,
        }
        reply = await self._requests.send(client, body, self._spending)
        if reply.refusal:
            self._spending.count("unreadable")
            _log.warning("%s: a prompt is refused (%s)", self._requests.where, reply.refusal)
        return reply

    async def _choose(
        self, client: AsyncOpenAI, prompt: Prompt, choices: Sequence[str]
    ) -> list[float]:
        """Ask for one of the choices."""
        equal = [1 / len(choices)] * len(choices)
        if self._gives_logprobs is not False:
            reply = await self._send(client, prompt, 0, 1, _WITH_LOGPROBS)
            if reply.refusal:
                return equal
            found = probabilities(reply.answers[0], choices)
            if found is not None:
                return self._decided(True, found, equal)
        try:
            found = await self._structured(client, prompt, choices)
        except ConfigError:
            if not self._gives_logprobs:
                raise
            found = None  # only this answer has no log-probabilities
        return self._decided(False, found, equal)

    def _decided(
        self, by_logprobs: bool, found: list[float] | None, equal: list[float]
    ) -> list[float]:
        """Note how the endpoint answers, and count the prompt."""
        if self._gives_logprobs is None:
            self._gives_logprobs = by_logprobs
            _log.info("%s: %s", self._requests.where, _HOW[by_logprobs])
        self._spending.count(
            ("logprobs" if by_logprobs else "structured") if found else "unreadable"
        )
        return found or equal

    async def _structured(
        self, client: AsyncOpenAI, prompt: Prompt, choices: Sequence[str]
    ) -> list[float] | None:
        """Ask for structured output. None if it cannot be read."""
        for limit in (each for each in _STRUCTURED_LIMITS if each >= self._structured_limit):
            parameters = {
                "temperature": 0.0,
                "max_tokens": limit,
                "response_format": choice_format(choices),
            }
            reply = await self._send(client, prompt, 0, 1, parameters)
            if reply.refusal:
                return None
            answer = reply.answers[0]
            found = chosen(answer, choices)
            if found is not None or answer.finish_reason != "length":
                self._structured_limit = limit
                return found
        return None


_Running = dict[Future[R], tuple[Prompt, float]]
"""Prompts that are asked, each with what is reserved for it."""
_WITH_LOGPROBS: Mapping[str, Any] = {
    "temperature": 0.0,
    "max_tokens": _FEW_TOKENS,
    "logprobs": True,
    "top_logprobs": _TOP_LOGPROBS,
}
_HOW = {
    True: "scores are expected values over the log-probabilities of the choices",
    False: "it gives no log-probabilities, so scores are single choices by structured output, and "
    "ties are frequent",
}


def _sampled(sampling: Sampling) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
    }


def _generated(reply: Reply) -> list[Generated]:
    """The answers of a reply. One that a filter has cut is incomplete as well."""
    tokens = (reply.output_tokens or 0) // len(reply.answers)
    return [
        Generated(answer.text.strip(), tokens, answer.finish_reason in ("length", "content_filter"))
        for answer in reply.answers
    ]


def single_batches(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """As `OpenAIEngine.batches`, before anything is connected."""
    return [[prompt] for prompt in prompts]


def _flat(batches: Iterable[Sequence[Prompt]]) -> list[Prompt]:
    return [prompt for batch in batches for prompt in batch]


def _seed_of(prompt_id: str, number: int, seed: int) -> int:
    """A seed of 31 bits, which all servers accept."""
    text = f"{seed}\n{prompt_id}\n{number}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


async def _close(client: AsyncOpenAI) -> None:
    """Cancel the requests in progress, and close the connections."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.close()
