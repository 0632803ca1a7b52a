"""Joins, uses and leaves the process group. With a single process, all of this does nothing."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from medjob.runtime.link import World
from medjob.runtime.peers import store_prefix
from medjob.train.device import select_gpu, this_device
from medjob.train.patches import skip_shared_memory_extension
from medjob.train.states import allow_deepspeed_states

# transformers' default. The parents notice a lost node within seconds.
_TIMEOUT = timedelta(minutes=30)


def join(world: World, rendezvous: str, listener: int | None) -> None:
    """Select this process's GPU and join the process group.

    Args:
        rendezvous: HOST:PORT where the processes meet.
        listener: Rank 0: descriptor of the listening socket of `rendezvous`.

    Raises:
        ConfigError: the machine has fewer GPUs than processes, or is a Mac and not alone.
    """
    select_gpu(world.local_rank)
    this_device().check_processes(world.local_world_size, world.nodes)
    if world.world_size == 1:
        return
    host, _, port = rendezvous.rpartition(":")
    master = (
        {"is_master": True, "master_listen_fd": listener}
        if listener is not None
        else {"is_master": False}
    )
    store: Any = dist.TCPStore(  # type: ignore[attr-defined]
        host, int(port), world.world_size, timeout=_TIMEOUT, wait_for_workers=False, **master
    )
    if prefix := store_prefix():  # without it, nobody can find or plant the addresses of peers
        store = dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
    dist.init_process_group(
        this_device().backends,
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        timeout=_TIMEOUT,
    )


def leave() -> None:
    """Wait for all processes, then leave: rank 0 hosts the store that they all use."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set in any process. All processes get the same answer."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor([float(flag)])  # on the CPU, so that the GPU's queue is not drained
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def init_deepspeed() -> None:
    """Make DeepSpeed use the process group.

    On a CPU, accelerate does not do this, and ZeRO-3 then shards over one process only.
    """
    import deepspeed

    device = this_device()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not dist.is_initialized():  # DeepSpeed needs a group even for one process
        os.environ |= World().environment
        dist.init_process_group(
            device.backends,
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
        )
    allow_deepspeed_states()
    if device.kind != "cuda":
        skip_shared_memory_extension()
    deepspeed.init_distributed(
        dist_backend="nccl" if device.kind == "cuda" else "gloo", verbose=False
    )
