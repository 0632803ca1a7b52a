"""Checkpoints of an unfinished training stage, stored under the epoch that wrote them.

checkpoints/step-00001200-3/part-0/<files>   files of node 0: epoch 3, after step 1200
checkpoints/step-00001200-3/part-0.json      their sizes and checksums, with a seal
checkpoints/step-00001200-3/MANIFEST.json    lists all parts; create-only, written last. Without it
                                             the checkpoint is torn. Its seal covers the artifact's
                                             key and the checkpoint's name.
checkpoints/step-00001200-3/DAMAGED.json     quarantine: a reader found damage. The checkpoint is
                                             never restored again, and `medjob gc` deletes it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Literal

from medjob.artifacts.artifact import Artifact, Attempt, AttemptLost
from medjob.artifacts.seal import Sealed, SealError
from medjob.errors import InputError, RetryError
from medjob.runtime.files import File, canonical_json
from medjob.store import Conflict
from medjob.store.errors import StoreRefusal
from medjob.store.transfer import download_files, upload_folder

MANIFEST, DAMAGED = "MANIFEST.json", "DAMAGED.json"
PEER_TIMEOUT_S = 600.0  # how long node 0 waits for the parts of other nodes
_NAME = re.compile(r"step-([0-9]{8})-([0-9]{1,9})\Z")
State = Literal["finished", "torn", "damaged"]
_log = logging.getLogger(__name__)


class _Part(Sealed):
    """Content of part-<node>.json.

    It has a seal because node 0 puts the parts of other nodes into the manifest that it seals.
    """

    checkpoint: str
    node: int
    files: list[File]


class _Manifest(Sealed):
    """Content of MANIFEST.json."""

    checkpoint: str
    """Name of the checkpoint, with its step and epoch."""
    parts: list[list[File]]
    """Files of each node."""


class Checkpoints:
    """Saves and restores the checkpoints of one artifact, for one node of one attempt.

    `save` takes a snapshot of hard links and uploads it in the background. At most one upload runs
    at a time. The next `save` waits for it, so a slow store slows down training instead of filling
    the disk.
    """

    def __init__(
        self, attempt: Attempt, keep: int, snapshots: Path, node: int = 0, nodes: int = 1
    ) -> None:
        self._attempt = attempt
        self._artifact = attempt.artifact
        self._keep = keep
        self._snapshots = snapshots
        self._node = node
        self._nodes = nodes
        self._under_way: Future[None] | None = None
        self.newest_step: int | None = None
        """Step of the newest checkpoint in the store."""
        self.seconds: float | None = None
        """Duration of the last upload."""

    @property
    def under_way(self) -> bool:
        """Whether an upload is running."""
        return self._under_way is not None and not self._under_way.done()

    def save(self, step: int, folder: Path, best_step: int | None = None) -> None:
        """Start to upload `folder` as the checkpoint of `step`.

        Once it is stored, older checkpoints are deleted, except the newest `keep` and `best_step`.

        Raises:
            SupersededError: a newer attempt has taken over.
        """
        try:
            self.wait()
        except AttemptLost:
            raise  # no later save can succeed
        except RetryError as error:
            _log.warning(
                "an earlier checkpoint was not stored; training continues: %s", error.message
            )
        snapshot = self._snapshots / f"step-{step:08d}"
        _link_tree(folder, snapshot)
        self._under_way = Future()
        threading.Thread(
            target=self._run_upload,
            args=(self._under_way, step, snapshot, best_step),
            daemon=True,
            name="checkpoint",
        ).start()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the last save is stored.

        Raises:
            SupersededError: a newer attempt has taken over.
            RetryError: the store is unreachable, or another node did not store its part.
            TimeoutError: the upload still runs after `timeout` seconds.
        """
        if self._under_way is not None:
            wait([self._under_way], timeout)
            if not self._under_way.done():
                raise TimeoutError
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def check(self) -> None:
        """Raise the error of a failed upload, without waiting for a running one.

        A RetryError is ignored, because the store may be reachable again at the next save, unless
        the attempt has lost its record in the store.
        """
        if self._under_way is not None and self._under_way.done():
            error = self._under_way.exception()
            if isinstance(error, AttemptLost) or not isinstance(error, RetryError | None):
                raise error

    def restore(self, folder: Path) -> int | None:
        """Download every intact checkpoint to `folder` as `checkpoint-<step>`.

        Return the newest step, or None if there is no checkpoint. All checkpoints are downloaded,
        because the best one may be an older one, and with the parts of all nodes, because this
        node's disk may be new. Torn and damaged checkpoints are skipped, and damaged ones are
        quarantined so that they are not downloaded again.

        Raises:
            RetryError: the store cannot be read. That must never look like "start at step 0".
            SealError: a checkpoint was sealed with another key. Nor must that.
            StoreRefusal: a checkpoint is archived, or its encryption key is disabled. Nor must
                that.
        """
        steps: list[int] = []
        found = sorted(states(self._artifact).items(), key=lambda item: step_and_epoch(item[0]))
        for name, state in found:
            if state != "finished":
                _log.warning("skipping checkpoint %s: it is %s", name, state)
                continue
            partial = folder / name
            shutil.rmtree(partial, ignore_errors=True)
            try:
                download(self._artifact, name, partial)
            except (SealError, StoreRefusal):
                raise
            except InputError as error:
                _log.warning("skipping checkpoint %s: %s", name, error.message)
                shutil.rmtree(partial, ignore_errors=True)
                continue
            # If two epochs stored the same step, the later one replaces the earlier one here.
            step, _ = step_and_epoch(name)
            shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
            partial.rename(folder / f"checkpoint-{step}")
            steps.append(step)
        self.newest_step = max(steps, default=None)
        return self.newest_step

    def _run_upload(
        self, future: Future[None], step: int, snapshot: Path, best_step: int | None
    ) -> None:
        """Upload in a daemon thread, which does not keep the process alive.

        A thread of an executor would, for as long as it waits for a lost node.
        """
        try:
            self._upload(step, snapshot, best_step)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _upload(self, step: int, snapshot: Path, best_step: int | None) -> None:
        started = time.monotonic()
        self._attempt.check()
        name = f"step-{step:08d}-{self._attempt.epoch}"
        part = self._upload_part(name, snapshot)
        self.seconds = time.monotonic() - started
        if self._node > 0:
            # Only node 0 writes the manifest, so this node cannot tell whether it was written.
            self.newest_step = step
            return
        parts = [part, *(self._wait_for_part(name, node) for node in range(1, self._nodes))]
        artifact = self._artifact
        manifest = _Manifest(
            run=artifact.run, stage=artifact.stage, key=artifact.key, checkpoint=name, parts=parts
        )
        self._create(artifact.path("checkpoints", name, MANIFEST), manifest)
        self._attempt.point_to(name)
        self.newest_step = step
        self.seconds = time.monotonic() - started
        self._delete_old(keep_step=best_step)

    def _upload_part(self, name: str, snapshot: Path) -> list[File]:
        """Upload this node's files, delete the snapshot, and return the files' descriptions."""
        artifact = self._artifact
        path = artifact.path("checkpoints", name, f"part-{self._node}")
        try:
            files = upload_folder(artifact.store, snapshot, path)
        finally:
            shutil.rmtree(snapshot)
        part = _Part(
            run=artifact.run,
            stage=artifact.stage,
            key=artifact.key,
            checkpoint=name,
            node=self._node,
            files=files,
        )
        self._create(f"{path}.json", part)
        return files

    def _create(self, key: str, content: Sealed) -> None:
        store = self._artifact.store
        try:
            store.create(key, content.sealed(store).model_dump_json().encode())
        except Conflict:  # the name contains this attempt's epoch
            raise RetryError(f"{store.uri}/{key} was written by somebody else") from None

    def _wait_for_part(self, name: str, node: int) -> list[File]:
        path = self._artifact.path("checkpoints", name)
        deadline = time.monotonic() + PEER_TIMEOUT_S
        while time.monotonic() < deadline:
            part = self._read_part(name, node)
            if part is not None:
                return part.files
            time.sleep(0.2)
        raise RetryError(f"{path}: node {node} stored no part within {PEER_TIMEOUT_S:.0f} s")

    def _read_part(self, name: str, node: int) -> _Part | None:
        file = f"part-{node}.json"
        try:
            part = self._artifact.read_sealed(_Part, "checkpoints", name, file)
        except SealError:
            raise  # no later save can succeed: the nodes have different keys
        except InputError as error:
            raise RetryError(error.message) from None
        if part is not None and (part.checkpoint, part.node) != (name, node):
            raise RetryError(f"{name}/{file} belongs to node {part.node} of {part.checkpoint}")
        return part

    def _delete_old(self, keep_step: int | None) -> None:
        finished = [name for name, state in states(self._artifact).items() if state == "finished"]
        for name in sorted(finished, key=step_and_epoch)[: -self._keep]:
            if step_and_epoch(name)[0] != keep_step:
                delete(self._artifact, name)


