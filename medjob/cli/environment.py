"""Checks of what every command relies on, before it runs."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from medjob.errors import ConfigError


def check() -> None:
    """Check the current directory, and the variables that huggingface_hub reads when imported.

    Raises:
        ConfigError: the directory was deleted, or a variable has a value that the import of
            huggingface_hub would fail with.
    """
    try:
        Path.cwd()
    except FileNotFoundError:  # no relative path has a meaning
        raise ConfigError("the current directory was deleted", "cd to another one") from None
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        value = os.environ.get(name) or "10"
        if not (value.isascii() and value.isdigit()):
            raise ConfigError(f"{name} must be a number of seconds (got {value[:100]!r})")
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint and not _is_url(endpoint):
        raise ConfigError(
            f"HF_ENDPOINT must be the URL of a hub (got {endpoint[:100]!r})",
            "unset it for https://huggingface.co",
        )


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False
