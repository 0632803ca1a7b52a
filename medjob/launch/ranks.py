"""Start the training processes of this node, one per device; receive their events; kill them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from medjob.config import Run
from medjob.launch.messages import send
from medjob.launch.nodes import Node, listen
from medjob.launch.spec import Spec
from medjob.runtime.cpus import cpus
from medjob.runtime.link import WEIGHTS_ONLY, Event, World
from medjob.runtime.secrets import withheld
from medjob.stage import StageContext

_log = logging.getLogger(__name__)
_WORKER = "medjob.launch.worker"
_MASTER = ("MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_VARIABLES = (*World().environment, *_MASTER, "GROUP_WORLD_SIZE")
_LAUNCHER_PREFIXES = (
    "ROLE_",
    "TORCHELASTIC_",
    "OMPI_COMM_WORLD_",
    "MV2_COMM_WORLD_",
    "PMI_",
    "MPI_LOCAL",
)


@dataclass(slots=True)
class Rank:
    """One training process."""

    process: subprocess.Popen[bytes] | None
    """None for a process that an external launcher has started, and which it ends."""
    connection: socket.socket
    world: World


class Ranks:
    """The training processes of this node."""

    def __init__(self, ranks: list[Rank]) -> None:
        self._ranks = ranks
        self._events: queue.Queue[tuple[int, Event]] = queue.Queue()
        for rank in ranks:
            threading.Thread(
                target=self._watch, args=(rank,), daemon=True, name=f"rank-{rank.world.rank}"
            ).start()

    def __len__(self) -> int:
        return len(self._ranks)

    def next_event(self, timeout: float) -> tuple[int, Event] | None:
        """Return the local rank and its next event, or None after `timeout` seconds.

        The last event of a process is `exit`, with its `status`: None if only a launcher knows it.
        """
        with contextlib.suppress(queue.Empty):
            return self._events.get(timeout=timeout)
        return None

    def acknowledge_save(self, local_rank: int) -> None:
        """Answer a `saved` event: the process may change the checkpoint's directory again."""
        send(self._ranks[local_rank].connection, {"event": "acknowledged"})

    def request_save(self) -> None:
        """Ask the processes to save at the end of the step and stop."""
        for rank in self._ranks:
            send(rank.connection, {"event": "stop"})

    def kill(self) -> None:
        """Kill the processes that this one has started, and the processes that they have started.

        `LocalRanks.end` ends the others after the outcome is stored, because a launcher kills all
        processes of a node as soon as one of them has failed.
        """
        started = [(rank.process, rank.connection) for rank in self._ranks if rank.process]
        for process, _ in started:
            # Each process leads its own session, so its process group has the same number.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process, connection in started:
            process.wait()
            connection.close()

    def _watch(self, rank: Rank) -> None:
        """Queue the events of a process, and `exit` after all others.

        The connection does not close when the process ends if a forked helper still holds it.
        """
        receiver = threading.Thread(target=self._receive_events, args=(rank,), daemon=True)
        receiver.start()
        status = None
        if rank.process:
            status = rank.process.wait()
            with contextlib.suppress(OSError):
                # Lines that have arrived can still be read.
                rank.connection.shutdown(socket.SHUT_RDWR)
        receiver.join()
        self._events.put((rank.world.local_rank, {"event": "exit", "status": status}))

    def _receive_events(self, rank: Rank) -> None:
        with contextlib.suppress(OSError, ValueError), rank.connection.makefile("rb") as lines:
            for line in lines:
                self._events.put((rank.world.local_rank, json.loads(line)))