def states(artifact: Artifact) -> dict[str, State]:
    """Return the state of every checkpoint by name."""
    prefix = artifact.path("checkpoints", "")
    found: dict[str, State] = {}
    for entry in artifact.store.list(prefix):
        name, _, file = entry.key.removeprefix(prefix).partition("/")
        if not _NAME.match(name):
            continue
        state = found.setdefault(name, "torn")
        if file == DAMAGED:
            found[name] = "damaged"
        elif file == MANIFEST and state == "torn":
            found[name] = "finished"
    return found


def step_and_epoch(name: str) -> tuple[int, int]:
    """Parse step and epoch from a checkpoint's name. They order checkpoints by age."""
    match = _NAME.match(name)
    assert match, name
    return int(match[1]), int(match[2])


def download(artifact: Artifact, name: str, folder: Path) -> None:
    """Download the files of all parts to `folder` and verify every byte.

    If several nodes stored a file of the same name, the file of the lowest node is kept.

    Raises:
        InputError: the checkpoint is damaged, and is now quarantined.
        SealError: it was sealed with another key.
    """
    path = artifact.path("checkpoints", name)
    try:
        for number, files in reversed(list(enumerate(read_manifest(artifact, name)))):
            download_files(artifact.store, f"{path}/part-{number}", files, folder)
    except (SealError, StoreRefusal):
        raise  # with the right key, or once it is readable, it may be intact
    except InputError as error:
        artifact.store.put(f"{path}/{DAMAGED}", canonical_json({"reason": error.message}).encode())
        raise


