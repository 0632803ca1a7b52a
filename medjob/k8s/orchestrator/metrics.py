"""The orchestrator's Prometheus endpoint `/metrics`: the values of `medjob status` as gauges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PORT = 9464  # the chart names it in the pod and in its NetworkPolicy
# A run that has ended has no pod to scrape. The state of the orchestrator's Job shows the end.
RUN_STATES = ("waiting", "running", "paused")
STAGE_STATES = ("pending", "queued", "starting", "running", "stopped", "published")
# Field of a stage's row -> name and help text of its gauge.
_STAGE_GAUGES = {
    "tries": ("attempts", "Number of attempts so far, including a running one."),
    "seconds": ("seconds", "Total time of all attempts, in seconds."),
    "gpu_seconds": ("gpu_seconds", "Total GPU time of all attempts on all nodes, in seconds."),
    "cost": ("cost", "Cost of the GPU time at the profile's price, in cluster.currency."),
    "saved": ("saved_step", "Newest stored step, or number of finished batches of rows."),
    "saved_at": ("saved_timestamp_seconds", "Time when the newest stored step was first seen."),
}
_SHARDS_TEXT = "Number of shards in this state, of a stage with several that is not published yet."
# Field of a running stage's progress.json -> name and help text of its gauge.
_PROGRESS_GAUGES = {
    "step": ("step", "Number of steps or rows done."),
    "total": ("steps", "Total number of steps or rows."),
    "eta_s": ("eta_seconds", "Estimated time left, in seconds."),
    "loss": ("loss", "Training loss."),
    "tokens_per_second": ("tokens_per_second", "Tokens per second on all GPUs together."),
}


class Gauges(Collector):
    """Gauges of one run's newest status.

    A gauge without a current value is left out, such as the loss of a stage that has ended.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._status: Mapping[str, Any] = {}

    def serve(self, port: int = PORT) -> int:
        """Serve the gauges from a thread until the process ends, and return the port."""
        registry = CollectorRegistry()
        registry.register(self)
        server, _ = start_http_server(port, registry=registry)
        return int(server.server_port)

    def update(self, status: Mapping[str, Any]) -> None:
        """Replace the status."""
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics. The registry calls this at every scrape."""
        if not self._status:
            return
        rows = [_with_cost(row) for row in self._status["stages"]]
        yield self._run_state(self._status["state"])
        yield self._stage_state(rows)
        for field, (name, text) in _STAGE_GAUGES.items():
            yield self._gauge(name, text, field, rows)
        yield self._shards(rows)
        progress = [{"stage": row["stage"], **row.get("progress", {})} for row in rows]
        for field, (name, text) in _PROGRESS_GAUGES.items():
            yield self._gauge(name, text, field, progress)

    def _run_state(self, current: str) -> Metric:
        text = "1 for the current state of the run, 0 for the others."
        gauge = GaugeMetricFamily("medjob_run_state", text, labels=["run", "state"])
        for state in RUN_STATES:
            gauge.add_metric([self._run, state], float(current == state))
        return gauge

    def _stage_state(self, rows: list[dict[str, Any]]) -> Metric:
        text = "1 for the current state of the stage, 0 for the others."
        gauge = GaugeMetricFamily("medjob_stage_state", text, labels=["run", "stage", "state"])
        for row in rows:
            for state in STAGE_STATES:
                gauge.add_metric([self._run, row["stage"], state], float(row["state"] == state))
        return gauge

    def _shards(self, rows: list[dict[str, Any]]) -> Metric:
        gauge = GaugeMetricFamily(
            "medjob_stage_shards", _SHARDS_TEXT, labels=["run", "stage", "state"]
        )
        for row in rows:
            for state, indices in row.get("shards", {}).items():
                gauge.add_metric([self._run, row["stage"], state], float(len(indices)))
        return gauge

    def _gauge(self, name: str, text: str, field: str, rows: list[dict[str, Any]]) -> Metric:
        gauge = GaugeMetricFamily(f"medjob_stage_{name}", text, labels=["run", "stage"])
        for row in rows:
            if row.get(field) is not None:
                gauge.add_metric([self._run, row["stage"]], float(row[field]))
        return gauge


def _with_cost(row: Mapping[str, Any]) -> dict[str, Any]:
    gpu_seconds = row["seconds"] * row["gpus"]
    cost = None if row["price"] is None else gpu_seconds / 3600 * row["price"]
    return {**row, "gpu_seconds": gpu_seconds, "cost": cost}
