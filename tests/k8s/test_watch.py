"""`medjob status` and `--watch`: what they show, unavailable API servers, and exit codes."""

import io
import json
import random
import types
from collections.abc import Callable
from typing import Literal

import pytest
import yaml

from medjob.errors import ConfigError, InputError, RetryError
from medjob.k8s.client import status, watch
from medjob.k8s.client.release import Installed
from tests.fakes.cluster import Cluster
from tests.fakes.cluster_api import ModelApi
from tests.fakes.objects import Object
from tests.k8s.test_submit import VALUES

ROW = {"stage": "sft", "state": "running", "tries": 1, "seconds": 60, "gpus": 0, "price": None}


class Run:
    """A release whose orchestrator reports `script(now)`.

    The API server is unavailable in the seconds of `unavailable`.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, script: Callable[[float], Object | None]
    ) -> None:
        self.now = 0.0
        self.unavailable = range(0)
        self.script = script
        self.refused = 0
        self.cluster = Cluster(random.Random(0))
        release = {"medjob/release": "r"}
        labels = release | {"medjob/component": "orchestrator"}
        self.job = self.cluster.added(
            self.cluster.jobs, {"metadata": {"name": "o", "labels": labels, "annotations": {}}}
        )
        self.values = yaml.safe_load(VALUES.read_text()) | {"pipeline": {"mode": "orchestrated"}}
        self.values["cluster"]["currency"] = "EUR"
        self.cluster.config_maps["r-pipeline"] = {
            "metadata": {"labels": release},
            "data": {"job.yaml": yaml.safe_dump(self.values)},
        }
        self.installed = Installed("r", ModelApi(self.cluster, self._hook))
        monkeypatch.setattr(
            watch, "time", types.SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep)
        )

    def _hook(self, moment: Literal["before", "after"], name: str, mutates: bool) -> None:
        if int(self.now) in self.unavailable:
            self.refused += 1
            raise RetryError("the API server cannot be reached")
        status = self.script(self.now)
        if status is not None:
            self.job["metadata"]["annotations"]["medjob/status"] = json.dumps(status)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 5000, "the watch does not end"


def reported(
    state: str, text: str = "sft: attempt 1", code: int = 0, row: Object | None = None
) -> Object:
    return {"state": state, "text": text, "code": code, "at": 0.0, "stages": [ROW | (row or {})]}


def test_watch_survives_an_api_server_that_is_away_for_minutes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(monkeypatch, lambda now: reported("done" if now > 700 else "running"))
    run.unavailable = range(60, 600)
    watch.follow(run.installed)
    assert run.refused > 100
    shown = capsys.readouterr().out
    assert "cannot be reached; retrying. The run does not need this terminal." in shown
    assert shown.index("cannot be reached") < shown.index("ci-cpu: done")


def test_watch_ends_with_75_if_the_api_server_stays_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch, lambda now: reported("running"))
    run.unavailable = range(60, 10_000)
    with pytest.raises(RetryError, match="cannot be reached"):
        watch.follow(run.installed)
    assert 600 < run.now < 700


def test_log_shows_each_change_of_state_and_one_table_per_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(now: float) -> Object:
        state = "pending" if now < 30 else "running"
        row = {"state": state, "progress": {"step": int(now), "total": 999}, "saved": int(now)}
        return reported("done" if now > 330 else "running", row=row)

    watch.follow(Run(monkeypatch, script).installed)
    tables = capsys.readouterr().out.count("STAGE ")
    assert 7 <= tables <= 9, tables  # two states, the end, and 300 s of progress


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_terminal_replaces_the_previous_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    display = watch.Display(terminal)
    display.show(["one", "x" * 200], "a")
    display.show(["two"], "a")
    display.show(["three"], "a")
    up = "\x1b[{}F\x1b[J"
    assert terminal.getvalue() == f"one\n{'x' * 80}\n{up.format(2)}two\n{up.format(1)}three\n"


def test_watch_of_a_failed_run_ends_with_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no such module"):
        watch.follow(
            Run(monkeypatch, lambda _: reported("failed", "sft: no such module", 64)).installed
        )


def test_status_without_an_orchestrator_raises_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch, lambda _: None)
    run.job["status"] = {"active": 1}
    assert status.table(run.installed) == ["the orchestrator has not reported a status yet"]
    run.cluster.jobs.clear()
    with pytest.raises(RetryError, match="has no orchestrator"):
        status.table(run.installed)
    run.cluster.config_maps.clear()
    with pytest.raises(InputError, match="no release 'r' in namespace"):
        status.table(run.installed)


def test_orchestrator_without_a_pod_is_shown_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch, lambda _: None)
    event = {
        "involvedObject": {"kind": "Job", "name": "o"},
        "type": "Warning",
        "reason": "FailedCreate",
        "message": "exceeded quota",
    }
    run.cluster.events.append(event)
    assert status.table(run.installed)[-1] == "o has no pod: FailedCreate: exceeded quota"


def test_config_map_of_another_application_is_not_a_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch, lambda _: None)
    run.cluster.config_maps["r-pipeline"]["metadata"]["labels"] = {
        "app.kubernetes.io/name": "other"
    }
    with pytest.raises(InputError, match="no release 'r' in namespace"):
        run.installed.annotate({"medjob/paused": "true"})


def test_status_ignores_fields_of_newer_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch, lambda _: reported("running"))
    run.job["status"] = {"active": 1}
    run.values["cluster"]["a_key_of_next_year"] = 1
    run.cluster.config_maps["r-pipeline"]["data"]["job.yaml"] = yaml.safe_dump(run.values)
    assert status.table(run.installed)[0].startswith("ci-cpu: running")


def test_pod_that_does_not_start_is_shown_with_its_latest_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch, lambda _: reported("running", row={"state": "starting"}))
    labels = {"medjob/release": "r", "medjob/component": "sft"}
    run.cluster.added(
        run.cluster.pods,
        {"metadata": {"name": "r-sft-1", "labels": labels}, "status": {"phase": "Pending"}},
    )
    about = {"kind": "Pod", "name": "r-sft-1"}
    run.cluster.events.append(
        {"involvedObject": about, "type": "Normal", "reason": "Pulling", "message": "Pulling image"}
    )
    assert status.table(run.installed)[-1] == "r-sft-1 has not started: Pulling: Pulling image"
    run.cluster.events.append(
        {
            "involvedObject": about,
            "type": "Warning",
            "reason": "Failed",
            "message": "no such\nimage",
        }
    )
    run.cluster.events.append(
        {"involvedObject": about, "type": "Normal", "reason": "BackOff", "message": "waiting"}
    )
    assert status.table(run.installed)[-1] == "r-sft-1 has not started: Failed: no such image"
