"""What a user is told of an address that stands for nothing."""

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
        "run.base_model: X://bucket/models: has no config.json, so it is no transformers model",
    ),
    (
        {"base_model": "X://bucket/model"},
        66,
        "run.base_model: X://bucket/model: there is nothing below it",
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
        "rows.txt: has an unknown ending\nhint: known: .jsonl",
    ),
    (
        {"prepare": {"sources": [{"path": "X://bucket/rows/none.jsonl"}]}},
        66,
        "run.prepare.sources.0: X://bucket/rows/none.jsonl: there is no such",
    ),
    (
        {"prepare": {"sources": [{"path": "X://bucket/row"}]}},
        66,
        "run.prepare.sources.0: X://bucket/row: there is no data file below it",
    ),
    (
        {"prepare": {"sources": [{"path": "X://bucket/rows", "split": "train"}]}},
        64,
        "split can only be set for a hub data set",
    ),
]


@pytest.mark.parametrize(("changes", "code", "message"), BAD, ids=[str(n) for n in range(len(BAD))])
def test_mistakes_are_told_with_their_key(
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
