"""A run produces the same artifacts in a folder, in SeaweedFS and in a GCS emulator."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.config.store import StoreRef
from medjob.store import Store, open_store
from tests.support import store_servers
from tests.support.cli_process import finish, start

pytestmark = pytest.mark.slow


def run(
    tree: dict[str, Any], folder: Path, store: dict[str, Any], until: str
) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.yaml").write_text(
        yaml.safe_dump(tree | {"cluster": {"store": store, "workDir": str(folder / "work")}})
    )
    return start(folder / "job.yaml", "run", "--until", until)


def digests(store: Store) -> dict[str, str]:
    found = {
        entry.key.split("/")[1]: store.get(entry.key)
        for entry in store.list("t/")
        if entry.key.endswith("_SUCCESS.json")
    }
    return {stage: json.loads(blob.data)["digest"] for stage, blob in found.items() if blob}


@pytest.fixture(scope="module")
def in_a_folder() -> dict[str, str]:
    """Digests of the run in a folder. The first test fills them in."""
    return {}


@pytest.mark.parametrize("kind", ["seaweedfs", "gcs-emulator"])
def test_run_in_a_bucket_has_the_digests_of_a_folder(
    kind: str,
    request: pytest.FixtureRequest,
    tree: dict[str, Any],
    tmp_path: Path,
    in_a_folder: dict[str, str],
) -> None:
    # Train long enough for answers that share words with the references; otherwise there are no
    # preference pairs.
    tree["run"] |= {"method": "full", "dpo": tree["run"]["dpo"] | {"learning_rate": 1e-4}}
    tree["run"]["sft"] |= {
        "learning_rate": 3e-3,
        "max_steps": 80,
        "save_steps": 40,
        "eval_steps": 40,
    }
    tree["run"]["candidates"] = {"max_new_tokens": 64, "temperature": 1.3}
    if not in_a_folder:
        local = {"uri": f"file://{tmp_path}/store"}
        finish(run(tree, tmp_path / "local", local, "export"))
        in_a_folder |= digests(open_store(StoreRef(**local)))
    assert set(in_a_folder) >= {
        "fetch",
        "prepare",
        "sft",
        "candidates",
        "judge",
        "dpo",
        "evaluate",
        "export",
    }
    options: dict[str, Any] = {
        "uri": f"s3://{store_servers.BUCKET}/run",
        "addressingStyle": "path",
    }
    if kind == "seaweedfs":
        options["endpoint"] = request.getfixturevalue("weed")
    else:
        options = {
            "uri": f"gs://{store_servers.BUCKET}/run",
            "anonymous": True,
            "singleWriter": True,
        }
        options["endpoint"] = request.getfixturevalue("emulator")
    finish(run(tree, tmp_path / kind, options, "export"))
    assert digests(open_store(StoreRef.model_validate(options))) == in_a_folder
    again = finish(run(tree, tmp_path / "another machine", options, "export"))
    assert again.count("skipped") == len(in_a_folder)


def test_killed_training_resumes_from_the_bucket_on_another_machine(
    tree: dict[str, Any], tmp_path: Path, weed: str
) -> None:
    tree["run"]["sft"] |= {"max_steps": 24, "save_steps": 4, "eval_steps": 4}
    undisturbed = {
        "uri": f"s3://{store_servers.BUCKET}/undisturbed",
        "endpoint": weed,
        "addressingStyle": "path",
    }
    finish(run(tree, tmp_path / "undisturbed", undisturbed, "sft"))
    options = undisturbed | {"uri": f"s3://{store_servers.BUCKET}/killed"}
    store = open_store(StoreRef.model_validate(options))
    process = run(tree, tmp_path / "first", options, "sft")
    deadline = time.monotonic() + 240
    while not any(
        entry.key.endswith("step-00000008-1/MANIFEST.json") for entry in store.list("t/sft/")
    ):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "sft" not in digests(store)
    errors = finish(run(tree, tmp_path / "second", options, "sft"))
    assert "resuming from step" in errors
    assert digests(store) == digests(open_store(StoreRef.model_validate(undisturbed)))
