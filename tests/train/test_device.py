"""The choices that follow from a device. Those of a Mac are stated here and were never run on one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medjob.errors import ConfigError
from medjob.plan.settings import choose_attention
from medjob.train import device
from medjob.train.device import Device, this_device

ROOT = Path(device.__file__).parents[2]
GIB = 2**30
MAC = Device("mps", "mps", 10 * GIB, has_deepspeed=False)
H100 = Device("cuda", "NVIDIA H100", 80 * GIB, count=8, index=3)
T4 = Device("cuda", "Tesla T4", 15 * GIB, has_bf16=False)
CPU = Device("cpu", "cpu", 10 * GIB)


def test_placement_and_budget() -> None:
    assert [each.placement for each in (MAC, H100, CPU)] == ["mps", 3, "cpu"]
    assert [each.backends for each in (MAC, H100)] == ["gloo", "cpu:gloo,cuda:nccl"]
    assert MAC.budget_bytes(1) == 9 * GIB
    assert H100.budget_bytes(8) == 72 * GIB  # every process has a GPU
    assert CPU.budget_bytes(2) == 4 * GIB  # processes share the memory


def test_a_mac_trains_in_bfloat16_on_its_gpu() -> None:
    assert MAC.precision("bfloat16") == {
        "bf16": True,
        "fp16": False,
        "use_cpu": False,
        "dataloader_pin_memory": False,
    }
    assert not MAC.fuses_kernels
    assert choose_attention("auto", MAC.kind, "bfloat16", True) == "sdpa"
    assert H100.precision("float16")["fp16"]
    assert CPU.precision("bfloat16")["use_cpu"]


def test_bfloat16_is_refused_without_support() -> None:
    for fine in (MAC, H100, CPU):
        fine.check_dtype("bfloat16")
    with pytest.raises(ConfigError, match="Tesla T4 does not support bfloat16") as caught:
        T4.check_dtype("bfloat16")
    assert "float16" in caught.value.hint
    with pytest.raises(ConfigError, match="mps does not support bfloat16") as caught:
        Device("mps", "mps", GIB, has_bf16=False).check_dtype("bfloat16")
    assert "macOS 14" in caught.value.hint


def test_a_mac_trains_in_one_process() -> None:
    MAC.check_processes(1, nodes=1)
    H100.check_processes(8, nodes=2)
    CPU.check_processes(4, nodes=2)
    with pytest.raises(ConfigError, match="this machine has 1 GPUs"):
        MAC.check_processes(2, nodes=1)
    with pytest.raises(ConfigError, match="nodes: a Mac trains alone"):
        MAC.check_processes(1, nodes=2)


def test_deepspeed_is_refused_where_it_does_not_exist() -> None:
    MAC.check_zero("none", "sft")
    H100.check_zero("zero3", "sft")
    with pytest.raises(ConfigError, match=r"resources.dpo.deepspeed: zero2 needs DeepSpeed"):
        MAC.check_zero("zero2", "dpo")


def test_a_mac_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10 * GIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: GIB)
    found = this_device()
    assert (found.kind, found.memory_bytes, found.has_bf16) == ("mps", 10 * GIB, True)
    assert device.gpu_memory_bytes() == GIB


def test_only_one_module_asks_torch_about_accelerators() -> None:
    asks = re.compile(r"torch\.(cuda|mps|backends\.mps)\.\w+\(")
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "medjob").rglob("*.py")
        if asks.search(path.read_text())
    }
    assert found == {"medjob/train/device.py"}


def test_everything_imports_without_what_exists_on_linux_only() -> None:
    """Packages with a marker for Linux in pyproject.toml, and functions of Linux."""
    script = """
import os, pkgutil, sys, importlib
for name in ("deepspeed", "liger_kernel", "helm", "flash_attn", "gptqmodel"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "posix_fadvise", "copy_file_range", "pidfd_open", "memfd_create"):
    if hasattr(os, name):
        delattr(os, name)
import medjob
names = [m.name for m in pkgutil.walk_packages(medjob.__path__, "medjob.") if "__main__" not in m.name]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 100
