"""The orchestrator's `/metrics` for Prometheus: what `medjob status` shows, as numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PORT = 9464  # the chart names it in the pod and in its NetworkPolicy
RUN_STATES = (
    "waiting",
    "running",
    "paused",
)  # one that has ended has no pod to scrape: its end is the Job's own state
STAGE_STATES = ("pending", "queued", "starting", "running", "stopped", "published")
_ROW = {  # field of a stage's row: gauge, what it is
    "tries": ("attempts", "Attempts so far, a running one included."),
    "seconds": ("seconds", "Time that all attempts took together."),
    "gpu_seconds": ("gpu_seconds", "The same times the GPUs of all nodes."),
    "cost": ("cost", "GPU hours at the profile's price, in cluster.currency."),
    "saved": ("saved_step", "Newest stored step, or number of finished batches of rows."),
    "saved_at": ("saved_timestamp_seconds", "When that was first seen."),
}
_PROGRESS = {  # field of a running stage's progress.json: gauge, what it is
    "step": ("step", "Steps or rows done."),
    "total": ("steps", "Steps or rows to be done."),
    "eta_s": ("eta_seconds", "Time that the rest will take."),
    "loss": ("loss", "Training loss."),
    "tokens_per_second": ("tokens_per_second", "Tokens trained on in a second, on all GPUs."),
}


class Gauges(Collector):
    """The newest status of one run. A gauge that has no value now (the loss of a stage that has ended) is left out."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._status: Mapping[str, Any] = {}

    def serve(self, port: int = PORT) -> int:
        """Answer scrapes from a thread, until the process ends; the port."""
        registry = CollectorRegistry()
        registry.register(self)
        server, _ = start_http_server(port, registry=registry)
        return int(server.server_port)

    def show(self, status: Mapping[str, Any]) -> None:
        """Take a newer status."""
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at every scrape."""
        status = self._status
        if not status:
            return
        run = GaugeMetricFamily(
            "medjob_run_state",
            "1 for the state that the run is in, 0 for the others.",
            labels=["run", "state"],
        )
        for state in RUN_STATES:
            run.add_metric([self._run, state], float(status["state"] == state))
        yield run
        rows = [_with_costs(row) for row in status["stages"]]
        stage = GaugeMetricFamily(
            "medjob_stage_state",
            "1 for the state that the stage is in.",
            labels=["run", "stage", "state"],
        )
        for row in rows:
            for state in STAGE_STATES:
                stage.add_metric([self._run, row["stage"], state], float(row["state"] == state))
        yield stage
        yield from (self._gauge(name, text, field, rows) for field, (name, text) in _ROW.items())
        progress = [{"stage": row["stage"], **row.get("progress", {})} for row in rows]
        yield from (
            self._gauge(name, text, field, progress) for field, (name, text) in _PROGRESS.items()
        )

    def _gauge(self, name: str, text: str, field: str, rows: list[dict[str, Any]]) -> Metric:
        gauge = GaugeMetricFamily(f"medjob_stage_{name}", text, labels=["run", "stage"])
        for row in rows:
            if row.get(field) is not None:
                gauge.add_metric([self._run, row["stage"]], float(row[field]))
        return gauge


def _with_costs(row: Mapping[str, Any]) -> dict[str, Any]:
    gpu_seconds = row["seconds"] * row["gpus"]
    return {
        **row,
        "gpu_seconds": gpu_seconds,
        "cost": None if row["price"] is None else gpu_seconds / 3600 * row["price"],
    }
