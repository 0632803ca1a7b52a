"""The openai engine against a server with faults: no prompt is lost, and none is answered twice."""

import datetime
import email.utils
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.artifacts.finished_rows import FinishedRows
from medjob.artifacts.progress import Progress
from medjob.artifacts.shard import WHOLE, Shard
from medjob.config.endpoints import Endpoint
from medjob.config.store import StoreRef
from medjob.data.render import Conversation
from medjob.errors import ConfigError, GateError, InputError, RetryError
from medjob.generate.endpoint_requests import Requests
from medjob.generate.endpoint_spending import Spending
from medjob.generate.openai_engine import OpenAIEngine
from medjob.generate.protocol import Generated, Prompt, Sampling
from medjob.store import open_store
from tests.support.faulty_endpoint import KEY, Fault, FaultyEndpoint

DIGITS = list("12345")
GRADE = "How accurate is answer {}? Reply with one digit from 1 to 5."
SAMPLING = Sampling(64, temperature=0.7)


@pytest.fixture
def server() -> Iterator[FaultyEndpoint]:
    with FaultyEndpoint() as endpoint:
        yield endpoint


@pytest.fixture
def finished(tmp_path: Path) -> FinishedRows:
    store = open_store(StoreRef(uri=f"file://{tmp_path}/store"))
    return FinishedRows(Attempt.begin(Artifact(store, "run", "judge", "0" * 64), "test"))


def engine_of(
    server: FaultyEndpoint,
    finished: FinishedRows,
    secret: str | None = None,
    shard: Shard = WHOLE,
    **options: Any,
) -> OpenAIEngine:
    endpoint = Endpoint(url=server.url, **{"retry_seconds": 20, **options})
    requests = Requests("hosted", endpoint, "run.judge.model", server.model, secret)
    spending = Spending("hosted", endpoint, "USD", finished, Progress("judge"), shard)
    return OpenAIEngine(requests, spending, endpoint, 42)


def prompts(count: int, text: str = "question {}") -> list[Prompt]:
    return [Prompt(str(n), (), Conversation(text.format(n))) for n in range(count)]


def answers(
    engine: OpenAIEngine, asked: list[Prompt], sampling: Sampling = SAMPLING
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for prompt_id, drawn in engine.generate(engine.batches(asked), sampling):
        assert prompt_id not in found
        found[prompt_id] = [answer.text for answer in drawn]
    return found


def choices(engine: OpenAIEngine, asked: list[Prompt]) -> dict[str, list[float]]:
    return dict(engine.choice_probabilities(engine.batches(asked), "Score:", DIGITS))


def expected(count: int) -> dict[str, list[str]]:
    return {str(n): [f"answer 0 to question {n}"] for n in range(count)}


def test_answers_come_with_the_conversation_and_a_seed_of_the_prompt(
    server: FaultyEndpoint, finished: FinishedRows
) -> None:
    conversation = Conversation("And at night?", "Be brief.", [("Does it help?", "Yes.")])
    engine = engine_of(server, finished)
    answers(engine, [Prompt("a", (), conversation), *prompts(2)])
    answers(engine_of(server, finished), prompts(2))
    first = next(each.body for each in server.requests if len(each.body["messages"]) > 1)
    assert first["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Does it help?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And at night?"},
    ]
    assert (first["temperature"], first["top_p"], first["max_tokens"]) == (0.7, 1.0, 64)
    seeds = {each.question: each.body["seed"] for each in server.requests[:3]}
    assert len(set(seeds.values())) == 3
    assert engine_of(server, finished).figures()["requests"] == 5  # of both engines
    assert {
        each.question: each.body["seed"] for each in server.requests[3:]
    }.items() <= seeds.items()


def test_requests_run_side_by_side_within_their_limit(
    server: FaultyEndpoint, finished: FinishedRows
) -> None:
    server.faults = [Fault("slow", times=12, seconds=0.05)]
    engine = engine_of(server, finished, max_concurrent_requests=3)
    assert answers(engine, prompts(12)) == expected(12)
    assert server.most_at_once == 3


