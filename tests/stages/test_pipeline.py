"""All stages of a run on a tiny model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medjob.artifacts.artifact import Attempt, Manifest
from medjob.config import RunFile
from medjob.errors import DataError, GateError, InputError
from medjob.pipeline.context import build_context
from medjob.pipeline.runner import Pipeline
from medjob.stage import STAGES, get_stage
from tests.support.rows import reasoning_rows, write_jsonl
from tests.support.small_run import fetched


def run_until(run_file: RunFile, last: str) -> tuple[Pipeline, dict[str, Manifest]]:
    pipeline = Pipeline.open(run_file)
    manifests = {}
    for stage in STAGES:
        manifests[stage.name] = pipeline.run(stage)
        if stage.name == last:
            break
    return pipeline, manifests


def digests(manifests: dict[str, Manifest]) -> dict[str, str]:
    return {name: manifest.digest for name, manifest in manifests.items()}


@pytest.mark.usefixtures("trained")
def test_published_stages_are_skipped_and_reruns_are_identical(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    changes = {"run": {"judge": {"kind": "model", "on_uncalibrated": "overlap"}}}
    run_file = make_run_file(changes)
    _, first = run_until(run_file, "judge")
    assert first["judge"].metrics["calibration"][0]["passed"] is False
    assert first["judge"].metrics["judge"] == "overlap"
    prompts = first["candidates"].metrics["prompts"]
    assert first["candidates"].metrics["candidates"] == 2 * prompts
    judged = first["judge"].metrics
    assert judged["pairs"] + sum(judged["dropped"].values()) == prompts

    _, again = run_until(run_file, "judge")
    assert {name: manifest.epoch for name, manifest in again.items()} == dict.fromkeys(again, 1)
    assert digests(again) == digests(first)

    cluster = {"store": f"file://{tmp_path}/other", "workDir": str(tmp_path / "elsewhere")}
    _, elsewhere = run_until(make_run_file(changes | {"cluster": cluster}), "judge")
    assert digests(elsewhere) == digests(first)


def with_pairs(run_file: RunFile) -> Pipeline:
    """Run all stages up to the judge, with candidates that give pairs to train on."""
    pipeline, _ = run_until(run_file, "sft")
    stage = get_stage("candidates")
    folder = empty_folder(pipeline, "candidates-made")
    prompts = pq.read_table(fetched(pipeline, "prepare") / "preferences.parquet").to_pylist()
    rows = [
        {"id": prompt["id"], "candidate": number, "text": text, "tokens": 5, "truncated": False}
        for prompt in prompts
        for number, text in enumerate((prompt["reference"], "Nothing is known about it."))
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "candidates.parquet")
    Attempt.begin(pipeline.artifact(stage), "test").publish(folder, {}, {}, {}, {})
    pipeline.run(get_stage("judge"))
    return pipeline


def artifact_folder(pipeline: Pipeline, name: str) -> Path:
    store = Path(pipeline.run_file.cluster.store.uri.removeprefix("file://"))
    return store / pipeline.artifact(get_stage(name)).prefix


def empty_folder(pipeline: Pipeline, name: str) -> Path:
    folder = Path(pipeline.run_file.cluster.work_dir) / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@pytest.mark.usefixtures("trained")
def test_dpo_evaluate_and_export_of_a_trained_run(
    make_run_file: Callable[..., RunFile],
) -> None:
    pipeline = with_pairs(make_run_file())
    dpo = pipeline.run(get_stage("dpo"))
    # The first loss is ln 2 because policy and reference are the same model. It would differ if the
    # reference were the base model.
    assert dpo.metrics["first_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert dpo.metrics["last_loss"] < 0.6931
    evaluate = pipeline.run(get_stage("evaluate"))
    table = {row["metric"]: row for row in evaluate.metrics["metrics"]}
    perplexity = table["perplexity"]["models"]
    assert set(perplexity) == {"base", "sft", "dpo"}
    assert perplexity["sft"]["value"] < perplexity["base"]["value"]
    assert table["multiple choice"]["models"]["base"]["n"] == 6
    assert table["refusal"]["models"]["base"]["n"] == 2
    assert perplexity["base"]["p_value"] is None
    assert "same judge made the pairs" in evaluate.metrics["judge_note"]
    page = (fetched(pipeline, "evaluate") / "report.html").read_text()
    assert "<svg" in page
    assert "perplexity" in page
    export = pipeline.run(get_stage("export"))
    exported = {file.path for file in export.files}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= exported


@pytest.mark.slow
def test_dpo_of_all_weights_starts_from_the_sft_model(
    make_run_file: Callable[..., RunFile],
) -> None:
    changes = {
        "method": "full",
        "dtype": "float32",
        "sft": {"max_steps": 2},
        "dpo": {"max_steps": 2},
    }
    pipeline = with_pairs(make_run_file({"run": changes}))
    dpo = pipeline.run(get_stage("dpo"))
    assert dpo.metrics["first_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert "model.safetensors" in {file.path for file in dpo.files}


@pytest.mark.usefixtures("trained")
def test_stage_killed_before_its_marker_publishes_the_same_bytes(
    make_run_file: Callable[..., RunFile],
) -> None:
    pipeline, manifests = run_until(make_run_file(), "sft")
    root = artifact_folder(pipeline, "sft")
    (root / "_SUCCESS.json").unlink()
    shutil.rmtree(root / "data")
    again = pipeline.run(get_stage("sft"))
    assert (again.epoch, again.digest) == (2, manifests["sft"].digest)


def test_published_files_contain_no_local_paths(trained_store: Path) -> None:
    work = str(trained_store.parent / "work").encode()
    for name in ("prepare", "sft"):
        files = [file for file in trained_store.glob(f"t/{name}/*/data/**/*") if file.is_file()]
        assert files
        for file in files:
            assert work not in file.read_bytes(), file


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"run": {"sft": {"learning_rate": 2e-3}}}, {"fetch": True, "prepare": True, "sft": False}),
        ({"run": {"sft": {"max_length": 500}}}, {"fetch": True, "prepare": False}),
        (
            {"run": {"dpo": {"beta": 0.5}, "description": "x"}},
            {"fetch": True, "prepare": True, "sft": True},
        ),
        (
            {"resources": {"sft": {"microBatchSize": 1}}},
            {"fetch": True, "prepare": True, "sft": True},
        ),
    ],
)
def test_keys_change_only_with_fields_that_the_stage_reads(
    make_run_file: Callable[..., RunFile], changes: dict[str, Any], expected: dict[str, bool]
) -> None:
    pipeline, _ = run_until(make_run_file(), "sft")
    other = Pipeline.open(make_run_file(changes))
    for name, same in expected.items():
        stage = get_stage(name)
        assert (other.artifact(stage).key == pipeline.artifact(stage).key) is same, name


def test_key_changes_if_a_data_file_is_edited_but_not_if_it_is_moved(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    pipeline, _ = run_until(make_run_file(), "fetch")
    before = pipeline.artifact(get_stage("prepare")).key
    data = tmp_path / "data/rows.jsonl"
    moved = tmp_path / "data/moved/rows.jsonl"
    moved.parent.mkdir()
    shutil.copy(data, moved)
    other = Pipeline.open(make_run_file({"run": {"prepare": {"sources": [{"path": str(moved)}]}}}))
    assert other.artifact(get_stage("prepare")).key == before
    moved.write_text(moved.read_text().replace("chest pain", "no pain", 1))
    assert other.artifact(get_stage("prepare")).key != before


def test_stage_sees_only_the_fields_in_its_key(make_run_file: Callable[..., RunFile]) -> None:
    from medjob.stage import select

    run = select(make_run_file().run, ("seed", "sft.max_length"))
    assert (run.seed, run.sft.max_length) == (42, 512)
    for field in (lambda: run.base_model, lambda: run.sft.learning_rate):
        with pytest.raises(AttributeError):
            field()


def test_damaged_input_is_reported_and_not_used(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    pipeline, _ = run_until(make_run_file(), "prepare")
    artifact = pipeline.artifact(get_stage("prepare"))
    victim = next((tmp_path / "store" / artifact.prefix / "data").rglob("train.parquet"))
    damaged = bytearray(victim.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    victim.unlink()
    victim.write_bytes(damaged)
    with pytest.raises(InputError, match=r"train\.parquet is damaged"):
        pipeline.run(get_stage("sft"))
    with pytest.raises(InputError, match=r"train\.parquet is damaged"):
        pipeline.run(get_stage("prepare"))


def test_writing_to_inputs_does_not_change_published_files(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    run_file = make_run_file()
    pipeline, manifests = run_until(run_file, "prepare")
    context = build_context(run_file, pipeline.snapshot(), get_stage("sft"), tmp_path / "attempt")
    inputs = [path for path in context.inputs["prepare"].rglob("*") if path.is_file()]
    assert inputs
    for path in inputs:
        with path.open("r+b") as file:
            file.write(b"XXXX")
    assert not pipeline.artifact(get_stage("prepare")).damage(manifests["prepare"])


@pytest.mark.usefixtures("trained")
def test_uncalibrated_judge_stops_the_pipeline(make_run_file: Callable[..., RunFile]) -> None:
    run_file = make_run_file({"run": {"judge": {"kind": "model"}}})
    pipeline, _ = run_until(run_file, "candidates")
    with pytest.raises(GateError, match="NOT calibrated") as caught:
        pipeline.run(get_stage("judge"))
    assert caught.value.exit_code == 67
    attempts = list((artifact_folder(pipeline, "judge") / "attempts").iterdir())
    assert json.loads(attempts[0].read_text())["exit_code"] == 67


@pytest.mark.usefixtures("trained")
def test_too_few_pairs_are_an_error(make_run_file: Callable[..., RunFile]) -> None:
    pipeline = with_pairs(make_run_file({"run": {"dpo": {"min_pairs": 1000}}}))
    with pytest.raises(DataError, match="too few to train on"):
        pipeline.run(get_stage("dpo"))


def test_missing_input_names_the_command_that_makes_it(
    make_run_file: Callable[..., RunFile],
) -> None:
    pipeline = Pipeline.open(make_run_file())
    with pytest.raises(InputError, match="is not published yet") as caught:
        pipeline.run(get_stage("sft"))
    assert "medjob prepare" in caught.value.hint


def test_unfinished_batch_is_completed_with_another_batch_size(
    make_run_file: Callable[..., RunFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    from medjob.generate.transformers_engine import TransformersEngine

    changes = {"run": {"evaluate": {"models": ["base"]}}}
    pipeline, _ = run_until(make_run_file(changes), "prepare")
    calls = []
    generate = TransformersEngine._generate

    def dies(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *args)

    monkeypatch.setattr(TransformersEngine, "_generate", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(get_stage("evaluate"))
    monkeypatch.setattr(TransformersEngine, "_generate", generate)
    again = Pipeline.open(make_run_file({**changes, "resources": {"evaluate": {"batchSize": 5}}}))
    assert again.run(get_stage("evaluate")).epoch == 2


@pytest.mark.slow
def test_chosen_answer_is_not_its_own_reference_for_the_judge(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    rows = reasoning_rows(80)[48:]
    own = [
        {"prompt": row["Question"], "chosen": "It is the heart.", "rejected": "It is the liver."}
        for row in rows
    ]
    write_jsonl(tmp_path / "data/own.jsonl", own)
    prepare = {
        "preference_sources": [{"path": str(tmp_path / "data/own.jsonl")}],
        "preference_rows": 12,
    }
    pipeline, manifests = run_until(make_run_file({"run": {"prepare": prepare}}), "judge")
    # The overlap has no other reference to compare with.
    assert manifests["judge"].metrics["agreement_with_own_preferences"] is None
    model = make_run_file(
        {"run": {"prepare": prepare, "judge": {"kind": "model", "on_uncalibrated": "overlap"}}}
    )
    assert run_until(model, "judge")[1]["judge"].metrics["judge"] == "overlap"
    table = pq.read_table(fetched(pipeline, "prepare") / "preferences.parquet").to_pylist()
    # Candidates are compared with the chosen answer.
    assert {row["reference"] for row in table} == {"It is the heart."}


def test_evaluate_compares_an_extra_model_on_the_same_rows(
    make_run_file: Callable[..., RunFile], tmp_path: Path
) -> None:
    from tests.support.tiny_model import make_tiny_model

    other = make_tiny_model(
        tmp_path / "other",
        chat_template="{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
    )
    run_file = make_run_file(
        {"run": {"evaluate": {"models": ["base"], "extra_models": [str(other)]}}}
    )
    pipeline, _ = run_until(run_file, "prepare")
    metrics = pipeline.run(get_stage("evaluate")).metrics
    perplexity = next(row for row in metrics["metrics"] if row["metric"] == "perplexity")
    assert set(perplexity["models"]) == {"base", str(other)}
