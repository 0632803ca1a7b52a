"""`cluster.endpoints`: OpenAI-compatible servers that judge answers or are compared."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, field_validator, model_validator

from medjob.config.addresses import refuse_credentials
from medjob.config.base import Kubernetes, Seconds

# Only such names, so that a run file cannot send another secret, such as that of the store.
API_KEY_PATTERN = r"^[A-Z][A-Z0-9_]*_API_KEY$"
Price = Annotated[float, Field(ge=0, le=1e9)]


class Endpoint(Kubernetes):
    """An OpenAI-compatible server. `endpoint:NAME/MODEL` names a model on it.

    Nothing here is in a key: a model may move to another server.
    """

    url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s/]+(/\S*)?$")]
    """Base URL, as in `https://api.openai.com/v1`; requests go to URL/chat/completions. Redirects
    are not followed."""
    api_key_variable: Annotated[str, StringConstraints(pattern=API_KEY_PATTERN)] | None = None
    """Environment variable that holds the API key, such as OPENAI_API_KEY. If it is not set, the
    file of the same name in the secrets folder is read, in lower case and with hyphens
    (`openai-api-key`). Default: no key is sent."""
    max_concurrent_requests: Annotated[int, Field(ge=1, le=1024)] = 16
    """Number of requests that wait for their answer at the same time."""
    timeout_seconds: Annotated[float, Field(gt=0, le=86400)] = 120
    """Seconds that one request may take. Then it is sent again."""
    retry_seconds: Seconds = 300
    """Seconds for which a failing request (429, 5xx, timeout, lost connection) is retried before
    the stage exits with code 75. `Retry-After` is heeded; a longer one ends the stage at once."""
    price_per_million_input_tokens: Price | None = None
    """Price of a million tokens of the prompts, in `cluster.currency`."""
    price_per_million_output_tokens: Price | None = None
    """Price of a million tokens of the answers, in `cluster.currency`."""
    max_cost: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Most that one stage may spend at this endpoint, over all its attempts, in `cluster.currency`.
    The stage stops with exit code 67 before a request that could exceed it, and keeps all finished
    rows. With several shards, each may spend its share. Default: no limit."""

    @field_validator("url", mode="before")
    @classmethod
    def _url_has_no_credentials(cls, value: Any) -> Any:
        if isinstance(value, str):  # before the pattern, whose message repeats the value
            refuse_credentials("cluster.endpoints: url of an endpoint", value)
        return value.rstrip("/") if isinstance(value, str) else value

    @model_validator(mode="after")
    def _limit_needs_prices(self) -> Endpoint:
        prices = (self.price_per_million_input_tokens, self.price_per_million_output_tokens)
        if (self.max_cost is not None or any(prices)) and None in prices:
            raise ValueError(
                "maxCost and prices need both pricePerMillionInputTokens and "
                "pricePerMillionOutputTokens; without them, the cost of a request is not known"
            )
        return self

    @property
    def host(self) -> str:
        """Host and port, for messages."""
        return urlsplit(self.url).netloc

    def cost(self, input_tokens: float, output_tokens: float) -> float:
        """The price of so many tokens. 0 if the prices are not known."""
        per_input = self.price_per_million_input_tokens or 0.0
        per_output = self.price_per_million_output_tokens or 0.0
        return (input_tokens * per_input + output_tokens * per_output) / 1e6