@pytest.mark.parametrize("honours_n", [True, False])
def test_an_endpoint_that_ignores_n_is_asked_n_times(
    server: FaultyEndpoint, finished: FinishedRows, honours_n: bool
) -> None:
    server.honours_n = honours_n
    sampling = Sampling(64, temperature=0.7, num_return_sequences=3)
    found = answers(engine_of(server, finished, max_concurrent_requests=1), prompts(2), sampling)
    assert [len(drawn) for drawn in found.values()] == [3, 3]
    assert len(server.requests) == (2 if honours_n else 6)
    seeds = [each.body["seed"] for each in server.requests]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", times=2, status=500),
        Fault("status", times=2, status=503, headers={"Retry-After": "0"}),
        Fault("status", times=2, status=429),
        Fault("cut", times=2),
        Fault("slow", seconds=3),
        Fault("body", times=2, body="<html>Sign in</html>", content_type="text/html"),
        Fault("body", times=2, body='{"choices": [{"mess'),
        Fault("body", times=2, body='{"choices": []}'),
        Fault("body", times=2, body='{"choices": [{"message": {"content": 5}}]}'),
        Fault("body", times=2, body="[]"),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}-{fault.body[:20]}",
)
def test_faults_that_pass_are_retried_and_cost_no_answer(
    server: FaultyEndpoint, finished: FinishedRows, fault: Fault
) -> None:
    server.faults = [Fault(**{**vars(fault), "after": 1})]
    engine = engine_of(server, finished, timeout_seconds=1)
    assert answers(engine, prompts(4)) == expected(4)
    assert server.faults[0].hits == fault.times
    assert len(server.requests) == 4 + fault.times
    assert fault.kind == "slow" or set(server.answered.values()) == {1}


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_holds_back_all_requests(
    server: FaultyEndpoint, finished: FinishedRows, as_date: bool
) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)
    value = email.utils.format_datetime(soon, usegmt=True) if as_date else "1"
    server.faults = [
        Fault("status", status=429, headers={"Retry-After": value}, text="question 2"),
        Fault("slow", text="question 1", seconds=0.5),
    ]
    # 1 is answered while 2 has to wait, and then 3 must wait as well.
    engine = engine_of(server, finished, max_concurrent_requests=2)
    assert answers(engine, prompts(4)) == expected(4)
    assert [fault.hits for fault in server.faults] == [1, 1]
    assert server.paused_until
    assert server.too_early == 0


def test_a_wait_beyond_the_limit_ends_the_stage_and_keeps_what_is_answered(
    server: FaultyEndpoint, finished: FinishedRows
) -> None:
    server.faults = [Fault("status", status=429, after=2, headers={"Retry-After": "3600"})]
    engine = engine_of(server, finished, max_concurrent_requests=1)
    found: dict[str, list[Generated]] = {}
    with pytest.raises(RetryError, match=r"HTTP 429, and it asks to wait 3,600 s") as caught:
        found.update(
            engine.generate(engine.batches(prompts(5)), SAMPLING)
        )  # one by one, as they arrive
    assert server.faults[0].hits == 1
    assert set(found) == {"0", "1"}
    assert "finished rows are kept" in caught.value.hint
    left = [prompt for prompt in prompts(5) if prompt.id not in found]
    assert set(answers(engine_of(server, finished), left)) == {"2", "3", "4"}
    assert server.answered == {f"question {n}": 1 for n in range(5)}


def test_an_endpoint_that_keeps_failing_ends_the_stage_after_its_other_answers(
    server: FaultyEndpoint, finished: FinishedRows
) -> None:
    server.faults = [Fault("status", times=100, text="question 1")]
    engine = engine_of(server, finished, retry_seconds=0.5)
    found: dict[str, list[Generated]] = {}
    with pytest.raises(RetryError, match=r"endpoint hosted \(127\.0\.0\.1:\d+\): HTTP 500"):
        found.update(
            engine.generate(engine.batches(prompts(4)), SAMPLING)
        )  # one by one, as they arrive
    assert server.faults[0].hits > 1
    assert sorted(found) == ["0", "2", "3"]


def test_a_server_that_is_not_there_is_a_temporary_failure(finished: FinishedRows) -> None:
    with FaultyEndpoint() as gone:
        engine = engine_of(gone, finished, retry_seconds=0.2)
    with pytest.raises(RetryError, match=r"no answer \(ConnectError"):
        answers(engine, prompts(1))


