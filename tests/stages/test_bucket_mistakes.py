"""Errors for addresses in buckets that name no model or data."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.cli.main import main
from medjob.config.load import merge
from tests.stages.conftest import Bucket

BAD = [
    (
        {"base_model": "X://bucket/models"},
        66,
        "run.base_model: X://bucket/models: not a transformers model: there is no config.json",
    ),
    (
        {"base_model": "X://bucket/model"},
        66,
        "run.base_model: X://bucket/model: no objects have this prefix",
    ),
    (
        {"base_model": "X://nowhere/model"},
        64,
        "run.base_model: X://nowhere/model: there is no such bucket",
    ),
    (
        {"base_model": "X://"},
        64,
        "run.base_model.id: a URI must have the form s3://BUCKET/KEY or gs://BUCKET/KEY (got 'X://')",
    ),
    (
        {"base_model": {"id": "X://bucket/models", "revision": "v1"}},
        64,
        "revision is only valid with a hub id",
    ),
    (
        {"prepare": {"sources": [{"path": "X://bucket/rows/rows.txt"}]}},
        66,
        "rows.txt: unknown file type\nhint: supported: .jsonl",
    ),
    (
        {"prepare": {"sources": [{"path": "X://bucket/rows/none.jsonl"}]}},
        66,
        "run.prepare.sources.0: X://bucket/rows/none.jsonl: no such object",
    ),
    (
        {"prepare": {"sources": [{"path": "X://bucket/row"}]}},
        66,
        "run.prepare.sources.0: X://bucket/row: no data files have this prefix",
    ),
    (
        {"prepare": {"sources": [{"path": "X://bucket/rows", "split": "train"}]}},
        64,
        "split can only be set for a hub data set",
    ),
]


@pytest.mark.parametrize(("changes", "code", "message"), BAD, ids=[row[2] for row in BAD])
def test_wrong_address_is_reported_with_its_key(
    changes: dict[str, Any],
    code: int,
    message: str,
    remote: dict[str, Any],
    bucket: Bucket,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scheme = bucket[1]["uri"].partition("://")[0]
    text = yaml.safe_dump(merge(remote, {"run": changes})).replace("X://", f"{scheme}://")
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["fetch", "-f", str(tmp_path / "job.yaml")])
    errors = capsys.readouterr().err
    assert int(ended.value.code or 0) == code
    assert message.replace("X://", f"{scheme}://") in errors
    assert "Traceback" not in errors
