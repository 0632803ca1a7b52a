"""Names of data sources in the report."""

import pytest

from medjob.config.prepare import DataSource
from medjob.data.clean import source_labels


@pytest.mark.parametrize(
    ("sources", "labels"),
    [
        (["a/rows.jsonl"], ["rows.jsonl"]),
        (["a/rows.jsonl", "b/rows.jsonl"], ["rows.jsonl", "rows.jsonl (2)"]),
        (["rows.jsonl"] * 3, ["rows.jsonl", "rows.jsonl (2)", "rows.jsonl (3)"]),
        (["r", "r (2)", "r"], ["r", "r (2)", "r (3)"]),
        ([{"path": "o/d", "split": "train"}, {"path": "o/d", "split": "test"}], ["d", "d (2)"]),
    ],
)
def test_sources_with_one_file_name_have_their_own_counts(
    sources: list[object], labels: list[str]
) -> None:
    given = [each if isinstance(each, dict) else {"path": each} for each in sources]
    assert source_labels([DataSource.model_validate(each) for each in given]) == labels