@contextlib.contextmanager
def launch_ranks(
    stage: str, context: StageContext[None], run: Run, node: Node, resume_step: int | None
) -> Iterator[Ranks]:
    """Start this node's processes, and kill those that are left when the context ends.

    Processes that an external launcher has started get their specification instead.
    """
    worlds = _worlds(node, processes=max(context.resources.gpus, 1))
    started = node.local_ranks.connect() if node.local_ranks else {}
    with _rendezvous(node, worlds[0].world_size) as (address, listener):
        ranks: list[Rank] = []
        for world in worlds:
            inherited = listener if world.is_main else None
            spec = Spec(
                stage=stage,
                run=run,
                resources=context.resources,
                locations=dict(context.locations),
                inputs=dict(context.inputs),
                output=context.output,
                work=context.work,
                report_to=context.report_to,
                tensorboard=context.tensorboard,
                world=world,
                resume_step=resume_step,
                rendezvous=address,
                listener=inherited.fileno() if inherited else None,
                external=world.local_rank in started,
                debug=logging.getLogger("medjob").level <= logging.DEBUG,
            )
            try:
                ranks.append(_start(spec, inherited, started.get(world.local_rank)))
            except OSError:  # out of memory or disk space
                Ranks(ranks).kill()
                raise
    group = Ranks(ranks)
    try:
        yield group
    finally:
        group.kill()


def _worlds(node: Node, processes: int) -> list[World]:
    """The world as each of this node's processes sees it."""
    return [
        World(
            rank=node.rank * processes + local_rank,
            world_size=node.count * processes,
            local_rank=local_rank,
            local_world_size=processes,
            node=node.rank,
            nodes=node.count,
        )
        for local_rank in range(processes)
    ]


@contextlib.contextmanager
def _rendezvous(node: Node, world_size: int) -> Iterator[tuple[str, socket.socket | None]]:
    """HOST:PORT of the processes' rendezvous, and on node 0 its listening socket.

    Empty for a single process, which needs no rendezvous.
    """
    if world_size == 1:
        yield "", None
    elif node.rank > 0:
        yield f"{node.address}:{node.port + 1}", None
    elif node.count == 1:
        with listen("127.0.0.1", 0) as listener:
            yield f"{node.address}:{listener.getsockname()[1]}", listener
    else:
        with listen("", node.port + 1) as listener:
            yield f"{node.address}:{node.port + 1}", listener


def _start(spec: Spec, listener: socket.socket | None, started: socket.socket | None) -> Rank:
    file = spec.work / f"rank-{spec.world.rank}.json"
    file.write_text(spec.dump())
    if started:
        send(started, {"event": "start", "spec": str(file)})
        return Rank(None, started, spec.world)
    parent_end, worker_end = socket.socketpair()
    inherited = [worker_end.fileno()]
    if listener:
        inherited.append(listener.fileno())
    with worker_end:
        process = subprocess.Popen(
            command(worker_end.fileno(), str(file)),
            pass_fds=inherited,
            stdout=2,  # libraries print to stdout, which medjob reserves for data
            start_new_session=True,  # only the parent handles Ctrl-C
            env=environment(spec),
        )
    return Rank(process, parent_end, spec.world)


def command(descriptor: int, spec_file: str) -> list[str]:
    """The command of a training process."""
    # -P: files in the working directory must not be imported in place of libraries.
    return [sys.executable, "-P", "-m", _WORKER, str(descriptor), spec_file]


def environment(spec: Spec) -> dict[str, str]:
    """The environment of a training process. Libraries read some variables when imported."""
    world = spec.world
    on_hub = any(location.on_hub for location in spec.locations.values())
    # -P for the processes that libraries start as well.
    variables = {
        **_inherited(withheld(spec.report_to, on_hub)),
        "PYTHONSAFEPATH": "1",
        **WEIGHTS_ONLY,
    }
    if world.world_size > 1:
        variables |= world.environment
        # accelerate refuses several nodes without them.
        variables |= {name: os.environ[name] for name in _MASTER if name in os.environ}
    if "OMP_NUM_THREADS" not in variables:  # by default each process would use all cores
        variables["OMP_NUM_THREADS"] = str(max(1, cpus() // world.local_world_size))
    if world.nodes == 1 and sys.platform == "linux":
        # On the loopback interface gloo does not need to resolve this host's name.
        variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return variables


def _inherited(left_out: Collection[str]) -> dict[str, str]:
    """This process's environment without a launcher's variables, by which libraries would treat a
    single process as distributed, and without the names in `left_out`."""
    names = {*_LAUNCHER_VARIABLES, *left_out}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in names and not name.startswith(_LAUNCHER_PREFIXES)
    }
