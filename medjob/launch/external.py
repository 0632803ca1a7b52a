"""Training processes that another launcher starts: torchrun, srun, mpirun or a Kubeflow TrainJob.

The launcher starts `medjob STAGE` once per device. The process with local rank 0 is the parent of
its node: it does all network I/O, and starts the training process of its own rank. The others
connect to it over a Unix socket and become training processes.

They end only when their parent says so, after the outcome is stored: a launcher kills the other
processes as soon as one has failed, and passes on neither its exit code nor its reason.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from medjob.config import RunFile
from medjob.config.load import validate
from medjob.errors import ConfigError, MedjobError, RetryError, translate
from medjob.launch import ranks
from medjob.launch.messages import receive, send
from medjob.launch.nodes import PORT, RENDEZVOUS_TIMEOUT_S, Node, checked_host
from medjob.launch.spec import Spec
from medjob.runtime.files import fingerprint
from medjob.runtime.link import World

_NUMBER = re.compile("[0-9]{1,5}")
_MAX_PATH_BYTES = 100  # of a Unix socket; Linux allows 107, macOS 103
_JOIN_TIMEOUT_S = 5.0
_LATE_RANKS_S = 60.0  # how long a parent that has finished waits for processes that still start


@contextlib.contextmanager
def launched(run_file: RunFile, stage: str) -> Iterator[tuple[RunFile, Node]]:
    """Find out which part of `stage` this process is, and end the node's other processes with it.

    Yields the run file, with the launcher's nodes and processes in `resources`, and this node. Does
    not return in a process that another one leads.

    Raises:
        ConfigError: a variable of the launcher is missing or wrong.
    """
    resources = getattr(run_file.resources, stage)
    if resources.launcher == "medjob":
        yield run_file, Node.from_environment(stage, resources.nodes)
        return
    world = world_of(stage, resources.nodes)
    address, port = _master(world)
    identity = (run_file.cluster.store.uri, run_file.run.name, stage, address, port, world.node)
    path = _socket_path(fingerprint(identity))
    if world.local_rank > 0:
        become_rank(world, path)
    local_ranks = LocalRanks(path, world.local_world_size)
    try:
        # The launcher's server can have MASTER_PORT, as torchrun's has.
        node = Node(world.node, world.nodes, address, port + 1, local_ranks)
        yield with_world(run_file, stage, world), node
    except BaseException as error:
        translated = translate(error)
        local_ranks.end(translated.exit_code if isinstance(translated, MedjobError) else 1)
        raise
    local_ranks.end(0)


def world_of(stage: str, nodes: int, environment: Mapping[str, str] = os.environ) -> World:
    """Read RANK, WORLD_SIZE and LOCAL_RANK, and LOCAL_WORLD_SIZE if the launcher sets it.

    Args:
        nodes: Gives the processes per node if LOCAL_WORLD_SIZE is not set.

    Raises:
        ConfigError: a variable is missing, or the variables contradict each other.
    """
    rank, world_size, local_rank = (
        _number(stage, name, environment) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    size = environment.get("LOCAL_WORLD_SIZE")
    if size is None and world_size % nodes:
        raise ConfigError(
            f"WORLD_SIZE must be a multiple of resources.{stage}.nodes, which is {nodes} "
            f"(got {world_size})",
            "start the same number of processes on every node",
        )
    local = world_size // nodes if size is None else _number(stage, "LOCAL_WORLD_SIZE", environment)
    if not local or world_size % local or not rank < world_size or local_rank != rank % local:
        raise ConfigError(
            f"RANK={rank} and LOCAL_RANK={local_rank} do not fit WORLD_SIZE={world_size} with "
            f"{local} processes per node: ranks must be consecutive on every node",
            f"set LOCAL_WORLD_SIZE to the number of processes per node, or resources.{stage}.nodes",
        )
    return World(rank, world_size, local_rank, local, rank // local, world_size // local)


def _number(stage: str, name: str, environment: Mapping[str, str]) -> int:
    value = environment.get(name)
    if value is None:
        raise ConfigError(
            f"resources.{stage}.launcher is external, but {name} is not set",
            f"start it with a launcher, such as torchrun --nproc-per-node 2 -m medjob {stage} ..., "
            f"or use --set resources.{stage}.launcher=medjob",
        )
    if not _NUMBER.fullmatch(value):
        raise ConfigError(f"{name} must be a number from 0 to 99999 (got {value[:100]!r})")
    return int(value)


def _master(world: World) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT. One node needs neither."""
    address = os.environ.get("MASTER_ADDR")
    if not address and world.nodes > 1:
        raise ConfigError(
            f"there are {world.nodes} nodes, but MASTER_ADDR is not set",
            "set it to the host name of the node with rank 0",
        )
    port = os.environ.get("MASTER_PORT", str(PORT))
    if not _NUMBER.fullmatch(port) or not 0 < int(port) < 65534:
        raise ConfigError(
            "MASTER_PORT must be 1 to 65533, because the next two ports are used as well "
            f"(got {port[:100]!r})"
        )
    return checked_host(address or "127.0.0.1"), int(port)