def read_manifest(artifact: Artifact, name: str) -> list[list[File]]:
    """Return the files of each part.

    Raises:
        InputError: the manifest is damaged, or belongs to another artifact or checkpoint.
    """
    where = f"{artifact.store.uri}/{artifact.path('checkpoints', name, MANIFEST)}"
    manifest = artifact.read_sealed(_Manifest, "checkpoints", name, MANIFEST)
    if manifest is None:
        raise InputError(f"{where} does not exist")
    if manifest.checkpoint != name:
        raise InputError(f"{where} belongs to another checkpoint: {manifest.checkpoint}")
    return manifest.parts


def delete(artifact: Artifact, name: str) -> None:
    """Delete a checkpoint, its manifest first: if interrupted, the rest is torn and not damaged."""
    prefix = artifact.path("checkpoints", name, "")
    artifact.store.delete(prefix + MANIFEST)
    for entry in artifact.store.list(prefix):
        artifact.store.delete(entry.key)


def _link_tree(source: Path, target: Path) -> None:
    """Replace `target` by a copy of `source` made of hard links.

    Both are in the attempt's own folder, and the trainer writes the files of a checkpoint only
    once: the links keep them until they are uploaded, although the trainer's folder is deleted.
    Copies would hold up the training, for minutes if it trains all weights.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the disk has no hard links
        shutil.copyfile(source, target)
