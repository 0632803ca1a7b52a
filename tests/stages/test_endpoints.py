"""Judges and compared models behind an endpoint: consent, a limit of the cost, and a resumed run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from medjob.artifacts.artifact import Attempt
from medjob.cli.main import main
from medjob.config.load import validate
from medjob.errors import ConfigError, GateError
from medjob.pipeline.runner import Pipeline
from medjob.stage import get_stage, stages_of
from tests.support.faulty_endpoint import KEY, Fault, FaultyEndpoint
from tests.support.rows import write_jsonl
from tests.support.small_run import fetched

pytestmark = pytest.mark.usefixtures("trained")
RIGHT, WRONG = "It is rightly so", "It is wrongly so"


def judged(question: str, choices: list[str]) -> dict[str, float]:
    """Prefers answers that say RIGHT. Others get a digit that depends on the text."""
    if choices == ["A", "B"]:
        first = RIGHT in question.partition("<answer B")[0]
        return {"A": 0.9, "B": 0.1} if first else {"A": 0.1, "B": 0.9}
    digit = crc32(question.encode()) % 5
    if RIGHT in question or WRONG in question:
        digit = 4 if RIGHT in question else 0
    return {choice: 0.8 if n == digit else 0.05 for n, choice in enumerate(choices)}


@pytest.fixture
def server() -> Iterator[FaultyEndpoint]:
    with FaultyEndpoint(choose=judged) as endpoint:
        yield endpoint


@pytest.fixture
def hosted(tree: dict[str, Any], server: FaultyEndpoint, tmp_path: Path) -> dict[str, Any]:
    """The small run with a judge behind an endpoint, which is good enough to be calibrated."""
    graded = [
        {
            "question": f"Is {n} so?",
            "reference": f"So is {n}.",
            "better": f"{RIGHT}, {n}",
            "worse": f"{WRONG}, {n}",
        }
        for n in range(24)
    ]
    path = write_jsonl(tmp_path / "data/graded.jsonl", graded)
    tree["run"]["judge"] = {
        "model": f"endpoint:hosted/{server.model}",
        "calibration": {"path": str(path)},
        "min_margin": 0.0,
        "allow_hosted": True,
    }
    tree["cluster"]["endpoints"] = {
        "hosted": {
            "url": server.url,
            "pricePerMillionInputTokens": 1000,
            "pricePerMillionOutputTokens": 1000,
            "maxConcurrentRequests": 4,
        }
    }
    return tree


def with_candidates(tree: dict[str, Any]) -> Pipeline:
    """Publish two answers to each preference prompt, without sampling them."""
    pipeline = Pipeline.open(validate(tree))
    for stage in stages_of(pipeline.run_file.run, "sft"):
        pipeline.run(stage)
    folder = Path(tree["cluster"]["workDir"]) / "candidates-made"
    folder.mkdir()
    prompts = pq.read_table(fetched(pipeline, "prepare") / "preferences.parquet").to_pylist()
    rows = [
        {"id": prompt["id"], "candidate": number, "text": text, "tokens": 5, "truncated": False}
        for prompt in prompts
        for number, text in enumerate(("Rest.", "Nothing is known about it."))
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "candidates.parquet")
    artifact = pipeline.artifact(get_stage("candidates"))
    Attempt.begin(artifact, "test").publish(folder, {}, {}, {}, {})
    return pipeline


def limited(tree: dict[str, Any], cost: float) -> Pipeline:
    """The pipeline with another limit, which changes no key."""
    changed = json.loads(json.dumps(tree))
    changed["cluster"]["endpoints"]["hosted"]["maxCost"] = cost
    return Pipeline.open(validate(changed))


def test_a_stage_that_the_limit_has_stopped_continues_with_a_higher_one(
    hosted: dict[str, Any], server: FaultyEndpoint
) -> None:
    with_candidates(hosted)
    assert server.requests == []
    judge = get_stage("judge")
    with pytest.raises(GateError, match=r"of at most 12 USD are spent \(\d+ requests") as caught:
        limited(hosted, 12).run(judge)
    assert caught.value.exit_code == 67
    asked = len(server.requests)
    assert asked > 20
    # The server counts words, and each costs 0.001.
    words = sum(len(each.question.split()) + 1 for each in server.requests)
    assert 9 < 0.001 * words <= 12
    with pytest.raises(GateError, match="prompts of this step are left"):
        limited(hosted, 12).run(judge)
    assert len(server.requests) == asked  # the spending of the first attempt counts

    server.faults = [
        Fault("status", times=2, status=429, headers={"Retry-After": "0"}),
        Fault("cut", times=2, after=40),
    ]
    pipeline = limited(hosted, 1000)
    metrics = pipeline.run(judge).metrics
    assert [fault.hits for fault in server.faults] == [2, 2]
    assert set(server.answered.values()) == {1}
    assert metrics["calibration"][0]["passed"]
    assert metrics["calibration"][0]["order_flip_rate"] == 0
    assert metrics["judge"] == "endpoint:hosted/judge-1"
    assert metrics["pairs"] > 0
    spent = metrics["endpoints"]["hosted"]
    assert spent["requests"] == spent["logprobs"] == sum(server.answered.values())
    assert spent["cost"] > 12

    progress = Path(hosted["cluster"]["store"].removeprefix("file://"))
    event = json.loads(next(progress.glob("t/judge/*/progress.json")).read_text())
    assert event["endpoint_requests"] == spent["requests"]
    assert event["endpoint_cost"] == pytest.approx(spent["cost"])

    scores = pq.read_table(fetched(pipeline, "judge") / "scores.parquet").to_pylist()
    assert len({row["score"] for row in scores}) > 5
    questions = {each.question for each in server.requests}
    pipeline.run(judge)
    assert {each.question for each in server.requests} == questions


def test_the_model_is_in_the_key_and_its_server_is_not(
    hosted: dict[str, Any], server: FaultyEndpoint
) -> None:
    with_candidates(hosted)

    def key(**changes: Any) -> str:
        changed = json.loads(json.dumps(hosted))
        changed["run"]["judge"] |= changes.get("judge", {})
        changed["cluster"]["endpoints"] = {
            "elsewhere": {"url": "https://other.example.org/v1"},
            "hosted": {**changed["cluster"]["endpoints"]["hosted"], **changes.get("endpoint", {})},
        }
        return Pipeline.open(validate(changed)).artifact(get_stage("judge")).key

    first = key()
    assert key(endpoint={"url": "https://host.example.org/v1", "maxCost": 1}) == first
    assert key(judge={"model": f"endpoint:elsewhere/{server.model}"}) == first
    assert key(judge={"allow_hosted": False}) == first
    assert key(judge={"model": "endpoint:hosted/judge-2"}) != first


def test_a_model_of_an_endpoint_is_compared(
    hosted: dict[str, Any], server: FaultyEndpoint, tmp_path: Path
) -> None:
    server.answer = lambda question, number: f"Option A, and {RIGHT}"
    hosted["run"]["stages"] = ["prepare", "sft", "evaluate"]
    hosted["run"]["evaluate"] |= {
        "models": ["base"],
        "extra_models": ["endpoint:hosted/judge-1"],
        "allow_hosted": True,
    }
    pipeline = Pipeline.open(validate(hosted))
    pipeline.run(get_stage("fetch"))
    metrics = pipeline.run(get_stage("evaluate")).metrics
    table = {row["metric"]: row["models"] for row in metrics["metrics"]}
    name = "endpoint:hosted/judge-1"
    assert set(table["multiple choice"]) == {"base", name}
    # It scores no given answers and no letters.
    assert name not in table["perplexity"]
    assert name not in table["likeliest letter"]
    assert set(server.answered.values()) == {1}
    assert metrics["endpoints"]["hosted"]["requests"] == len(server.requests)


def medjob(tree: dict[str, Any], folder: Path, *arguments: str) -> int:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "-f", str(file)])
    return int(str(ended.value.code))


@pytest.mark.parametrize("command", [["run"], ["judge"], ["run", "--until", "judge"]])
def test_nothing_is_sent_without_consent(
    hosted: dict[str, Any],
    server: FaultyEndpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    hosted["run"]["judge"]["allow_hosted"] = False
    if command == ["judge"]:
        with_candidates(hosted)
    assert medjob(hosted, tmp_path, *command) == 64
    error = capsys.readouterr().err
    host = server.url.removeprefix("http://").removesuffix("/v1")
    assert f"judge sends up to 32 answers with questions and references to {host}" in error
    assert "(run.judge.model: endpoint:hosted/judge-1): 96 requests, about" in error
    assert "USD" in error
    assert "pass --yes" in error
    assert "set run.judge.allow_hosted=true" in error
    assert server.requests == []
    assert not list((tmp_path / "store/t").glob("judge/*/attempts/*"))
    # `run` stops before it computes anything.
    assert (tmp_path / "store/t/candidates").exists() == (command == ["judge"])


def test_consent_on_the_command_line_is_enough(
    hosted: dict[str, Any], server: FaultyEndpoint, tmp_path: Path
) -> None:
    hosted["run"]["judge"]["allow_hosted"] = False
    with_candidates(hosted)
    assert medjob(hosted, tmp_path, "judge", "--yes") == 0
    assert len(server.requests) > 96


@pytest.mark.slow
def test_shards_ask_each_question_once(
    hosted: dict[str, Any], server: FaultyEndpoint, tmp_path: Path
) -> None:
    hosted["run"]["judge"]["allow_hosted"] = False  # the shards get the consent of `--yes`
    with_candidates(hosted)
    hosted["resources"]["judge"]["shards"] = 2
    assert medjob(hosted, tmp_path, "judge", "--yes") == 0
    assert set(server.answered.values()) == {1}
    manifest = Pipeline.open(validate(hosted)).artifact(get_stage("judge")).manifest()
    assert manifest is not None
    assert manifest.metrics["endpoints"]["hosted"]["requests"] == len(server.requests)


def test_dry_run_and_plan_say_what_would_be_sent(
    hosted: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosted["cluster"]["endpoints"]["hosted"]["maxCost"] = 3
    assert medjob(hosted, tmp_path, "run", "--dry-run") == 0
    assert medjob(hosted, tmp_path, "plan") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "judge sends" in line]
    assert len(lines) == 2
    assert all(
        "at most 3 USD (hosted.maxCost); allowed by run.judge.allow_hosted" in line
        for line in lines
    )


def test_a_missing_key_is_named_with_its_file(
    hosted: dict[str, Any],
    server: FaultyEndpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hosted["cluster"]["endpoints"]["hosted"]["apiKeyVariable"] = "JUDGE_API_KEY"
    with_candidates(hosted)
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    monkeypatch.setenv("MEDJOB_SECRETS", str(secrets))
    assert medjob(hosted, tmp_path, "judge") == 64
    error = capsys.readouterr().err
    assert "cluster.endpoints.hosted.apiKeyVariable: JUDGE_API_KEY is not set" in error
    assert "judge-api-key" in error
    server.key = KEY
    (secrets / "judge-api-key").write_text(f"{KEY}\n")
    assert medjob(hosted, tmp_path, "judge") == 0
    written = b"".join(
        file.read_bytes()
        for file in tmp_path.rglob("*")
        if file.is_file() and secrets not in file.parents
    )
    output = capsys.readouterr()
    assert KEY not in output.out + output.err
    assert KEY.encode() not in written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"base_model": "endpoint:hosted/x"}}, "base_model: endpoint:hosted/x is an endpoint"),
        ({"run": {"judge": {"model": "endpoint:other/x"}}}, r"run\.judge\.model: other is not in cluster\.endpoints \(hosted\)"),
        ({"run": {"judge": {"model": "endpoint:hosted"}}}, r"must be endpoint:NAME/MODEL"),
        ({"run": {"judge": {"model": "endpoint:hosted/x", "load_in_4bit": True}}}, "load_in_4bit: endpoint:hosted/x"),
        ({"run": {"prepare": {"sensitive": True}}}, r"run\.judge\.model: endpoint:hosted/judge-1 sends rows to http.*run\.prepare\.sensitive is true"),
        ({"resources": {"judge": {"engine": "vllm"}}}, r"resources\.judge\.engine: endpoint:hosted/judge-1 is an endpoint"),
        ({"resources": {"evaluate": {"engine": "openai"}}}, r"resources\.evaluate\.engine"),
        ({"run": {"judge": {"model": None}}, "resources": {"judge": {"engine": "openai"}}}, r"openai needs an endpoint"),
        ({"cluster": {"endpoints": {"hosted": {"url": "ftp://host/v1"}}}}, r"cluster\.endpoints\.hosted\.url"),
        ({"cluster": {"endpoints": {"hosted": {"apiKeyVariable": "AWS_SECRET_ACCESS_KEY"}}}}, r"cluster\.endpoints\.hosted\.apiKeyVariable"),
        ({"cluster": {"endpoints": {"hosted": {"url": "http://h/v1", "pricePerMillionInputTokens": None, "maxCost": 1}}}}, "need both"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_runs(
    hosted: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    from medjob.config.load import merge

    with pytest.raises(ConfigError, match=message):
        validate(merge(hosted, changes))


def test_an_url_with_a_password_is_refused_without_repeating_it(hosted: dict[str, Any]) -> None:
    hosted["cluster"]["endpoints"]["hosted"]["url"] = "https://me:hunter2@host/v1"
    with pytest.raises(ConfigError, match="must not contain credentials") as caught:
        validate(hosted)
    assert "hunter2" not in str(caught.value)
