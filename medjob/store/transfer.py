"""Files between a disk and a store: many at once, in parts, and verified while the bytes pass.

Up: each part carries its crc32c, which the store compares; the whole file's crc32c is compared once more at the end, and
its sha256 goes into the manifest. Down: bytes land under a temporary name, in order, so that the name's length is where an
interrupted download goes on, and are renamed only when size and sha256 are those of the manifest.

Memory: at most `BUFFERS` parts of 8 MiB are held at once, however many and large the files are: 64 MiB on a machine of
up to 4 cores, 256 MiB on one of 16 or more.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO, TypeVar

from tqdm import tqdm

from medjob.errors import ConfigError, InputError, RetryError
from medjob.runtime.files import (
    Checksums,
    File,
    describe_file,
    files_below,
    link_or_copy,
    safe_path,
)
from medjob.store.base import PART, Store, UploadLost

T = TypeVar("T")
R = TypeVar("R")
Seen = tuple[int, str]  # size and sha256: what identifies a file
THREADS = min(
    32, max(8, 2 * (os.cpu_count() or 1))
)  # of files, and of parts; more only steal the interpreter from one another
BUFFERS = THREADS
_TELL_BYTES = 64 << 20  # smaller transfers are over before a bar can be read
PARTIAL = ".partial-"
_log = logging.getLogger(__name__)


def upload_folder(store: Store, folder: Path, prefix: str) -> list[File]:
    """Store every file below `folder` under `prefix`; their descriptions, sorted by path."""
    found = list(files_below(folder))
    with Transfer(store, "up", sum(path.stat().st_size for _, path in found)) as transfer:
        return transfer.each(
            lambda item: transfer.upload(item[1], item[0], f"{prefix}/{item[0]}"), found
        )


def download_files(store: Store, prefix: str, files: Sequence[File], folder: Path) -> None:
    """Place `files`, which stand below `prefix`, in `folder`; what is there already and verifies is left.

    Raises:
        InputError: one is missing, or is damaged; the message names it.
    """
    with Transfer(store, "down", sum(file.size for file in files)) as transfer:
        transfer.each(
            lambda file: transfer.download(
                f"{prefix}/{file.path}", file, folder / safe_path(file.path)
            ),
            files,
        )


def find_damage(store: Store, prefix: str, files: Sequence[File]) -> list[str]:
    """Read every byte of `files` below `prefix`, keeping none; a line for each that is missing or damaged."""
    with Transfer(store, "verify", sum(file.size for file in files)) as transfer:
        return [
            problem
            for problem in transfer.each(
                lambda file: transfer.problem(f"{prefix}/{file.path}", file), files
            )
            if problem
        ]


class _StoppedError(Exception):
    """Another file of the batch has failed."""


class Transfer:
    """One batch of files on its way."""

    def __init__(self, store: Store, what: str, total: int) -> None:
        self._store, self._what, self._total = store, what, total
        self._files = ThreadPoolExecutor(THREADS, f"{what}-file")
        self._parts = ThreadPoolExecutor(THREADS, f"{what}-part")
        self._buffers = threading.BoundedSemaphore(BUFFERS)
        self._free: list[
            bytearray
        ] = []  # the last one used is the next: memory that is new costs more than the transfer
        self._stop = threading.Event()
        shown = sys.stderr.isatty() and total >= _TELL_BYTES
        self._bar = tqdm(
            total=total, unit="B", unit_scale=True, desc=what, disable=not shown, leave=False
        )
        self._began = time.monotonic()

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._files.shutdown(cancel_futures=True)
        self._parts.shutdown(cancel_futures=True)
        self._bar.close()
        if kind is None and self._total >= _TELL_BYTES:
            _log.info(
                "%s: %.0f MB in %.1f s",
                self._what,
                self._total / 1e6,
                time.monotonic() - self._began,
            )

    def each(self, call: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results in order; the first error ends the batch."""
        futures = [self._files.submit(call, item) for item in items]
        for future in as_completed(futures):
            if future.exception() is not None:
                self._stop.set()
                future.result()
        return [future.result() for future in futures]

    def upload(self, path: Path, name: str, key: str) -> File:
        """Store one file."""
        try:
            return self._upload(path, name, key)
        except UploadLost as error:
            _log.warning("%s; it is sent again", error)
        try:
            return self._upload(path, name, key)
        except UploadLost as error:
            raise RetryError(f"{error}", "the same command goes on from here") from None

    def _upload(self, path: Path, name: str, key: str) -> File:
        sums, size = Checksums(), path.stat().st_size
        if size <= PART:
            with self._buffers:
                sums.update(data := path.read_bytes())
                self._store.put(key, data)
            self._bar.update(size)
            return sums.file(name)
        upload = self._store.upload(key, size)
        sent: deque[Future[None]] = deque()
        with path.open("rb") as file:
            for offset, data in self._blocks(file, upload.part_size):
                try:
                    sums.update(data)
                    while sent and (upload.in_order or sent[0].done()):
                        sent.popleft().result()
                except BaseException:
                    self._buffers.release()
                    raise
                sent.append(self._parts.submit(self._send, upload.send, offset, data))
        for future in sent:
            future.result()
        if sums.size != size:
            raise RetryError(
                f"{path}: has changed while it was stored", "the same command goes on from here"
            )
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
        if (
            target.is_file()
            and target.stat().st_size == file.size
            and describe_file(target, file.path) == file
        ):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(PARTIAL + target.name)
        for last in (False, True):  # what was damaged on its way comes whole the second time
            found = self._linked(key, file, partial) or self._fetched(key, file, partial)
            if found == (file.size, file.sha256):
                partial.replace(target)
                return
            partial.unlink()
            if last:
                raise InputError(_damage(f"{self._store.uri}/{key}", found, file))

    def problem(self, key: str, file: File) -> str | None:
        """What is wrong with a file in the store, if anything is."""
        try:
            for _ in range(2):
                found = self._seen(key, file)
                if found == (file.size, file.sha256):
                    return None
        except InputError as error:
            return error.message
        return _damage(f"{self._store.uri}/{key}", found, file)

    def _seen(self, key: str, file: File) -> Seen:
        path = self._on_disk(key)
        if path is not None:
            self._bar.update(file.size)
            return _seen_on_disk(path)
        sha256 = hashlib.sha256()
        for data in self.ranges(key, 0, file.size):
            sha256.update(data)
        return file.size, sha256.hexdigest()

    def _on_disk(self, key: str) -> Path | None:
        path = self._store.local_path(key)
        if path is not None and not path.is_file():
            raise InputError(f"{self._store.uri}/{key}: is not there")
        return path

    def _linked(self, key: str, file: File, partial: Path) -> Seen | None:
        source = self._on_disk(key)
        if source is None:
            return None
        link_or_copy(source, partial)
        self._bar.update(file.size)
        return _seen_on_disk(partial)

    def _fetched(self, key: str, file: File, partial: Path) -> Seen:
        sha256, size = hashlib.sha256(), 0
        with partial.open("a+b", buffering=0) as out:
            _lock(out, partial)
            out.seek(0)
            while block := out.read(1 << 20):  # what an interrupted download has left
                sha256.update(block)
                size += len(block)
            for data in self.ranges(key, size, file.size):
                sha256.update(data)
                _write(out, data)
                size += len(data)
        return size, sha256.hexdigest()

    def ranges(self, key: str, start: int, end: int) -> Iterator[memoryview]:
        """The object's bytes from `start` on, in order, each piece until the next is asked for; those ahead are under way."""
        if end == 0 and self._store.get(key) is None:
            raise InputError(f"{self._store.uri}/{key}: is not there")
        if 0 < end - start <= PART and (buffer := self._take(wait=True)) is not None:
            view = memoryview(buffer)[: end - start]
            try:
                self._store.read(key, start, view)
                yield view
                self._bar.update(len(view))
            finally:
                self._give(buffer)
            return
        ahead: deque[tuple[Future[None], bytearray, int]] = deque()
        try:
            while start < end or ahead:
                # To wait for a buffer while holding others would be a deadlock.
                while start < end and (buffer := self._take(wait=not ahead)) is not None:
                    length = min(PART, end - start)
                    ahead.append(
                        (
                            self._parts.submit(
                                self._store.read, key, start, memoryview(buffer)[:length]
                            ),
                            buffer,
                            length,
                        )
                    )
                    start += length
                future, buffer, length = ahead[0]
                future.result()
                yield memoryview(buffer)[:length]
                self._bar.update(length)
                ahead.popleft()
                self._give(buffer)
        finally:
            for future, buffer, _ in ahead:
                if not future.cancel():
                    future.exception()  # it writes to the buffer until it ends
                self._give(buffer)

    def _take(self, wait: bool) -> bytearray | None:
        if not self._buffers.acquire(blocking=wait):
            return None
        if self._stop.is_set():
            self._buffers.release()
            raise _StoppedError
        return self._free.pop() if self._free else bytearray(PART)

    def _give(self, buffer: bytearray) -> None:
        self._free.append(buffer)
        self._buffers.release()


def _seen_on_disk(path: Path) -> Seen:
    found = describe_file(path, path.name)
    return found.size, found.sha256


def _lock(out: io.FileIO, partial: Path) -> None:
    """Keep a second process from writing to the same file."""
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{partial}: another process downloads to it", "wait for it, or name another folder"
        ) from None


def _write(out: io.FileIO, data: memoryview) -> None:
    while len(data):
        data = data[out.write(data) :]


def _damage(where: str, found: Seen, expected: File) -> str:
    return f"{where}: is damaged (sha256 {found[1][:12]}, {found[0]} bytes; published as {expected.sha256[:12]}, {expected.size} bytes)"
