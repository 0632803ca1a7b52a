"""Models and data in buckets: `fetch` copies them, and later stages read the copies."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.artifacts.artifact import Manifest
from medjob.cli.main import main
from medjob.config.load import validate
from medjob.config.store import StoreRef
from medjob.errors import InputError
from medjob.pipeline.runner import Pipeline
from medjob.sources.buckets import store_ref_for
from medjob.sources.copies import copies_in, copy_name, place_copy
from medjob.stage import get_stage
from tests.fakes.s3 import FakeS3
from tests.fakes.server import FakeServer, Fault
from tests.stages.conftest import Bucket, put
from tests.support.rows import write_jsonl


def run(tree: dict[str, Any], *stages: str) -> tuple[Pipeline, dict[str, Manifest]]:
    pipeline = Pipeline.open(validate(tree))
    return pipeline, {name: pipeline.run(get_stage(name)) for name in stages}


def reads(server: FakeServer, part: str) -> list[str]:
    """Keys that contain `part` and were downloaded."""
    return [
        request.key
        for request in list(server.requests)
        if request.operation == "GetObject" and part in request.key
    ]


def test_run_over_a_bucket_equals_one_over_local_files(
    tree: dict[str, Any], remote: dict[str, Any], bucket: Bucket
) -> None:
    here, local = run(tree, "fetch", "prepare")
    there, mirrored = run(remote, "fetch", "prepare")
    assert mirrored["prepare"].key == local["prepare"].key
    assert mirrored["prepare"].digest == local["prepare"].digest
    assert there.artifact(get_stage("sft")).key == here.artifact(get_stage("sft")).key
    # The safety rows and the judge's calibration rows are local.
    assert mirrored["fetch"].metrics == {"local": 2, "hub": 0, "buckets": 3}
    assert not any(file.path.endswith("README.md") for file in mirrored["fetch"].files)


def delete_originals(server: FakeServer) -> None:
    objects = server.buckets["bucket"]
    for key in [key for key in objects if key.startswith(("models/", "rows/", "choices/"))]:
        del objects[key]


def test_stages_read_copies_and_download_them_once(remote: dict[str, Any], bucket: Bucket) -> None:
    server, _ = bucket
    run(remote, "fetch")
    delete_originals(server)
    server.requests.clear()
    pipeline, _ = run(remote, "prepare")
    assert reads(server, "mirror/")
    assert not reads(server, "safetensors")  # prepare needs only the tokenizer
    place_copies(pipeline)
    assert reads(server, "safetensors")
    server.requests.clear()
    place_copies(Pipeline.open(pipeline.run_file))
    assert not reads(server, "mirror/")  # the copy is on this disk


def test_damaged_local_copy_is_downloaded_again(
    remote: dict[str, Any], bucket: Bucket, tmp_path: Path
) -> None:
    pipeline, _ = run(remote, "fetch", "prepare")
    place_copies(pipeline)
    (weights,) = (tmp_path / "work-remote/models/mirror").rglob("model.safetensors")
    good = weights.read_bytes()
    weights.write_bytes(good[:100] + b"x" + good[101:])
    place_copies(pipeline)
    assert weights.read_bytes() == good
    bucket[0].requests.clear()
    place_copies(pipeline)
    assert not reads(bucket[0], "mirror/")


def test_file_that_was_added_to_a_copy_is_refused(remote: dict[str, Any], tmp_path: Path) -> None:
    pipeline, _ = run(remote, "fetch", "prepare")
    place_copies(pipeline)
    (weights,) = (tmp_path / "work-remote/models/mirror").rglob("model.safetensors")
    (weights.parent / "chat_template.jinja").unlink(missing_ok=True)  # is downloaded again
    place_copies(pipeline)
    (weights.parent / "added_tokens.json").write_text("{}")
    with pytest.raises(InputError, match="1 files do not belong to this copy"):
        place_copies(pipeline)


def test_file_that_was_replaced_by_a_link_is_refused(
    remote: dict[str, Any], tmp_path: Path
) -> None:
    pipeline, _ = run(remote, "fetch", "prepare")
    place_copies(pipeline)
    (weights,) = (tmp_path / "work-remote/models/mirror").rglob("model.safetensors")
    weights.symlink_to(weights.rename(tmp_path / "outside"))
    with pytest.raises(InputError, match="1 files do not belong to this copy"):
        place_copies(pipeline)


def test_file_that_was_added_to_an_unfinished_download_is_refused(
    remote: dict[str, Any], tmp_path: Path
) -> None:
    pipeline, _ = run(remote, "fetch", "prepare")
    model = pipeline.run_file.run.base_model
    name = copy_name(model, pipeline.known_pins()[model.key])
    folder = tmp_path / "work-remote/models" / name
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir()
    (partial / "added_tokens.json").write_text("{}")
    with pytest.raises(InputError, match=r"partial: 1 files do not belong to this copy"):
        place_copies(pipeline)
    shutil.rmtree(partial)
    place_copies(pipeline)
    assert (folder / "model.safetensors").is_file()


def place_copies(pipeline: Pipeline) -> None:
    snapshot = pipeline.snapshot()
    pins = snapshot.pins(get_stage("sft"))
    artifact, manifest, name = snapshot.copy_of(pipeline.run_file.run.base_model, pins)
    cache = Path(pipeline.run_file.cluster.work_dir) / "models"
    place_copy(artifact, manifest, name, cache)


def test_concurrent_processes_download_a_copy_once(remote: dict[str, Any], bucket: Bucket) -> None:
    pipeline, _ = run(remote, "fetch")
    bucket[0].requests.clear()
    # The lock belongs to an open file, so threads wait as processes do.
    threads = [threading.Thread(target=place_copies, args=(pipeline,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads(bucket[0], "/mirror/")) == len(set(reads(bucket[0], "/mirror/"))) > 3


def test_interrupted_download_is_resumed_and_is_not_a_copy(
    remote: dict[str, Any], bucket: Bucket, tmp_path: Path
) -> None:
    pipeline, _ = run(remote, "fetch")
    bucket[0].faults.append(
        Fault("status", "GetObject", key="tokenizer.json", times=None, status=403)
    )
    with pytest.raises(Exception, match="denied"):
        place_copies(pipeline)
    model = pipeline.run_file.run.base_model
    name = copy_name(model, pipeline.known_pins()[model.key])
    folder = tmp_path / "work-remote/models" / name
    assert not folder.exists()
    bucket[0].faults.clear()
    bucket[0].requests.clear()
    place_copies(pipeline)
    assert (folder / "tokenizer.json").is_file()


def test_changed_object_does_not_change_a_fetched_run(
    remote: dict[str, Any], bucket: Bucket, tiny: Path, tmp_path: Path
) -> None:
    pipeline, _ = run(remote, "fetch")
    key = pipeline.artifact(get_stage("prepare")).key
    rows = [{"Question": "q", "Complex_CoT": "c", "Response": "r"}]
    put(bucket, "rows/rows.jsonl", write_jsonl(tmp_path / "other.jsonl", rows))
    model = shutil.copytree(tiny, tmp_path / "other")
    (model / "README.md").write_text("another model")
    other = put(bucket, "models/other", model)
    more = json.loads(json.dumps(remote))
    more["run"]["evaluate"]["extra_models"] = [other]
    bucket[0].requests.clear()
    again, made = run(more, "fetch")
    assert again.artifact(get_stage("prepare")).key == key
    pin = again.snapshot().pins(get_stage("fetch"))[other]
    name = copy_name(again.run_file.run.evaluate.extra_models[0], pin)
    assert copies_in(made["fetch"]) == {name}  # the first fetch has the other copies
    assert not reads(bucket[0], "rows/rows.jsonl")
    run(more, "prepare")  # reads them from the first fetch
    fresh = remote | {"run": remote["run"] | {"name": "fresh"}}
    assert run(fresh, "fetch")[0].artifact(get_stage("prepare")).key != key


def test_deleted_copy_is_reported(remote: dict[str, Any], bucket: Bucket) -> None:
    pipeline, made = run(remote, "fetch")
    snapshot = pipeline.snapshot()
    model = pipeline.run_file.run.base_model
    with pytest.raises(InputError, match="the store has no copy of it") as caught:
        snapshot.copy_of(model, {model.id: "sha256:another"})
    assert pipeline.artifact(get_stage("fetch")).prefix in caught.value.hint
    key = next(file.path for file in made["fetch"].files if file.path.endswith("tokenizer.json"))
    pipeline.store.delete(pipeline.artifact(get_stage("fetch")).path("data", "1", key))
    with pytest.raises(InputError, match=r"tokenizer\.json does not exist"):
        run(remote, "prepare")


def test_bytes_that_differ_from_the_checksum_are_not_pinned(
    remote: dict[str, Any], bucket: Bucket
) -> None:
    server, _ = bucket
    server.faults.append(Fault("flip", "GetObject", key="rows/rows.jsonl", times=1))
    _, first = run(remote, "fetch")  # bytes damaged in transfer are downloaded again
    assert server.faults[0].hits == 1
    again = remote | {"run": remote["run"] | {"name": "again"}}
    assert run(again, "fetch")[1]["fetch"].digest == first["fetch"].digest
    server.corrupt("rows/rows.jsonl", 20)
    with pytest.raises(
        InputError,
        match=r"run\.prepare\.sources\.0: .*rows\.jsonl does not match its checksum in the bucket",
    ):
        run(remote | {"run": remote["run"] | {"name": "third"}}, "fetch")


def test_object_replaced_during_its_copy_can_be_retried(
    remote: dict[str, Any], bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medjob.errors import RetryError
    from medjob.store.transfer import Transfer

    original = Transfer.ranges

    def ranges(self: Transfer, key: str, start: int, end: int) -> Any:
        yield from original(self, key, start, end)
        if key == "rows.jsonl":
            put(bucket, "rows/rows.jsonl", tmp_path / "data/choices.jsonl")

    monkeypatch.setattr(Transfer, "ranges", ranges)
    with pytest.raises(RetryError, match=r"rows\.jsonl was replaced while it was copied"):
        run(remote, "fetch")


def test_unreachable_bucket_can_be_retried(
    remote: dict[str, Any], tree: dict[str, Any], bucket: Bucket, monkeypatch: Any
) -> None:
    from medjob.errors import RetryError

    store = bucket[1] | {"retrySeconds": 0.2}
    bucket[0].faults.append(Fault("status", key="", times=None, status=503))
    tree["run"]["base_model"] = remote["run"]["base_model"]
    pipeline = Pipeline.open(validate(tree))
    monkeypatch.setattr(
        "medjob.sources.buckets.store_ref_for",
        lambda uri, run_store: StoreRef.model_validate(store | {"uri": uri}),
    )
    with pytest.raises(RetryError, match=r"run\.base_model: .*models/tiny: .*503"):
        pipeline.run(get_stage("fetch"))


def test_plan_and_dry_run_do_not_download_weights(
    remote: dict[str, Any], bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, _ = bucket
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(remote))

    def call(*arguments: str) -> str:
        server.requests.clear()
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "-f", str(tmp_path / "job.yaml")])
        assert not ended.value.code
        assert not reads(server, "safetensors")
        return capsys.readouterr().out

    assert "llama, 83.18k parameters" in call("plan")
    assert reads(server, "models/tiny/config.json")
    assert "run, after fetch" in call("run", "--dry-run")
    run(remote, "fetch", "prepare")
    server.buckets["bucket"].pop("models/tiny/config.json")
    assert "llama, 83.18k parameters" in call("plan")  # read from the copy
    assert "skip: published" in call("run", "--dry-run")


def test_model_in_a_bucket_with_artifacts_in_a_directory(
    tree: dict[str, Any], fake_s3: FakeS3, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = {"uri": "s3://bucket/x", "endpoint": fake_s3.endpoint, "addressingStyle": "path"}
    local, _ = run(tree, "fetch")
    tree["run"]["base_model"] = put((fake_s3, store), "tiny", tiny) + "/"
    monkeypatch.setenv("AWS_ENDPOINT_URL", fake_s3.endpoint)
    _, made = run(tree, "fetch", "prepare")
    assert made["prepare"].key == local.artifact(get_stage("prepare")).key


def test_options_of_the_store_apply_to_buckets_of_its_kind() -> None:
    run_store = StoreRef(
        uri="s3://runs/b",
        endpoint="http://e",
        region="r",
        addressing_style="path",
        anonymous=True,
        retry_seconds=7,
        kms_key="k",
    )
    same_kind = store_ref_for("s3://other/x", run_store)
    assert same_kind == StoreRef(
        uri="s3://other/x",
        endpoint="http://e",
        region="r",
        addressing_style="path",
        anonymous=True,
        retry_seconds=7,
    )
    other_kind = store_ref_for("gs://other/x", run_store)
    assert other_kind == StoreRef(uri="gs://other/x", retry_seconds=7)


def test_region_applies_only_to_the_bucket_of_the_store() -> None:
    amazon = StoreRef(uri="s3://runs/b", region="eu-west-1", requester_pays=True)
    assert store_ref_for("s3://runs/models", amazon).region == "eu-west-1"
    other = store_ref_for("s3://public/x", amazon)
    assert other.region is None
    assert other.requester_pays


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_training_over_a_bucket_equals_a_local_one(
    tree: dict[str, Any], remote: dict[str, Any], bucket: Bucket, tmp_path: Path
) -> None:
    for each in (tree, remote):
        each["run"]["method"] = "full"  # an adapter contains the name of its base
    stages = ("fetch", "prepare", "sft", "candidates")
    _, local = run(tree, *stages)
    run(remote, "fetch")
    delete_originals(bucket[0])
    pipeline, mirrored = run(remote, *stages)
    for name in stages[1:]:
        assert mirrored[name].key == local[name].key, name
        assert mirrored[name].digest == local[name].digest, name
    config = pipeline.artifact(get_stage("sft")).read(mirrored["sft"], "config.json")
    assert str(tmp_path).encode() not in config
