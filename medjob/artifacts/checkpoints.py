"""Checkpoints of an unfinished training stage, kept in the store under the epoch that wrote them.

checkpoints/step-00001200-3/part-0/<files>   node 0's files of epoch 3's state after step 1200
checkpoints/step-00001200-3/part-0.json      their sizes and checksums
checkpoints/step-00001200-3/MANIFEST.json    names all parts; create-only, written last: without it the checkpoint is torn
checkpoints/step-00001200-3/DAMAGED.json     quarantine: a reader found damage; nobody takes it again, `medjob gc` removes it
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, Literal

from medjob.artifacts.artifact import Artifact, Attempt
from medjob.errors import InputError, RetryError
from medjob.runtime.files import (
    File,
    canonical_json,
    files_below,
    fingerprint,
    link_or_copy,
    own_copy,
)
from medjob.store.transfer import download_files, upload_folder

MANIFEST, DAMAGED = "MANIFEST.json", "DAMAGED.json"
PEERS_S = 600.0  # how long node 0 waits for the other nodes' parts
_NAME = re.compile(r"step-(\d{8})-(\d+)$")
State = Literal["finished", "torn", "damaged"]
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one artifact, as one node of one attempt sees and writes them.

    `save` takes a snapshot by hard links and goes on; the bytes travel in the background. At most one checkpoint is on
    its way: the next `save` waits for it, so that a slow store slows training down instead of filling the disk.
    """

    def __init__(
        self, attempt: Attempt, keep: int, snapshots: Path, node: int = 0, nodes: int = 1
    ) -> None:
        self._attempt, self._artifact, self._keep = attempt, attempt.artifact, keep
        self._snapshots, self._node, self._nodes = snapshots, node, nodes
        self._under_way: Future[None] | None = None
        self.newest_step: int | None = None
        """Step of the newest checkpoint in the store."""
        self.seconds: float | None = None
        """How long the last one took to be stored."""

    @property
    def under_way(self) -> bool:
        """Whether one is being stored."""
        return self._under_way is not None and not self._under_way.done()

    def save(self, step: int, folder: Path, best_step: int | None = None) -> None:
        """Begin to store `folder` as the state after `step`; older ones are dropped once it is stored, but never the best.

        Raises:
            SupersededError: a newer attempt has taken over.
        """
        try:
            self.wait()
        except RetryError as error:
            _log.warning(
                "an earlier checkpoint was not stored, training goes on: %s", error.message
            )
        snapshot = self._snapshots / f"step-{step:08d}"
        _link_tree(folder, snapshot)
        self._under_way = Future()
        threading.Thread(
            target=self._settle,
            args=(self._under_way, step, snapshot, best_step),
            daemon=True,
            name="checkpoint",
        ).start()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until what was saved is stored.

        Raises:
            SupersededError: a newer attempt has taken over.
            RetryError: the store is away, or a node has stored nothing.
            TimeoutError: it is not stored after `timeout` seconds.
        """
        if self._under_way is not None:
            wait([self._under_way], timeout)
            if not self._under_way.done():
                raise TimeoutError
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def check(self) -> None:
        """Raise what has gone wrong in the background, without waiting for what goes well."""
        if self._under_way is not None and self._under_way.done():
            error = self._under_way.exception()
            if error is not None and not isinstance(
                error, RetryError
            ):  # the next save may find the store again
                raise error

    def restore(self, folder: Path) -> int | None:
        """Place every verified checkpoint below `folder` as `checkpoint-<step>`; the newest one's step, None if there is none.

        All of them, since the best one may be an older one, and all nodes' parts, since this node's disk may be new.
        A torn one is passed over; a damaged one too, and is marked so that nobody fetches it again.

        Raises:
            RetryError: the store cannot be read. That must never look like "start at step 0".
        """
        steps: list[int] = []
        for name, state in sorted(states(self._artifact).items(), key=lambda item: order(item[0])):
            step, fetched = order(name)[0], folder / name  # of one step the newest epoch's stands
            if state != "finished":
                _log.warning("checkpoint %s is passed over: it is %s", name, state)
                continue
            shutil.rmtree(fetched, ignore_errors=True)
            try:
                fetch(self._artifact, name, fetched)
            except InputError as error:
                _log.warning("checkpoint %s is passed over: %s", name, error.message)
                shutil.rmtree(fetched, ignore_errors=True)
                continue
            shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
            fetched.rename(folder / f"checkpoint-{step}")
            steps.append(step)
        self.newest_step = max(steps, default=None)
        return self.newest_step

    def _settle(
        self, future: Future[None], step: int, snapshot: Path, best_step: int | None
    ) -> None:
        """Store, in a thread that does not outlive the process: an executor's would, for as long as a lost node is waited for."""
        try:
            self._store(step, snapshot, best_step)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _store(self, step: int, snapshot: Path, best_step: int | None) -> None:
        began = time.monotonic()
        self._attempt.check()
        name = f"step-{step:08d}-{self._attempt.epoch}"
        place = self._artifact.path("checkpoints", name)
        store = self._artifact.store
        try:
            files = upload_folder(store, snapshot, f"{place}/part-{self._node}")
        finally:
            shutil.rmtree(snapshot)
        part = [file.model_dump() for file in files]
        store.create(f"{place}/part-{self._node}.json", canonical_json({"files": part}).encode())
        self.seconds = time.monotonic() - began
        if self._node:
            self.newest_step = (
                step  # as far as this node can tell; the manifest is node 0's to write
            )
            return
        parts = [part, *(self._part_of(place, node) for node in range(1, self._nodes))]
        manifest = {"step": step, "parts": parts}
        store.create(
            f"{place}/{MANIFEST}",
            canonical_json(manifest | {"seal": fingerprint(manifest)}).encode(),
        )
        self._attempt.point_to(name)
        self.newest_step, self.seconds = step, time.monotonic() - began
        self._retire(keep_steps={best_step} if best_step is not None else set())

    def _part_of(self, place: str, node: int) -> Any:
        deadline = time.monotonic() + PEERS_S
        while time.monotonic() < deadline:
            blob = self._artifact.store.get(f"{place}/part-{node}.json")
            if blob is not None:
                return json.loads(blob.data)["files"]
            time.sleep(0.2)
        raise RetryError(f"{place}: node {node} has stored nothing for {PEERS_S:.0f} s")

    def _retire(self, keep_steps: set[int]) -> None:
        finished = [name for name, state in states(self._artifact).items() if state == "finished"]
        for name in sorted(finished, key=order)[: -self._keep]:
            if order(name)[0] not in keep_steps:
                drop(self._artifact, name)