def with_world(run_file: RunFile, stage: str, world: World) -> RunFile:
    """Return the run file with the launcher's numbers of nodes and processes in `resources`.

    Raises:
        ConfigError: the batch size is not a multiple of the number of processes.
    """
    tree = run_file.model_dump(mode="json", by_alias=True)
    resources = tree["resources"][stage]
    gpus = resources["gpus"] if world.local_world_size == 1 else world.local_world_size
    resources |= {"nodes": world.nodes, "gpus": min(gpus, world.local_world_size)}
    return validate(tree)


class LocalRanks:
    """The processes of this node that a launcher has started, except for the one that leads it."""

    def __init__(self, path: Path, count: int) -> None:
        """`count` is the number of processes of this node, with this one."""
        self._path = path
        self._count = count
        self._connections: dict[int, socket.socket] = {}
        self._server = _listen(path)

    def connect(self, timeout_s: float = RENDEZVOUS_TIMEOUT_S) -> Mapping[int, socket.socket]:
        """Wait for all processes. Return their connections by local rank.

        Raises:
            RetryError: a process has not connected in time.
        """
        deadline = time.monotonic() + timeout_s
        while missing := sorted(set(range(1, self._count)) - set(self._connections)):
            left = deadline - time.monotonic()
            if left <= 0:
                raise RetryError(
                    f"the processes with local ranks {missing} did not connect to {self._path} "
                    f"within {timeout_s:.0f} s",
                    "start all processes of a node with the same run file, user and TMPDIR",
                )
            self._server.settimeout(left)
            with contextlib.suppress(TimeoutError):
                self._admit(self._server.accept()[0])
        return self._connections

    def _admit(self, connection: socket.socket) -> None:
        rank = (receive(connection, _JOIN_TIMEOUT_S) or {}).get("local_rank")
        connection.settimeout(None)
        if isinstance(rank, int) and 0 < rank < self._count and rank not in self._connections:
            self._connections[rank] = connection
        else:
            connection.close()

    def end(self, code: int) -> None:
        """End all processes with this exit code."""
        with contextlib.suppress(RetryError, OSError):
            self.connect(_LATE_RANKS_S)
        self._path.unlink(missing_ok=True)
        self._server.close()
        for connection in self._connections.values():
            send(connection, {"event": "end", "code": code})


def _socket_path(name: str) -> Path:
    """The address of a node's parent, in a folder that only this user can use.

    Raises:
        ConfigError: the folder belongs to another user, or is not private.
    """
    folder = Path(tempfile.gettempdir()) / f"medjob-{os.getuid()}"
    path = folder / name[:16]
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise ConfigError(
            f"the path of a socket must have at most {_MAX_PATH_BYTES} bytes (got {path})",
            "set TMPDIR to a shorter path, such as /tmp",
        )
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(
            f"{folder} is not a folder that only this user can use",
            "remove it, or set TMPDIR to another folder",
        )
    return path


def _listen(path: Path) -> socket.socket:
    """Listen on a Unix socket. One that an earlier process left is replaced.

    Raises:
        RetryError: another process listens there.
    """
    server = socket.socket(socket.AF_UNIX)
    try:
        server.bind(str(path))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        if _connect(path):
            raise RetryError(
                f"another process with local rank 0 uses {path}",
                "wait until the earlier training of this run has ended",
            ) from None
        path.unlink(missing_ok=True)
        server.bind(str(path))
    server.listen()
    return server


def _connect(path: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        return None
    return connection


def become_rank(world: World, path: Path) -> NoReturn:
    """Wait for the specification from local rank 0, and become a training process.

    The process keeps its id, so that the launcher still waits for it. `LocalRanks.end` decides on
    its exit code.

    Raises:
        RetryError: local rank 0 is not there, or has ended.
    """
    connection = _join(world, path)
    message = receive(connection, None)
    if message is None:
        raise RetryError("the process with local rank 0 of this node has ended", "see its log")
    if message["event"] == "end":
        sys.exit(message["code"])
    spec = Spec.load(Path(message["spec"]).read_text())
    # Until the program has its handler, a stop request is kept. The parent handles Ctrl-C.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    connection.set_inheritable(True)
    connection.settimeout(None)
    os.dup2(2, 1)  # libraries print to stdout, which medjob reserves for data
    command = ranks.command(connection.fileno(), message["spec"])
    os.execve(command[0], command, ranks.environment(spec))


def _join(world: World, path: Path) -> socket.socket:
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT_S
    while time.monotonic() < deadline:
        connection = _connect(path)
        if connection and send(connection, {"local_rank": world.local_rank}):
            return connection
        time.sleep(0.1)
    raise RetryError(
        f"the process with local rank 0 of this node did not open {path} within "
        f"{RENDEZVOUS_TIMEOUT_S:.0f} s",
        "start all processes of a node with the same run file, user and TMPDIR",
    )
