"""An address that ends in / names the same files of a bucket as a path does of a directory."""

import json
from pathlib import Path

import datasets
import pytest

from medjob.config.prepare import DataSource
from medjob.config.store import StoreRef
from medjob.data.read import read
from medjob.errors import InputError
from medjob.sources.buckets import Original
from medjob.sources.locations import Location
from medjob.sources.references import local_pin
from tests.stages.conftest import Bucket, put

ROWS = [{"question": f"q{i}", "answer": "a"} for i in range(4)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    (folder / "sub" / ".ipynb_checkpoints").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name in ("a.jsonl", "sub/b.JSONL", ".hidden.jsonl", "sub/.ipynb_checkpoints/b.jsonl"):
        (folder / name).write_text(lines)
    (folder / "README.md").write_text("not data")
    (folder / "c.xlsx").write_text("not data")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder


def test_copy_of_a_prefix_equals_the_directory(
    rows: Path, bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = DataSource(path=put(bucket, "rows", rows) + "/")
    Original.find(source, StoreRef.model_validate(bucket[1])).copy(tmp_path / "copy")
    assert caplog.messages == [f"{source.path}: 2 files are not data and were not read: .md, .xlsx"]
    local = DataSource(path=str(rows))
    assert local_pin(DataSource(path=str(tmp_path / "copy"))) == local_pin(local)
    found = list(read(source, Location(source.path, str(tmp_path / "copy"))))
    assert found == list(read(local, Location(local.path, local.path)))
    assert [dict(row.fields) for row in found] == ROWS * 3


def test_compressed_object_is_named_by_its_key(rows: Path, bucket: Bucket, tmp_path: Path) -> None:
    for key in ("a.csv.gz", "a.TSV", "a.json.zst"):
        source = DataSource(path=put(bucket, f"other/{key}", rows / "a.jsonl"))
        Original.find(source, StoreRef.model_validate(bucket[1])).copy(tmp_path / key)
        assert (tmp_path / key / key).is_file()
    source = DataSource(path=put(bucket, "other/a.gz", rows / "a.jsonl"))
    with pytest.raises(InputError, match="unknown file type"):
        Original.find(source, StoreRef.model_validate(bucket[1]))
