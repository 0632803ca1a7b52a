"""The orchestrator's endpoint for Prometheus."""

import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from medjob.k8s.orchestrator import main, status_reporter
from medjob.k8s.orchestrator.metrics import Gauges
from tests.k8s.world import Moment, OrchestratorProcess, World

Samples = dict[tuple[str, ...], float]


def scrape(port: int) -> Samples:
    """Return all samples, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (s.name, *(s.labels[name] for name in sorted(s.labels) if name != "run")): s.value
        for f in families
        for s in f.samples
    }


@pytest.fixture
def gauges() -> Gauges:
    return Gauges("t")


def test_gauges_show_the_values_of_a_running_stage(gauges: Gauges) -> None:
    port = gauges.serve(0)
    assert scrape(port) == {}, "there is no status yet"
    progress = {"step": 120, "total": 400, "eta_s": 600, "tokens_per_second": 4200.4, "loss": 1.25}
    sft = {
        "stage": "sft",
        "state": "running",
        "tries": 2,
        "seconds": 5400,
        "gpus": 4,
        "price": 2.0,
        "progress": progress,
        "saved": 100,
    }
    dpo = {"stage": "dpo", "state": "pending", "tries": 0, "seconds": 0, "gpus": 4, "price": None}
    gauges.update({"state": "running", "stages": [sft | {"saved_at": 7.0}, dpo]})
    samples = scrape(port)
    assert samples["medjob_run_state", "running"] == 1
    assert samples["medjob_run_state", "paused"] == 0
    assert samples["medjob_stage_state", "sft", "running"] == 1  # labels by name: stage, state
    assert samples["medjob_stage_state", "dpo", "pending"] == 1
    values = {name: samples[name, "sft"] for name, *labels in samples if labels == ["sft"]}
    assert values == {
        "medjob_stage_attempts": 2,
        "medjob_stage_seconds": 5400,
        "medjob_stage_gpu_seconds": 21600,
        "medjob_stage_cost": 12,
        "medjob_stage_saved_step": 100,
        "medjob_stage_saved_timestamp_seconds": 7,
        "medjob_stage_step": 120,
        "medjob_stage_steps": 400,
        "medjob_stage_eta_seconds": 600,
        "medjob_stage_loss": 1.25,
        "medjob_stage_tokens_per_second": 4200.4,
    }
    assert ("medjob_stage_cost", "dpo") not in samples, "without a price there is no cost"


@pytest.mark.usefixtures("simulated")
def test_gauges_follow_the_run_through_its_stages(
    folder: Path, gauges: Gauges, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = gauges.serve(0)
    seen: set[tuple[str, ...]] = set()
    completed = main.run_until_end
    monkeypatch.setattr(
        main, "run_until_end", lambda orchestrator, _: completed(orchestrator, gauges)
    )
    monkeypatch.setattr(status_reporter, "STATUS_S", 3.0)
    world = World(folder)

    def watch(process: OrchestratorProcess, moment: Moment, name: str, mutates: bool) -> None:
        if name == "patch_job" and moment == "after":
            seen.update(
                tuple(labels)
                for (family, *labels), value in scrape(port).items()
                if family == "medjob_stage_state" and value
            )

    world.on_call = watch
    world.run()
    assert {
        ("fetch", "running"),
        ("prepare", "running"),
        ("fetch", "published"),
        ("sft", "published"),
    } <= seen


def test_gauges_count_the_shards_of_a_stage(gauges: Gauges) -> None:
    port = gauges.serve(0)
    row = {"stage": "candidates", "state": "running", "tries": 4, "seconds": 90, "gpus": 1}
    shards = {"published": [0], "running": [1, 2], "waiting": []}
    progress = {"step": 120, "total": 400, "eta_s": 600, "per_s": 1.5}
    row |= {"price": 2.0, "shards": shards, "progress": progress}
    gauges.update({"state": "running", "stages": [row]})
    samples = scrape(port)
    found = {state: samples["medjob_stage_shards", "candidates", state] for state in shards}
    assert found == {"published": 1, "running": 2, "waiting": 0}
    assert samples["medjob_stage_step", "candidates"] == 120
    assert samples["medjob_stage_cost", "candidates"] == 0.05  # seconds are those of all shards
