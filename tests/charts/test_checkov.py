"""All objects rendered from charts/medjob/ci pass checkov's Kubernetes checks."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.charts.rendering import CI, KIND, ROOT, render

CHECKOV = ROOT / ".venv-chart" / "bin" / "checkov"
# The kind values use local images without digests, which checkov refuses. The test adds digests.
PINNED = tuple(
    f'cluster.image.{key}="sha256:{digit * 64}"'
    for key, digit in (("coreDigest", "1"), ("fullDigest", "2"))
)
PINNED = (*PINNED, 'cluster.image.pullPolicy="Always"')


@pytest.mark.slow
@pytest.mark.skipif(
    not CHECKOV.exists(), reason="checkov is not installed: make .venv-chart/installed"
)
def test_every_check_passes_and_none_is_skipped(tmp_path: Path) -> None:
    count = 0
    for values in CI:
        for item in render(values, sets=PINNED if values == KIND else ()).everything:
            count += 1
            name = f"{values.stem}-{item['kind']}-{item['metadata']['name']}.yaml".lower()
            (tmp_path / name).write_text(yaml.safe_dump(item))
    assert len(list(tmp_path.iterdir())) == count
    command = [
        str(CHECKOV),
        "--framework",
        "kubernetes",
        "--skip-download",
        "--directory",
        str(tmp_path),
        "--output",
        "json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    failed = [
        f"{check['check_id']} {check['check_name']}: {check['resource']}"
        for check in report["results"]["failed_checks"]
    ]
    summary = report["summary"]
    print(summary)
    assert failed == []
    assert (summary["skipped"], summary["parsing_errors"]) == (0, 0)
    assert summary["resource_count"] >= count  # every object was checked
    assert summary["passed"] > 1000
