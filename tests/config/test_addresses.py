"""Addresses of stores, models and data: credentials in them are refused, and never printed."""

from typing import Any

import pytest

from medjob.config.addresses import redacted
from medjob.config.load import store_ref, validate
from medjob.errors import ConfigError

SECRET = "correct-horse"
ENDPOINTS = [
    f"http://user:{SECRET}@127.0.0.1:9000",
    f"https://{SECRET}@minio:9000",
    f"http://user:{SECRET}/7@minio:9000",
    f"user:{SECRET}@minio:9000",
    f"https://minio:9000/?X-Amz-Signature={SECRET}",
    f"https://minio:9000?{SECRET}",
]
URIS = [
    f"s3://key:{SECRET}@bucket/x",
    f"s3://{SECRET}@bucket/x",
    f"gs://user:{SECRET}/7@bucket/x",
    f"https://user:{SECRET}@s3.example.org/bucket",
    f"s3://bucket/x?X-Amz-Signature={SECRET}",
    f"gs://bucket/x?access_token={SECRET}",
    f"file://user:{SECRET}@host/x",
]


def run_file(**changes: Any) -> dict[str, Any]:
    run = {"name": "t", "base_model": "org/model", "prepare": {"sources": [{"path": "org/rows"}]}}
    return {"run": run | changes.pop("run", {}), **changes}


def refused(tree: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        validate(tree)
    assert caught.value.exit_code == 64
    assert SECRET not in str(caught.value)
    assert "read credentials from the environment" in caught.value.hint


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_credentials_in_an_endpoint_are_refused(endpoint: str) -> None:
    store = {"uri": "s3://bucket/x", "endpoint": endpoint}
    refused(run_file(cluster={"store": store}), "cluster.store.endpoint")
    # Also if something else is wrong, whose message would show the whole store.
    refused(run_file(cluster={"store": store | {"regin": 1, "uri": 3}}), "cluster.store.endpoint")
    with pytest.raises(ConfigError) as caught:
        store_ref("s3://bucket/x", [f"cluster.store.endpoint={endpoint}"])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("uri", URIS)
def test_credentials_in_an_address_are_refused(uri: str) -> None:
    refused(run_file(cluster={"store": uri}), "cluster.store.uri")
    refused(run_file(cluster={"store": {"uri": uri}}), "cluster.store.uri")
    with pytest.raises(ConfigError) as caught:
        store_ref(uri)
    assert SECRET not in str(caught.value)
    if not uri.startswith("file"):
        refused(run_file(run={"base_model": uri}), "model or data source")
        refused(run_file(run={"prepare": {"sources": [{"path": uri}]}}), "model or data source")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no host at http://user:pw@h:1/b", "no host at http://***@h:1/b"),
        ("no host at http://u:p/w@h:1", "no host at http://***@h:1"),
        ('"https://h/b?X-Amz-Signature=1&y=2" failed', '"https://h/b?***" failed'),
        ("s3://bucket/a@b: 403 of me@example.org", "s3://bucket/a@b: 403 of me@example.org"),
        ("http://h:9000/bucket failed", "http://h:9000/bucket failed"),
    ],
)
def test_messages_show_addresses_without_secrets(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "uri", ["s3://bucket/rows/a@b", "gs://bucket/part-?.jsonl", "s3://bucket/a=b"]
)
def test_other_characters_are_accepted(uri: str) -> None:
    assert validate(run_file(run={"base_model": uri})).run.base_model.id == uri