@pytest.mark.parametrize(
    ("changes", "secret", "message", "hint"),
    [
        ({"key": KEY}, None, "an API key is required, and none was sent", "apiKeyVariable"),
        ({"key": "other"}, KEY, "the API key in JUDGE_API_KEY is refused", "apiKeyVariable"),
        ({"faults": [Fault("status", 9, status=403)]}, KEY, "HTTP 403", "apiKeyVariable"),
        ({"faults": [Fault("status", 9, status=404)]}, None, "has no model 'judge-1'", "url"),
        ({"refuses": ("messages",)}, None, "refuses the request .*HTTP 400", "documentation"),
    ],
)
def test_what_no_retry_can_repair_ends_the_stage_at_once(
    server: FaultyEndpoint,
    finished: FinishedRows,
    changes: dict[str, Any],
    secret: str | None,
    message: str,
    hint: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    vars(server).update(changes)
    options = {"api_key_variable": "JUDGE_API_KEY"} if secret else {}
    engine = engine_of(server, finished, secret, max_concurrent_requests=1, **options)
    with caplog.at_level(logging.DEBUG), pytest.raises(ConfigError, match=message) as caught:
        answers(engine, prompts(3))
    assert hint in caught.value.hint
    assert len(server.requests) == 1
    assert KEY not in str(caught.value) + caplog.text
    assert caught.value.__cause__ is None


def test_an_account_without_credit_is_not_retried(
    server: FaultyEndpoint, finished: FinishedRows
) -> None:
    server.faults = [Fault("status", 9, status=402)]
    with pytest.raises(InputError, match="no credit"):
        answers(engine_of(server, finished), prompts(1))
    assert len(server.requests) == 1


def test_rows_do_not_follow_a_redirect(server: FaultyEndpoint, finished: FinishedRows) -> None:
    with FaultyEndpoint() as elsewhere:
        location = {"Location": f"{elsewhere.url}/chat/completions"}
        server.faults = [Fault("status", status=307, headers=location)]
        with pytest.raises(ConfigError, match="redirects are not followed"):
            answers(engine_of(server, finished), prompts(1))
        assert elsewhere.requests == []


def test_only_the_named_key_is_sent(
    server: FaultyEndpoint, finished: FinishedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "of-another-service")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    answers(engine_of(server, finished), prompts(1))
    headers = server.requests[0].headers
    assert "authorization" not in headers
    assert "of-another-service" not in str(headers)


def test_a_message_of_the_server_that_quotes_the_prompt_is_not_shown(
    server: FaultyEndpoint, finished: FinishedRows
) -> None:
    text = "the patient Jane Doe of Springfield has a rash"
    refusal = (400, {"message": f"bad input: {text}"})
    server.refusal = lambda request, path: refusal  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="HTTP 400") as caught:
        answers(engine_of(server, finished), [Prompt("a", (), Conversation(f"Say why {text}"))])
    assert "Jane" not in str(caught.value)


@pytest.mark.parametrize(
    ("reason", "truncated"), [("length", True), ("content_filter", True), ("stop", False)]
)
def test_cut_answers_are_marked(
    server: FaultyEndpoint, finished: FinishedRows, reason: str, truncated: bool
) -> None:
    server.finish_reason = reason
    engine = engine_of(server, finished)
    ((_, (answer,)),) = engine.generate(engine.batches(prompts(1)), SAMPLING)
    assert answer.truncated is truncated
    assert answer.text == "answer 0 to question 0"


def test_a_prompt_that_the_endpoint_refuses_does_not_stop_the_others(
    server: FaultyEndpoint, finished: FinishedRows, caplog: pytest.LogCaptureFixture
) -> None:
    healthy = server.refusal

    def too_long(request: Any, path: str) -> Any:
        if request.question == "question 1":
            message = "This model's maximum context length is 8 tokens; max_tokens is 64"
            return 400, {"message": message, "code": "context_length_exceeded"}
        return healthy(request, path)

    server.refusal = too_long  # type: ignore[method-assign]
    found = answers(engine_of(server, finished), prompts(3))
    assert found == {**expected(3), "1": [""]}
    assert "a prompt is refused (context_length_exceeded)" in caplog.text
    assert all("max_tokens" in each.body for each in server.requests)


def test_refused_parameters_are_left_out_from_then_on(
    server: FaultyEndpoint, finished: FinishedRows, caplog: pytest.LogCaptureFixture
) -> None:
    server.refuses = ("max_tokens", "temperature", "seed")
    engine = engine_of(server, finished, max_concurrent_requests=1)
    assert answers(engine, prompts(3)) == expected(3)
    assert [each.status for each in server.requests] == [400, 400, 400, 200, 200, 200]
    assert server.requests[-1].body["max_completion_tokens"] == 64
    assert "does not accept temperature, so it is left out" in caplog.text


def test_probabilities_come_from_logprobs(server: FaultyEndpoint, finished: FinishedRows) -> None:
    server.choose = lambda question, options: {" 4": 0.6, "4": 0.1, "5": 0.1, "Sure": 0.2}
    engine = engine_of(server, finished)
    found = choices(engine, prompts(5, GRADE))
    assert found["3"] == pytest.approx([0, 0, 0, 0.875, 0.125])
    assert server.requests[0].body["top_logprobs"] == 20
    assert engine.figures()["logprobs"] == 5
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"offers_logprobs": False},
        {"refuses": ("logprobs",)},
        {"refuses": ("logprobs", "temperature")},
    ],
    ids=["ignored", "refused", "a-model-that-thinks"],
)
def test_without_logprobs_structured_output_decides(
    server: FaultyEndpoint, finished: FinishedRows, changes: dict[str, Any]
) -> None:
    vars(server).update(changes)
    engine = engine_of(server, finished)
    found = choices(engine, prompts(6, GRADE))
    assert found == {str(n): [0, 0, 0, 0, 1] for n in range(6)}
    assert engine.figures()["structured"] == 6
    assert sum("response_format" in each.body for each in server.requests[-6:]) == 6
    first = next(each.body for each in server.requests if "response_format" in each.body)
    assert first["response_format"]["json_schema"]["strict"] is True
    # What the endpoint offers is tried once, with the first prompt.
    assert sum("logprobs" in each.body for each in server.requests) <= 3


