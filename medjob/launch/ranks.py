"""One process a device: start them, store what they save, show how far they are, and end them all as one."""

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
from collections.abc import Iterator
from dataclasses import dataclass

from medjob.config import Run
from medjob.launch.nodes import Node, listen
from medjob.launch.spec import Spec
from medjob.runtime.cpus import cpus
from medjob.runtime.link import Event, World
from medjob.stage import StageContext

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Rank:
    """One training process."""

    process: subprocess.Popen[bytes]
    connection: socket.socket
    world: World


class Ranks:
    """The training processes of this node, and the events they send."""

    def __init__(self, ranks: list[Rank]) -> None:
        self._ranks = ranks
        self._events: queue.Queue[tuple[int, Event]] = queue.Queue()
        for rank in ranks:
            threading.Thread(
                target=self._follow, args=(rank,), daemon=True, name=f"rank-{rank.world.rank}"
            ).start()

    def __len__(self) -> int:
        return len(self._ranks)

    def next_event(self, timeout: float) -> tuple[int, Event] | None:
        """The next event and the local rank it came from; None after `timeout` seconds."""
        with contextlib.suppress(queue.Empty):
            return self._events.get(timeout=timeout)
        return None

    def go_on(self, local_rank: int) -> None:
        """Answer a `saved`."""
        with contextlib.suppress(OSError):  # it has ended; its exit is an event of its own
            self._ranks[local_rank].connection.sendall(b'{"event": "go"}\n')

    def ask_to_stop(self) -> None:
        """Ask for a save at the end of the step."""
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """End those that still run, and whatever they have started."""
        for rank in self._ranks:
            with contextlib.suppress(
                ProcessLookupError, PermissionError
            ):  # each leads a session, and so a group, of its own
                os.killpg(rank.process.pid, signal.SIGKILL)
        for rank in self._ranks:
            rank.process.wait()
            rank.connection.close()

    def _follow(self, rank: Rank) -> None:
        """Pass on a process's events, its end last. (A helper that it forked may hold the link open beyond that.)"""
        listener = threading.Thread(target=self._listen, args=(rank,), daemon=True)
        listener.start()
        status = rank.process.wait()
        with contextlib.suppress(OSError):
            rank.connection.shutdown(
                socket.SHUT_RDWR
            )  # lines that are there already can still be read
        listener.join()
        self._events.put((rank.world.local_rank, {"event": "exit", "status": status}))

    def _listen(self, rank: Rank) -> None:
        with contextlib.suppress(OSError, ValueError), rank.connection.makefile("rb") as lines:
            for line in lines:
                self._events.put((rank.world.local_rank, json.loads(line)))


@contextlib.contextmanager
def started(
    stage: str, context: StageContext[None], run: Run, node: Node, resume_step: int | None
) -> Iterator[Ranks]:
    """Start this node's processes; none of them is left when the context ends."""
    local = max(context.resources.gpus, 1)
    worlds = [
        World(node.rank * local + n, node.count * local, n, local, node.rank, node.count)
        for n in range(local)
    ]
    with _rendezvous(node, worlds[0]) as (address, listener):
        ranks = []
        for world in worlds:
            taken = listener if world.is_main else None
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
                listener=taken.fileno() if taken else None,
                debug=logging.getLogger("medjob").level <= logging.DEBUG,
            )
            try:
                ranks.append(_start(spec, taken))
            except OSError:  # no memory, or no disk, for one more
                Ranks(ranks).kill()
                raise
    group = Ranks(ranks)
    try:
        yield group
    finally:
        group.kill()


@contextlib.contextmanager
def _rendezvous(node: Node, first: World) -> Iterator[tuple[str, socket.socket | None]]:
    """Where the processes meet, and on node 0 the open socket; nothing for a single process."""
    if first.world_size == 1:
        yield "", None
    elif node.count > 1 and node.rank > 0:
        yield f"{node.address}:{node.port + 1}", None
    else:
        alone = node.count == 1
        with listen("127.0.0.1" if alone else "", 0 if alone else node.port + 1) as listener:
            yield f"{node.address}:{listener.getsockname()[1]}", listener


def _start(spec: Spec, listener: socket.socket | None) -> Rank:
    ours, theirs = socket.socketpair()
    file = spec.work / f"rank-{spec.world.rank}.json"
    file.write_text(spec.dump())
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "medjob.launch.worker", str(theirs.fileno()), str(file)],
            pass_fds=[theirs.fileno(), *([listener.fileno()] if listener else [])],
            stdout=2,  # libraries print there; our stdout holds data alone
            start_new_session=True,  # Ctrl-C is the parent's to handle
            env={**os.environ, **_environment(spec.world)},
        )
    return Rank(process, ours, spec.world)


def _environment(world: World) -> dict[str, str]:
    """What the libraries read before any of our code can tell them."""
    environment = (
        dict(world.environment) if world.world_size > 1 else {}
    )  # a single one is not distributed
    if "OMP_NUM_THREADS" not in os.environ:  # else every rank takes every core
        environment["OMP_NUM_THREADS"] = str(max(1, cpus() // world.local_world_size))
    if world.nodes == 1 and sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get(
            "GLOO_SOCKET_IFNAME", "lo"
        )  # needs no name of this host
    return environment
