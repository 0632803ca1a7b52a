"""Addresses of buckets and endpoints: what they may hold, and how messages show them."""

from __future__ import annotations

import re

from medjob.errors import ConfigError

_USER = re.compile(r"^[\w+.-]+://([^/?#@]*@|[^/?#:]*:[^@]*@)")
_USER_IN_TEXT = re.compile(r"(\w://)(?:[^/\s'\"@]*@|[^/\s'\":]*:[^\s'\"@]*@)")
_QUERY_IN_TEXT = re.compile(r"(\w://[^\s'\"?]*)\?[^\s'\"]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def refuse_credentials(key: str, address: str) -> None:
    """Check the address at `key` of the run file.

    The error does not repeat them. It is not a ValueError, because pydantic would add the value.

    Raises:
        ConfigError: it holds a user name, a password or a signature.
    """
    is_endpoint = key.endswith("endpoint")
    has_user = _USER.match(address) is not None or (is_endpoint and "@" in address)
    has_query = "?" in address and (is_endpoint or "=" in address.partition("?")[2])
    if has_user or (has_query and "://" in address):
        raise ConfigError(
            f"{key}: an address must not contain credentials or a query (a user name, password, "
            "token or signature)",
            "remove them; the SDKs read credentials from the environment, ~/.aws or a mounted "
            "secret (docs/guides/stores.md)",
        )


def check_bucket_uri(key: str, uri: str) -> None:
    """Check that every store finds an object under the name that it was written with.

    Some stores fold `a//b`, `a/./b` and `a\\b` when they write, and not when they list.

    Raises:
        ConfigError: the path of `s3://BUCKET/PATH` or `gs://BUCKET/PATH` has an empty segment, `.`
            or `..`, a backslash or a control character.
    """
    scheme, _, rest = uri.partition("://")
    if _CONTROL.search(uri):
        raise ConfigError(
            f"{key}: the address contains a control character (got {uri!r})", "remove it"
        )
    if scheme == "file":
        return
    _, slash, path = rest.partition("/")
    segments = path.removesuffix("/").split("/") if slash and path else []
    wrong = [segment for segment in segments if segment in {"", ".", ".."} or "\\" in segment]
    if wrong or path == "/":
        raise ConfigError(
            f"{key}: the path contains an empty segment, `.`, `..` or a backslash (got {uri!r})",
            "stores do not agree on what it names; write it without",
        )


def redacted(text: str) -> str:
    """Remove user names, passwords and signatures from the URLs in a message."""
    return _QUERY_IN_TEXT.sub(r"\1?***", _USER_IN_TEXT.sub(r"\1***@", text))
