"""The process group: joining it, agreeing in it, leaving it. A single process is no group, and all of this does nothing."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from medjob.errors import ConfigError
from medjob.runtime.link import World

_TIMEOUT = timedelta(
    minutes=30
)  # transformers' default; a lost node is noticed by the parents, within seconds


def join(world: World, rendezvous: str, listener: int | None) -> None:
    """Take this process's device, and join the others at `rendezvous` (HOST:PORT); rank 0 is given the open socket."""
    if torch.cuda.is_available():
        if torch.cuda.device_count() < world.local_world_size:
            raise ConfigError(
                f"resources.<stage>.gpus: {world.local_world_size} were asked for, this machine has {torch.cuda.device_count()}",
                "lower it: the global batch stays as it is",
            )
        torch.cuda.set_device(world.local_rank)
    if world.world_size == 1:
        return
    host, _, port = rendezvous.rpartition(":")
    master = (
        {"is_master": True, "master_listen_fd": listener}
        if listener is not None
        else {"is_master": False}
    )
    store = dist.TCPStore(
        host, int(port), world.world_size, timeout=_TIMEOUT, wait_for_workers=False, **master
    )  # type: ignore[attr-defined]
    dist.init_process_group(
        _backend(), store=store, rank=world.rank, world_size=world.world_size, timeout=_TIMEOUT
    )


def _backend() -> str:
    """GPUs through NCCL; what is agreed on the CPU through gloo."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def leave() -> None:
    """Wait for all and leave: rank 0 holds the store that the others still ask."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set in any process; the same answer in all."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(
        [float(flag)]
    )  # on the CPU, through gloo: the GPU's queue need not be emptied for it
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def init_deepspeed() -> None:
    """Let DeepSpeed use the process group.

    On a CPU accelerate leaves this out, and ZeRO-3 then shards over one process. The shared-memory extension that
    DeepSpeed would compile there (a minute, and a lock file that a killed process leaves behind) is not needed.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not dist.is_initialized():  # DeepSpeed with one process wants a group of one
        os.environ |= World().environment
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False
    )
