"""Checkpoints of an unfinished training stage, kept in the store under the epoch that wrote them.

checkpoints/step-00001200-3/<files>       epoch 3's state after step 1200
checkpoints/step-00001200-3/MANIFEST.json  create-only, written last: without it the folder is torn
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

from medjob.artifact import Attempt, File, canonical_json, describe_file, describe_folder, digest_of, safe_path
from medjob.errors import InputError

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8})-(\d+)$")
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one artifact, as one attempt sees and writes them."""

    def __init__(self, attempt: Attempt, keep: int) -> None:
        self._attempt = attempt
        self._artifact = attempt.artifact
        self._keep = keep

    def save(self, step: int, folder: Path, best_step: int | None = None) -> None:
        """Store `folder` as the state after `step`; then drop old ones, but never the best.

        Raises:
            SupersededError: a newer attempt has taken over.
        """
        self._attempt.check()
        name = f"step-{step:08d}-{self._attempt.epoch}"
        store = self._artifact.store
        files = describe_folder(folder)
        for file in files:
            store.upload(folder / file.path, self._artifact.path("checkpoints", name, file.path))
        manifest = {"step": step, "digest": digest_of(files), "files": [file.model_dump() for file in files]}
        store.create(self._artifact.path("checkpoints", name, MANIFEST), canonical_json(manifest).encode())
        self._retire(keep_steps={best_step} if best_step is not None else set())

    def restore(self, folder: Path) -> int | None:
        """Place every verified checkpoint below `folder` as `checkpoint-<step>`; the newest one's step, None if there is none.

        All of them, since the best one may be an older one. A torn or damaged one is passed over with a warning.
        A store that cannot be read raises: it must never look like "start at step 0".
        """
        steps: dict[int, str] = {}
        for name in sorted(self._names(), key=_order):  # of one step the newest epoch's stands
            target, fetched = folder / f"checkpoint-{_order(name)[0]}", folder / name
            try:
                self._fetch(name, fetched)
            except InputError as error:
                shutil.rmtree(fetched, ignore_errors=True)
                _log.warning("checkpoint %s is passed over: %s", name, error.message)
                continue
            shutil.rmtree(target, ignore_errors=True)
            fetched.rename(target)
            steps[_order(name)[0]] = name
        return max(steps, default=None)

    def _names(self, finished: bool = False) -> list[str]:
        prefix = self._artifact.path("checkpoints", "")
        paths = [entry.key.removeprefix(prefix).split("/") for entry in self._artifact.store.list(prefix)]
        return [name for name in {p[0] for p in paths if not finished or p[-1] == MANIFEST} if _NAME.match(name)]

    def _fetch(self, name: str, target: Path) -> None:
        store, path = self._artifact.store, self._artifact.path("checkpoints", name)
        blob = store.get(f"{path}/{MANIFEST}")
        if blob is None:
            raise InputError("it was never finished")
        files = _files_of(blob.data)
        shutil.rmtree(target, ignore_errors=True)
        for file in files:
            local = target / safe_path(file.path)
            store.download(f"{path}/{file.path}", local)
            if describe_file(local, file.path) != file:
                raise InputError(f"{file.path} is damaged")
            _own_copy(local)

    def _retire(self, keep_steps: set[int]) -> None:
        finished = sorted(self._names(finished=True), key=_order)
        for name in finished[: -self._keep]:
            if _order(name)[0] not in keep_steps:
                prefix = self._artifact.path("checkpoints", name, "")
                self._artifact.store.delete(prefix + MANIFEST)  # first: what is half deleted is torn, never damaged
                for entry in self._artifact.store.list(prefix):
                    self._artifact.store.delete(entry.key)


def _files_of(data: bytes) -> list[File]:
    try:
        manifest = json.loads(data)
        files = [File.model_validate(file) for file in manifest["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"its manifest is damaged ({type(error).__name__})") from None
    if digest_of(files) != manifest.get("digest"):
        raise InputError("its manifest is damaged")
    return files


def _own_copy(path: Path) -> None:
    """Part `path` from the store's file that it may be a hard link of: the trainer rewrites files in place."""
    copy = path.with_name(path.name + ".copy")
    shutil.copyfile(path, copy)
    copy.replace(path)


def _order(name: str) -> tuple[int, int]:
    match = _NAME.match(name)
    assert match, name
    return int(match[1]), int(match[2])
