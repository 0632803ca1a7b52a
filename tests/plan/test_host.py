"""Memory and cores of this machine or container, and their use by `medjob plan` and training."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medjob.config import RunFile
from medjob.pipeline.planning import plan_lines
from medjob.runtime import cpus, host

GIB = 2**30
PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
UNLIMITED_V1 = 9223372036854771712


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write files of a fake /sys/fs/cgroup, by relative path."""
    root = tmp_path / "cgroup"
    monkeypatch.setattr(cpus, "CGROUP", root)
    limits = [root / file.relative_to("/sys/fs/cgroup") for file in host.LIMIT_FILES]
    monkeypatch.setattr(host, "LIMIT_FILES", tuple(limits))

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"{text}\n")

    return write


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, PHYSICAL),
        ({"memory.max": str(GIB)}, GIB),
        ({"memory.max": "max"}, PHYSICAL),
        ({"memory.max": str(PHYSICAL * 2)}, PHYSICAL),
        ({"memory/memory.limit_in_bytes": str(GIB)}, GIB),
        ({"memory/memory.limit_in_bytes": str(UNLIMITED_V1)}, PHYSICAL),
    ],
    ids=["no-container", "v2", "v2-unlimited", "v2-above-physical", "v1", "v1-unlimited"],
)
def test_memory_limit_honours_cgroups(
    cgroup: Callable[..., None], files: dict[str, str], expected: int
) -> None:
    cgroup(files)
    assert host.memory_limit_bytes() == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
    ids=["no-container", "v2", "v2-below-one", "v2-unlimited", "v1", "v1-unlimited"],
)
def test_cpus_honour_affinity_and_quota(
    cgroup: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    expected: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    cgroup(files)
    assert cpus.cpus() == expected


def test_plan_and_training_use_the_same_host_memory(
    cgroup: Callable[..., None],
    make_run_file: Callable[..., RunFile],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import torch

    from medjob.train.device import this_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cgroup({"memory.max": str(GIB)})
    assert this_device().budget_bytes(1) == 0.8 * GIB
    sizes: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "vocab_size": 49152,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(sizes))
    lines = plan_lines(make_run_file({"run": {"base_model": str(tmp_path / "model")}}), None)
    assert "but only 0.8 GiB are usable" in "\n".join(lines)
