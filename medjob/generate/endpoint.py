"""The engine of a model that is named as `endpoint:NAME/MODEL`, and what the stage has spent."""

from __future__ import annotations

from medjob.config.base import ModelRef
from medjob.errors import ConfigError
from medjob.generate.endpoint_requests import Requests
from medjob.generate.endpoint_spending import Spending
from medjob.generate.openai_engine import OpenAIEngine, single_batches
from medjob.generate.protocol import Engine
from medjob.generate.work import LazyEngine
from medjob.runtime import secrets
from medjob.stage import Metrics, RowContext, RowExtras


def endpoint_engine(
    context: RowContext, key: str, model: ModelRef, system: str | None = None
) -> LazyEngine:
    """Return the engine `openai` for a model of an endpoint. Nothing is sent before it is asked.

    Args:
        key: The run file's key that names the model, for messages.
        system: System message of conversations without one.
    """
    extras = context.extras
    endpoint = extras.endpoints[model.endpoint]

    def load() -> Engine:
        secret = _api_key(model.endpoint, endpoint.api_key_variable)
        requests = Requests(model.endpoint, endpoint, key, model.served_name, secret)
        spending = _spending(extras, model.endpoint)
        return OpenAIEngine(requests, spending, endpoint, context.run.seed, system)

    return LazyEngine("openai", single_batches, load)


def spending(extras: RowExtras) -> Metrics:
    """The metric `endpoints`: what the stage has spent in all its attempts and shards, by the
    endpoint's name. None for a stage that has sent nothing."""
    found = {name: _spending(extras, name).figures() for name in extras.endpoints}
    used = {name: figures for name, figures in found.items() if figures["requests"]}
    return {"endpoints": used} if used else {}


def _spending(extras: RowExtras, name: str) -> Spending:
    return Spending(
        name,
        extras.endpoints[name],
        extras.currency,
        extras.finished,
        extras.progress,
        extras.shard,
    )


def _api_key(name: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    found = secrets.api_key(variable)
    if found is None:
        file = variable.lower().replace("_", "-")
        raise ConfigError(
            f"cluster.endpoints.{name}.apiKeyVariable: {variable} is not set",
            f"export {variable}=..., or put the key into the file {file} of the secrets folder "
            "(/run/secrets/medjob, or MEDJOB_SECRETS)",
        )
    return found
