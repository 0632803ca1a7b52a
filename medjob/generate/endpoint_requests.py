"""Send requests to an OpenAI-compatible endpoint: retries, rate limits, refused parameters."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import random
import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from medjob.config.endpoints import Endpoint
from medjob.errors import ConfigError, InputError, MedjobError, RetryError
from medjob.generate.endpoint_replies import Malformed, Reply, parse
from medjob.generate.endpoint_spending import Spending
from medjob.runtime.printable import printable

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

_log = logging.getLogger(__name__)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_MALFORMED_TRIES = 4  # replies that cannot be read are paid for
_TEMPORARY = {408, 409, 425, 429}  # and 5xx
_SHOWN = 200  # characters of a server's message
_QUOTED = 24  # characters in a row of a prompt that make a message a quotation
# What one prompt is refused for; the next one is not.
_ABOUT_THE_PROMPT = re.compile(
    r"context_length_exceeded|string_above_max_length|content_filter|content_policy|invalid_prompt"
    r"|context (length|window)|prompt is too long|too many tokens",
    re.IGNORECASE,
)
_NO_CREDIT = re.compile(r"insufficient_quota|billing_hard_limit|payment", re.IGNORECASE)
# Parameters that some servers or models refuse, in the order in which a message is searched for
# them. They are left out from then on, or sent in another way: see `_accepted`.
_OPTIONAL = ("max_tokens", "top_logprobs", "logprobs", "temperature", "top_p", "seed", "n")
_FEW_LOGPROBS = 5  # some servers give no more


class _Temporary(Exception):
    """A failure that may pass."""

    def __init__(self, reason: str, retry_after: float | None = None, paid: bool = False) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        """Seconds that the server asks to wait."""
        self.paid = paid


class Requests:
    """Requests to one model of one endpoint. All of its coroutines run in one event loop."""

    def __init__(
        self, name: str, endpoint: Endpoint, key: str, model: str, secret: str | None
    ) -> None:
        """Prepare requests; nothing is sent.

        Args:
            name: Name of the endpoint in `cluster.endpoints`.
            key: The run file's key of the model, for messages.
            model: Name of the model at the endpoint.
            secret: API key. No message and no log contains it.
        """
        self._name = name
        self._endpoint = endpoint
        self._key = key
        self._model = model
        self._secret = secret
        self._refused: set[str] = set()
        self._not_before = 0.0
        self._stopping = False

    @property
    def where(self) -> str:
        """The endpoint, for messages."""
        return f"endpoint {self._name} ({self._endpoint.host})"

    def stop_retrying(self) -> None:
        """Let each request in progress end with its current attempt: the stage will stop."""
        self._stopping = True

    def connect(self) -> AsyncOpenAI:
        """Return a client for `send`. The caller closes it."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        self._stopping = False
        limit = self._endpoint.timeout_seconds
        # A redirect would take the rows to a host that nobody has agreed to.
        http = DefaultAsyncHttpxClient(follow_redirects=False, timeout=limit)
        return AsyncOpenAI(
            api_key=self._secret or "none",
            base_url=self._endpoint.url,
            max_retries=0,
            timeout=limit,
            http_client=http,
        )

    async def send(
        self, client: AsyncOpenAI, parameters: Mapping[str, Any], spending: Spending
    ) -> Reply:
        """Send one request until it is answered, and count what it has cost.

        Raises:
            ConfigError: the endpoint refuses the API key, the model or a parameter.
            InputError: the account has no credit.
            RetryError: it has failed for longer than `retrySeconds`.
        """
        deadline: float | None = None
        malformed = 0
        for wait in _waits():
            await self._wait_for_turn()
            try:
                return await self._once(client, parameters, spending)
            except _Temporary as problem:
                now = time.monotonic()
                deadline = deadline or now + self._endpoint.retry_seconds
                malformed += problem.paid
                pause = _with_jitter(wait, problem.retry_after)
                if now + pause > deadline or malformed >= _MALFORMED_TRIES or self._stopping:
                    raise self._given_up(problem) from None
                if problem.retry_after is not None:
                    self._not_before = max(self._not_before, now + problem.retry_after)
                _log.info("%s: %s; retried in %.1f s", self.where, problem, pause)
                await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _wait_for_turn(self) -> None:
        """Wait as long as the endpoint has asked any request to wait."""
        while (left := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(left + random.uniform(0, 0.1 * left))

    async def _once(
        self, client: AsyncOpenAI, parameters: Mapping[str, Any], spending: Spending
    ) -> Reply:
        """Send one request, again without the parameters that it is refused for."""
        import openai

        while True:
            sent = self._accepted(parameters)
            try:
                async with asyncio.timeout(self._endpoint.timeout_seconds):
                    raw = await client.chat.completions.with_raw_response.create(
                        model=self._model, extra_headers=self._headers(), **sent
                    )
            except openai.APIStatusError as error:
                if not self._leave_out(error, sent):
                    return self._refusal(error, sent)
                continue
            except (TimeoutError, openai.APITimeoutError):
                seconds = self._endpoint.timeout_seconds
                raise _Temporary(f"no answer within {seconds:g} s") from None
            except openai.APIConnectionError as error:
                raise self._connection_problem(error) from None
            return _read(raw.text, sent, spending)

    def _headers(self) -> dict[str, Any]:
        """Headers to leave out, so that the environment gives nothing but the named key."""
        from openai import omit

        names = ["OpenAI-Organization", "OpenAI-Project"]
        return dict.fromkeys(names if self._secret else [*names, "Authorization"], omit)

    def _accepted(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters without those that the endpoint refuses."""
        sent = {name: value for name, value in parameters.items() if name not in self._refused}
        if "max_tokens" in self._refused:  # by OpenAI's newer models, which think
            sent["max_completion_tokens"] = parameters["max_tokens"]
        if "top_logprobs" in self._refused and "logprobs" in sent:
            sent["top_logprobs"] = _FEW_LOGPROBS
        if "logprobs" in self._refused:
            sent.pop("top_logprobs", None)
        return sent

    def _leave_out(self, error: APIStatusError, sent: Mapping[str, Any]) -> bool:
        """Note the optional parameter that a request was refused for. Whether there is one."""
        if error.status_code not in (400, 422) or _ABOUT_THE_PROMPT.search(_text(error)):
            return False
        names = [name for name in _OPTIONAL if name in sent and _names(error, name)]
        if not names:
            return False
        name = names[0]
        if name.endswith("logprobs"):  # at first there may only be too many
            name = "logprobs" if sent["top_logprobs"] == _FEW_LOGPROBS else "top_logprobs"
        self._refused.add(name)
        _log.warning("%s: %s does not accept %s, so it is left out", self.where, self._model, name)
        return True

    def _refusal(self, error: APIStatusError, sent: Mapping[str, Any]) -> Reply:
        """A reply without answers, if only this prompt is refused.

        Raises:
            _Temporary: the same request may succeed later.
            MedjobError: no request will succeed.
        """
        status, text = error.status_code, _text(error)
        if status == 402 or (status == 429 and _NO_CREDIT.search(text)):
            raise InputError(
                f"{self.where}: the account has no credit (HTTP {status})",
                "add credit, and run the same command again: finished rows are kept",
            ) from None
        if status in _TEMPORARY or status >= 500:
            wait = _retry_after(error.response.headers)
            raise _Temporary(f"HTTP {status}", wait) from None
        if status == 413 or (status in (400, 422) and _ABOUT_THE_PROMPT.search(text)):
            return Reply((), refusal=error.code or f"HTTP {status}")
        raise self._permanent(error, sent) from None

    def _permanent(self, error: APIStatusError, sent: Mapping[str, Any]) -> MedjobError:
        status = error.status_code
        key = f"cluster.endpoints.{self._name}"
        if status in (401, 403):
            return ConfigError(
                f"{self.where}: {self._credentials()} (HTTP {status})",
                f"set {key}.apiKeyVariable to the variable that holds its API key, and check the "
                "key (images/README.md lists the secret files)",
            )
        if status == 404:
            return ConfigError(
                f"{self._key}: {self.where} has no model {self._model!r} at {self._endpoint.url} "
                "(HTTP 404)",
                f"check the model's name, and {key}.url, which usually ends in /v1",
            )
        if 300 <= status < 400:
            return ConfigError(
                f"{key}.url: {self.where} redirects to another address (HTTP {status}), and "
                "redirects are not followed",
                "name the final address",
            )
        hint = "check the model and the endpoint's documentation"
        if "response_format" in sent:
            hint += "; a judge needs an endpoint with log-probabilities or structured output"
        said = self._said(error, sent)
        return ConfigError(
            f"{self._key}: {self.where} refuses the request (HTTP {status}){said}", hint
        )

    def _credentials(self) -> str:
        variable = self._endpoint.api_key_variable
        if variable is None:
            return "an API key is required, and none was sent"
        return f"the API key in {variable} is refused"

    def _said(self, error: APIStatusError, sent: Mapping[str, Any]) -> str:
        """The server's message, unless it repeats text of the prompt."""
        text = " ".join(_text(error).split())[:_SHOWN]
        prompt = " ".join(" ".join(each["content"].split()) for each in sent["messages"])
        starts = range(max(1, len(text) - _QUOTED + 1))
        if any(text[start : start + _QUOTED] in prompt for start in starts):
            return ""
        if self._secret:
            text = text.replace(self._secret, "***")
        return f": {printable(text)}"

    def _connection_problem(self, error: Exception) -> Exception:
        cause = error.__cause__
        reason = f"{type(cause).__name__}: {cause}" if cause else type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            return ConfigError(
                f"cluster.endpoints.{self._name}.url: the certificate of {self._endpoint.host} is "
                "not trusted",
                "set SSL_CERT_FILE to the certificates of your authority",
            )
        return _Temporary(f"no answer ({printable(reason)[:_SHOWN].rstrip(': ')})")

    def _given_up(self, problem: _Temporary) -> RetryError:
        if problem.retry_after is not None:
            return RetryError(
                f"{self.where}: {problem}, and it asks to wait {problem.retry_after:,.0f} s",
                "run the same command later: finished rows are kept; or lower "
                f"cluster.endpoints.{self._name}.maxConcurrentRequests",
            )
        key = f"cluster.endpoints.{self._name}"
        if problem.paid:
            return RetryError(f"{self.where}: {problem}", f"check {key}.url, which ends in /v1")
        return RetryError(
            f"{self.where}: {problem}",
            "run the same command later: finished rows are kept; it is retried for "
            f"{self._endpoint.retry_seconds:g} s ({key}.retrySeconds)",
        )


def _waits() -> Iterator[float]:
    """Seconds before each retry, without jitter."""
    wait = _FIRST_WAIT_S
    while True:
        yield wait
        wait = min(2 * wait, _LONGEST_WAIT_S)


def _with_jitter(wait: float, retry_after: float | None) -> float:
    """Half to all of `wait`, or what the server asks for and up to a quarter more, so that requests
    that have failed together are not sent together again."""
    if retry_after is None:
        return wait * random.uniform(0.5, 1)
    return retry_after + random.uniform(0, 0.25 * max(1.0, retry_after))


def _read(body: str, sent: Mapping[str, Any], spending: Spending) -> Reply:
    """Parse a reply and count it. One that cannot be read was probably paid for, so it counts."""
    prompt_bytes = size_of(sent["messages"])
    try:
        reply = parse(body)
    except Malformed as problem:
        spending.add(prompt_bytes, 0, None, 0)
        raise _Temporary(f"the reply is not a chat completion: {problem}", paid=True) from None
    output_bytes = sum(len(answer.text.encode(errors="replace")) for answer in reply.answers)
    spending.add(prompt_bytes, output_bytes, reply.input_tokens, reply.output_tokens)
    return reply


def size_of(messages: list[dict[str, str]]) -> int:
    """Bytes of the text of messages."""
    return sum(len(message["content"].encode(errors="replace")) for message in messages)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a `Retry-After` header: a number, or a date (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _text(error: APIStatusError) -> str:
    """Code and message of an error."""
    body = error.body
    message = body.get("message") if isinstance(body, dict) else body
    return f"{error.code or ''} {message or ''}".strip()


def _names(error: APIStatusError, parameter: str) -> bool:
    """Whether an error is about a parameter."""
    if error.param:
        return error.param == parameter
    return re.search(rf"\b{parameter}\b", _text(error)) is not None
