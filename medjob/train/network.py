"""Measures the network between nodes, and checks which transport NCCL uses."""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path

import torch
import torch.distributed as dist

from medjob.runtime.link import World
from medjob.train.device import synchronize, this_device

_log = logging.getLogger(__name__)
_ELEMENTS = 4 * 2**20  # 16 MiB of float32: a bucket of LoRA gradients
_REPEATS = 3
_SOCKET = re.compile(r"NCCL INFO Using network Socket|NCCL INFO .*NET/Socket")


def record_nccl(folder: Path) -> None:
    """Make NCCL log which network it uses. Call this before the process group is created.

    A user's own NCCL_DEBUG stays as it is.
    """
    if "NCCL_DEBUG" not in os.environ:
        os.environ |= {
            "NCCL_DEBUG": "INFO",
            "NCCL_DEBUG_SUBSYS": "INIT,NET",
            "NCCL_DEBUG_FILE": str(folder / "nccl.%h.%p.log"),
        }


def report_network(world: World, folder: Path) -> None:
    """Measure and log an all-reduce between nodes. Warn if NCCL fell back to TCP sockets."""
    if world.nodes == 1:
        return
    device = torch.device(this_device().placement)
    seconds = _all_reduce_seconds(device)
    if not world.is_main:
        return
    # The bus bandwidth of nccl-tests: each byte crosses the slowest link 2 (n - 1) / n times.
    gigabytes = 4 * _ELEMENTS * 2 * (world.world_size - 1) / world.world_size / seconds / 1e9
    numbers = (
        f"an all-reduce of 16 MiB over {world.nodes} nodes takes {1000 * seconds:.0f} ms "
        f"({gigabytes:.2f} GB/s)"
    )
    if device.type == "cuda" and uses_sockets(folder):
        _log.warning(
            "NCCL uses TCP sockets between the nodes: %s; "
            "check the nodes' RDMA devices and NCCL's network plugin",
            numbers,
        )
    else:
        _log.info(numbers)


def uses_sockets(folder: Path) -> bool:
    """Whether NCCL's log shows that it uses TCP sockets."""
    return any(
        _SOCKET.search(path.read_text(errors="replace")) for path in folder.glob("nccl.*.log")
    )


def _all_reduce_seconds(device: torch.device) -> float:
    """Seconds of the fastest of `_REPEATS`. The first one, which connects, is not counted."""
    numbers = torch.zeros(_ELEMENTS, device=device)
    times = []
    for _ in range(1 + _REPEATS):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