def states(artifact: Artifact) -> dict[str, State]:
    """Every checkpoint by name, and what is known of it."""
    prefix = artifact.path("checkpoints", "")
    found: dict[str, State] = {}
    for entry in artifact.store.list(prefix):
        name, _, rest = entry.key.removeprefix(prefix).partition("/")
        if _NAME.match(name):
            state = found.setdefault(name, "torn")
            if rest == DAMAGED or (rest == MANIFEST and state == "torn"):
                found[name] = "damaged" if rest == DAMAGED else "finished"
    return found


def order(name: str) -> tuple[int, int]:
    """Step and epoch of a checkpoint."""
    match = _NAME.match(name)
    assert match, name
    return int(match[1]), int(match[2])


def fetch(artifact: Artifact, name: str, folder: Path) -> None:
    """Place the files of all parts in `folder`, every byte verified; of two with one name, the lower node's.

    Raises:
        InputError: it is damaged; it has been marked as such.
    """
    place = artifact.path("checkpoints", name)
    try:
        for number, files in reversed(list(enumerate(read_manifest(artifact, name)))):
            download_files(artifact.store, f"{place}/part-{number}", files, folder)
    except InputError as error:
        artifact.store.put(f"{place}/{DAMAGED}", canonical_json({"reason": error.message}).encode())
        raise
    for _, path in files_below(folder):
        own_copy(path)  # the trainer rewrites files in place


def read_manifest(artifact: Artifact, name: str) -> list[list[File]]:
    """The files of each part. Raises InputError if the manifest is damaged."""
    blob = artifact.store.get(artifact.path("checkpoints", name, MANIFEST))
    try:
        manifest: dict[str, Any] = json.loads(blob.data) if blob else {}
        if manifest.pop("seal") != fingerprint(manifest):
            raise ValueError("its seal does not match")
        return [[File.model_validate(file) for file in part] for part in manifest["parts"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{artifact.store.uri}/{artifact.path('checkpoints', name, MANIFEST)}: is damaged"
        ) from None


def drop(artifact: Artifact, name: str) -> None:
    """Remove a checkpoint. Its manifest goes first: what is half removed is torn, never damaged."""
    prefix = artifact.path("checkpoints", name, "")
    artifact.store.delete(prefix + MANIFEST)
    for entry in artifact.store.list(prefix):
        artifact.store.delete(entry.key)


def _link_tree(source: Path, target: Path) -> None:
    """Make `target` hold the same files."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(
        source, target, copy_function=lambda one, other: link_or_copy(Path(one), Path(other))
    )
