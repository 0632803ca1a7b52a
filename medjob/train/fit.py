"""Checks that a base model, its tokenizer and the run fit together, before any training."""

from __future__ import annotations

from typing import Any

from medjob.errors import ConfigError
from medjob.plan.settings import position_limit
from medjob.sources.locations import Location
from medjob.train.model import load_config


def check_model_fits(location: Location, tokenizer: Any, max_length: int) -> None:
    """Check the tokenizer and the run's longest row against the model's configuration.

    Raises:
        ConfigError: the tokenizer has tokens without an embedding, or `max_length` exceeds the
            positions of the model.
    """
    config = load_config(location).get_text_config()
    embeddings = getattr(config, "vocab_size", None)
    if embeddings and len(tokenizer) > embeddings:
        raise ConfigError(
            f"run.base_model ({location.name}): the tokenizer has {len(tokenizer)} tokens, but the "
            f"model has embeddings for {embeddings}",
            "resize the model's embeddings to its tokenizer, or use the tokenizer of the model",
        )
    limit = position_limit(config)
    if limit and max_length > limit:
        raise ConfigError(
            f"run.sft.max_length is {max_length}, but the base model ({location.name}) has only "
            f"{limit} positions",
            f"--set run.sft.max_length={limit}",
        )


def usable_length(location: Location, max_length: int) -> int:
    """Return `max_length`, or the number of the model's positions if that is less."""
    limit = position_limit(load_config(location))
    return max_length if limit is None else min(max_length, limit)
