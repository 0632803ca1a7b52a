"""Files between a disk and a store: many at once, in parts, and verified while the bytes pass.

Up: each part carries its crc32c, which the store compares; the whole file's crc32c is compared once more at the end, and
its sha256 goes into the manifest. Down: bytes land under a temporary name, in order, so that the name's length is where an
interrupted download goes on, and are renamed only when size, crc32c and sha256 are those of the manifest.

Memory: at most `BUFFERS` parts of 8 MiB (128 MiB) are held at once, however many files and threads there are.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from tqdm import tqdm

from medjob.errors import InputError, RetryError
from medjob.files import Checksums, File, describe_file, files_below, safe_path
from medjob.store.base import PART, Store, UploadLost

T = TypeVar("T")
R = TypeVar("R")
BUFFERS = 16
_FILES, _PARTS = (
    8,
    min(32, max(8, 2 * (os.cpu_count() or 1))),
)  # threads; more than 8 only steal the interpreter from one another on 2 cores
_TELL_BYTES = 64 << 20  # smaller transfers are over before a bar can be read
PARTIAL = ".partial-"
_log = logging.getLogger(__name__)


def upload_folder(store: Store, folder: Path, prefix: str) -> list[File]:
    """Store every file below `folder` under `prefix`; their descriptions, sorted by path."""
    found = list(files_below(folder))
    with _Transfer(store, "up", sum(path.stat().st_size for _, path in found)) as transfer:
        return transfer.each(lambda item: transfer.upload(item[1], item[0], f"{prefix}/{item[0]}"), found)


def download_files(store: Store, prefix: str, files: Sequence[File], folder: Path) -> None:
    """Place `files`, which stand below `prefix`, in `folder`; what is there already and verifies is left.

    Raises:
        InputError: one is missing, or is damaged; the message names it.
    """
    with _Transfer(store, "down", sum(file.size for file in files)) as transfer:
        transfer.each(lambda file: transfer.download(f"{prefix}/{file.path}", file, folder / safe_path(file.path)), files)


def find_damage(store: Store, prefix: str, files: Sequence[File]) -> list[str]:
    """Read every byte of `files` below `prefix`, keeping none; a line for each that is missing or damaged."""
    with _Transfer(store, "verify", sum(file.size for file in files)) as transfer:
        return [problem for problem in transfer.each(lambda file: transfer.problem(f"{prefix}/{file.path}", file), files) if problem]


class _StoppedError(Exception):
    """Another file of the batch has failed."""


class _Transfer:
    """One batch of files on its way."""

    def __init__(self, store: Store, what: str, total: int) -> None:
        self._store, self._what, self._total = store, what, total
        self._files = ThreadPoolExecutor(_FILES, f"{what}-file")
        self._parts = ThreadPoolExecutor(_PARTS, f"{what}-part")
        self._buffers = threading.BoundedSemaphore(BUFFERS)
        self._stop = threading.Event()
        shown = sys.stderr.isatty() and total >= _TELL_BYTES
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=not shown, leave=False)
        self._began = time.monotonic()

    def __enter__(self) -> _Transfer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._files.shutdown(cancel_futures=True)
        self._parts.shutdown(cancel_futures=True)
        self._bar.close()
        seconds = time.monotonic() - self._began
        if kind is None and self._total >= _TELL_BYTES:
            _log.info("%s: %.0f MB in %.1f s, %.0f MB/s", self._what, self._total / 1e6, seconds, self._total / 1e6 / max(seconds, 1e-9))

    def each(self, call: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results in order; the first error ends the batch."""
        return list(self._files.map(call, items))

    def upload(self, path: Path, name: str, key: str) -> File:
        """Store one file."""
        for last in (False, True):
            try:
                return self._upload(path, name, key)
            except UploadLost as error:
                if last:
                    raise RetryError(f"{error}", "the same command goes on from here") from None
        raise AssertionError

    def _upload(self, path: Path, name: str, key: str) -> File:
        sums, size = Checksums(), path.stat().st_size
        if size <= PART:
            with self._buffers:
                data = path.read_bytes()
                sums.update(data)
                self._store.put(key, data)
            self._bar.update(size)
            return sums.file(name)
        upload = self._store.upload(key, size)
        sent: deque[Future[None]] = deque()
        with path.open("rb") as file:
            for offset, data in self._blocks(file, upload.part_size):
                sums.update(data)
                while sent and (upload.in_order or sent[0].done()):
                    sent.popleft().result()
                sent.append(self._parts.submit(self._send, upload.send, offset, data))
        for future in sent:
            future.result()
        if sums.size != size:
            raise RetryError(f"{path}: has changed while it was stored", "the same command goes on from here")
        described = sums.file(name)
        upload.finish(described.crc32c)
        return described

    def _blocks(self, file: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
        offset = 0
        while True:
            self._buffers.acquire()
            if self._stop.is_set():
                self._buffers.release()
                raise _StoppedError
            data = file.read(size)
            if not data:
                self._buffers.release()
                return
            yield offset, data
            offset += len(data)

    def _send(self, send: Callable[[int, bytes], None], offset: int, data: bytes) -> None:
        try:
            send(offset, data)
            self._bar.update(len(data))
        finally:
            self._buffers.release()

    def download(self, key: str, file: File, target: Path) -> None:
        """Place one file."""
        if target.is_file() and target.stat().st_size == file.size and describe_file(target, file.path) == file:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(PARTIAL + target.name)
        for last in (False, True):  # what was damaged on its way comes whole the second time
            found = self._linked(key, file, partial) or self._fetched(key, file, partial)
            if found == file:
                partial.replace(target)
                return
            partial.unlink()
            if last:
                raise InputError(_damage(f"{self._store.uri}/{key}", found, file))

    def problem(self, key: str, file: File) -> str | None:
        """What is wrong with a file in the store, if anything is."""
        try:
            for _ in range(2):
                found = self._described(key, file)
                if found == file:
                    return None
        except InputError as error:
            return error.message
        return _damage(f"{self._store.uri}/{key}", found, file)

    def _described(self, key: str, file: File) -> File:
        path = self._store.local_path(key)
        if path is not None:
            if not path.is_file():
                raise InputError(f"{self._store.uri}/{key}: is not there")
            self._bar.update(file.size)
            return describe_file(path, file.path)
        sums = Checksums()
        for data in self._ranges(key, 0, file.size):
            sums.update(data)
        return sums.file(file.path)

    def _linked(self, key: str, file: File, partial: Path) -> File | None:
        source = self._store.local_path(key)
        if source is None:
            return None
        if not source.is_file():
            raise InputError(f"{self._store.uri}/{key}: is not there")
        _link_or_copy(source, partial)
        self._bar.update(file.size)
        return describe_file(partial, file.path)

    def _fetched(self, key: str, file: File, partial: Path) -> File:
        sums = Checksums()
        with partial.open("a+b") as out:
            out.seek(0)
            while block := out.read(1 << 20):  # what an interrupted download has left
                sums.update(block)
            for data in self._ranges(key, sums.size, file.size):
                sums.update(data)
                out.write(data)
        return sums.file(file.path)

    def _ranges(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """The object's bytes from `start` on, in order; the ranges ahead are under way meanwhile."""
        ahead: deque[Future[bytes]] = deque()
        try:
            while start < end or ahead:
                if self._stop.is_set():
                    raise _StoppedError
                # To wait for a buffer while holding finished ones would be a deadlock.
                while start < end and self._buffers.acquire(blocking=not ahead):
                    length = min(PART, end - start)
                    ahead.append(self._parts.submit(self._store.read, key, start, length))
                    start += length
                data = ahead[0].result()
                yield data
                self._bar.update(len(data))
                ahead.popleft()
                self._buffers.release()
        finally:
            for future in ahead:
                future.cancel()
                self._buffers.release()


def _damage(where: str, found: File, expected: File) -> str:
    return (
        f"{where}: is damaged (sha256 {found.sha256[:12]}, {found.size} bytes; published as {expected.sha256[:12]}, {expected.size} bytes)"
    )


def _link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the disk cannot link."""
    target.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