def test_an_endpoint_that_lists_fewer_tokens_is_asked_for_fewer(
    server: FaultyEndpoint, finished: FinishedRows
) -> None:
    healthy = server.refusal

    def at_most_five(request: Any, path: str) -> Any:
        if request.body.get("top_logprobs", 0) > 5:
            return 400, {"message": "logprobs must be at most 5, and 20 were requested"}
        return healthy(request, path)

    server.refusal = at_most_five  # type: ignore[method-assign]
    engine = engine_of(server, finished)
    choices(engine, prompts(4, GRADE))
    assert engine.figures()["logprobs"] == 4
    assert [each.body["top_logprobs"] for each in server.requests] == [20, 5, 5, 5, 5]


def test_an_endpoint_with_neither_is_refused(
    server: FaultyEndpoint, finished: FinishedRows
) -> None:
    server.refuses = ("logprobs", "response_format")
    with pytest.raises(ConfigError, match=r"^run\.judge\.model: .*HTTP 400") as caught:
        choices(engine_of(server, finished), prompts(2, GRADE))
    assert "log-probabilities or structured output" in caught.value.hint


def test_an_unreadable_choice_is_counted_and_gets_equal_probabilities(
    server: FaultyEndpoint, finished: FinishedRows
) -> None:
    server.offers_logprobs = server.offers_structured = False
    server.choose = lambda question, options: {"Good": 1.0}
    engine = engine_of(server, finished)
    assert choices(engine, prompts(3, GRADE)) == {str(n): [0.2] * 5 for n in range(3)}
    assert engine.figures()["unreadable"] == 3


PRICES = {"price_per_million_input_tokens": 1e4, "price_per_million_output_tokens": 1e4}


def test_the_cost_limit_stops_before_it_is_exceeded_and_counts_earlier_attempts(
    server: FaultyEndpoint, finished: FinishedRows
) -> None:
    # A question has 2 words and its answer 5, so an answered prompt costs 0.07.
    asked, sampling = prompts(20), Sampling(5)
    engine = engine_of(server, finished, max_cost=1.6, **PRICES)
    found: dict[str, list[Generated]] = {}
    with pytest.raises(GateError) as caught:
        found.update(engine.generate(engine.batches(asked), sampling))  # one by one, as they arrive
    spent = engine.figures()
    assert 0.3 < spent["cost"] <= 1.6
    assert len(found) == len(server.requests) == spent["requests"]
    left = [prompt for prompt in asked if prompt.id not in found]
    assert f"{spent['cost']:.4g} of at most 1.6 USD are spent ({len(found)} requests" in str(
        caught.value
    )
    assert f"{len(left)} prompts of this step are left" in str(caught.value)
    assert "cluster.endpoints.hosted.maxCost" in caught.value.hint

    again = engine_of(server, finished, max_cost=1.6, **PRICES)
    assert again.figures() == spent
    with pytest.raises(GateError):
        list(again.generate(again.batches(left), sampling))
    more = engine_of(server, finished, max_cost=5.0, **PRICES)
    list(more.generate(more.batches(left), sampling))
    assert server.answered == {f"question {n}": 1 for n in range(20)}


def test_shards_share_the_limit(server: FaultyEndpoint, finished: FinishedRows) -> None:
    for index in range(2):
        engine = engine_of(server, finished, shard=Shard(index, 2), max_cost=3.0, **PRICES)
        with pytest.raises(GateError):
            list(engine.generate(engine.batches(prompts(40)), Sampling(5)))
    total = engine_of(server, finished, max_cost=3.0, **PRICES).figures()
    assert 1.0 < total["cost"] <= 3.0
    assert total["requests"] == len(server.requests)


def test_tokens_that_are_not_reported_are_estimated(
    server: FaultyEndpoint, finished: FinishedRows
) -> None:
    server.reports_usage = False
    engine = engine_of(server, finished, **PRICES)
    answers(engine, prompts(2))
    figures = engine.figures()
    assert figures["input_tokens"] >= 2 * 3
    assert figures["output_tokens"] >= 2 * 5
    assert figures["cost"] > 0
