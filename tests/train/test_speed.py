"""Live metrics and warnings of a running training."""

import json
import logging
from pathlib import Path

import pytest
import torch

from medjob.sources.locations import Location
from medjob.train import model, speed
from medjob.train.network import uses_sockets


def test_progress_has_live_metrics(trained_store: Path) -> None:
    progress = json.loads(next(trained_store.glob("t/sft/*/progress.json")).read_text())
    assert (progress["task"], progress["step"], progress["total"]) == ("train", 4, 4)
    for name in ("loss", "grad_norm", "tokens_per_second", "memory_gib"):
        assert progress[name] > 0, name
    assert "mfu" not in progress  # the peak of a CPU is unknown


class Clock:
    """A clock that the test advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("waiting", "warned"), [(0.05, False), (0.5, True)])
def test_a_slow_data_loader_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, waiting: float, warned: bool
) -> None:
    clock = Clock()
    monkeypatch.setattr(speed.time, "perf_counter", clock)
    measured = speed.Speed(model_flops_per_token=2e9, peak_flops=1e12)
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            measured.step_begins()
            clock.now += waiting
            measured.data_came()
            clock.now += 1.0
            measured.step_ended()
    assert len(caplog.records) == int(warned)
    if warned:
        assert "33% of the last 20 steps (10.00 of 30.00 s)" in caplog.text
    numbers = measured.numbers(tokens=1000)
    assert numbers["tokens_per_second"] == pytest.approx(1000 / (1 + waiting))
    assert numbers["mfu"] == pytest.approx(numbers["tokens_per_second"] * 2e9 / 1e12)
    assert measured.numbers(tokens=1000) == {}  # no tokens since the last call


def test_tcp_sockets_are_found_in_nccl_logs(tmp_path: Path) -> None:
    (tmp_path / "nccl.host.1.log").write_text(
        "host:1:9 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB\nhost:1:9 [0] NCCL INFO Using network IB\n"
    )
    assert not uses_sockets(tmp_path)
    (tmp_path / "nccl.host.2.log").write_text(
        "host:2:9 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>\nhost:2:9 [0] NCCL INFO Using network Socket\n"
    )
    assert uses_sockets(tmp_path)


def test_threads_respect_the_container_s_cpu_limit(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(model, "cpus", lambda: 1)
    try:
        model.load_model(model.ModelSpec(Location.of_folder(tiny), False, "float32", "auto"))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("dtype", "has", "warned"),
    [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)],
)
def test_a_cpu_without_bfloat16_instructions_is_reported(
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: str,
    has: bool,
    warned: bool,
) -> None:
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: has)
    model.load_model(model.ModelSpec(Location.of_folder(tiny), False, dtype, "auto"))
    assert ("run.dtype=float32" in caplog.text) is warned
