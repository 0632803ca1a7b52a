"""Transfers of files between a disk and a store: concurrent, in parts, verified as the bytes pass.

Uploads: each part carries its crc32c, which the store compares. At the end the store also compares
the crc32c of the whole file. The sha256 of the file goes into the manifest.

Downloads: bytes are appended in order to a temporary file, so its length is the offset at which an
interrupted download resumes. The file is renamed only if its size and sha256 match the manifest.
From a folder it is a copy too, never a hard link: a stage or a user may write to it, and published
files must not change. Where the file system can, the copy shares the disk blocks of the original.

Memory: at most `BUFFERS` parts of 8 MiB are held at once, for any number and size of files.
That is 64 MiB on a machine with up to 4 cores, and 256 MiB on one with 16 or more.
"""

from __future__ import annotations

import contextlib
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
    clone,
    describe_file,
    files_below,
    naming,
    safe_path,
    size_of_regular_file,
)
from medjob.runtime.locks import try_lock
from medjob.store.base import PART_SIZE, Store, UploadLost

T = TypeVar("T")
R = TypeVar("R")
SizeAndHash = tuple[int, str]  # size and sha256, which identify a file's content
# Threads for files, and again for parts. More threads only contend for the GIL.
THREADS = min(32, max(8, 2 * (os.cpu_count() or 1)))
BUFFERS = THREADS
PARTIAL = ".partial-"
_REPORT_MIN_BYTES = 64 << 20  # a smaller transfer ends before anyone can read a progress bar
_RESUME = "run the same command again to resume"
_RESTARTS = 2  # of an upload that the store has lost
_log = logging.getLogger(__name__)


def upload_folder(store: Store, folder: Path, prefix: str) -> list[File]:
    """Upload every file below `folder` to `prefix`. Return their descriptions, sorted by path."""
    paths = list(files_below(folder))
    with Transfer(store, "up", sum(path.stat().st_size for _, path in paths)) as transfer:
        return transfer.map(
            lambda item: transfer.upload(item[1], item[0], f"{prefix}/{item[0]}"), paths
        )


def download_files(store: Store, prefix: str, files: Sequence[File], folder: Path) -> None:
    """Download `files` from below `prefix` to `folder`. Files that already match are kept.

    Raises:
        InputError: a file is missing or damaged. The message names it.
    """
    with Transfer(store, "down", sum(file.size for file in files)) as transfer:
        transfer.map(
            lambda file: transfer.download(
                f"{prefix}/{file.path}", file, folder / safe_path(file.path)
            ),
            files,
        )


def find_damage(store: Store, prefix: str, files: Sequence[File]) -> list[str]:
    """Read every byte of `files` below `prefix`. Return one message per missing or damaged file."""
    with Transfer(store, "verify", sum(file.size for file in files)) as transfer:
        problems = transfer.map(
            lambda file: transfer.find_problem(f"{prefix}/{file.path}", file), files
        )
    return [problem for problem in problems if problem]


class _StoppedError(Exception):
    """Another file of the same transfer failed."""


class Transfer:
    """One batch of files being transferred, with its threads and buffers."""

    def __init__(self, store: Store, name: str, total: int) -> None:
        self._store = store
        self._name = name
        self._total = total
        self._file_pool = ThreadPoolExecutor(THREADS, f"{name}-file")
        self._part_pool = ThreadPoolExecutor(THREADS, f"{name}-part")
        self._buffer_slots = threading.BoundedSemaphore(BUFFERS)
        # Last in, first out: faulting in new memory would take longer than the transfer itself.
        self._free_buffers: list[bytearray] = []
        self._stop = threading.Event()
        show_bar = sys.stderr.isatty() and total >= _REPORT_MIN_BYTES
        self._bar = tqdm(
            total=total, unit="B", unit_scale=True, desc=name, disable=not show_bar, leave=False
        )
        self._started = time.monotonic()

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        self._file_pool.shutdown(cancel_futures=True)
        self._part_pool.shutdown(cancel_futures=True)
        self._bar.close()
        if kind is None and self._total >= _REPORT_MIN_BYTES:
            elapsed = time.monotonic() - self._started
            _log.info("%s: %.0f MB in %.1f s", self._name, self._total / 1e6, elapsed)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Apply `function` to all items concurrently, and stop all on the first error."""
        futures = [self._file_pool.submit(function, item) for item in items]
        for future in as_completed(futures):
            if future.exception() is not None:
                self._stop.set()
                future.result()
        return [future.result() for future in futures]

    def upload(self, path: Path, name: str, key: str) -> File:
        """Upload one file. If the store loses the upload, restart it.

        Raises:
            RetryError: the store lost the upload several times, or the file changed meanwhile.
        """
        for _ in range(_RESTARTS):
            try:
                return self._upload(path, name, key)
            except UploadLost as error:
                _log.warning("%s; restarting the upload", error)
        try:
            return self._upload(path, name, key)
        except UploadLost as error:
            raise RetryError(f"{error}", _RESUME) from None

    def _upload(self, path: Path, name: str, key: str) -> File:
        size = path.stat().st_size
        if size <= PART_SIZE:
            return self._upload_small(path, name, key)
        upload = self._store.upload(key, size)
        checksums = Checksums()
        pending: deque[Future[None]] = deque()
        with path.open("rb") as file:
            for offset, data in self._read_parts(file, upload.part_size):
                try:
                    checksums.update(data)
                    while pending and (upload.in_order or pending[0].done()):
                        pending.popleft().result()
                except BaseException:
                    self._buffer_slots.release()
                    raise
                pending.append(self._part_pool.submit(self._send, upload.send, offset, data))
        for future in pending:
            future.result()
        if checksums.size != size:
            raise RetryError(f"{path} changed during the upload", _RESUME)
        described = checksums.file(name)
        upload.finish(described.crc32c)
        return described

    def _upload_small(self, path: Path, name: str, key: str) -> File:
        checksums = Checksums()
        with self._buffer_slots:
            data = path.read_bytes()
            checksums.update(data)
            self._store.put(key, data)
        self._bar.update(len(data))
        return checksums.file(name)

    def _read_parts(self, file: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
        """Yield offset and data of each part. The caller releases the part's buffer slot."""
        offset = 0
        while True:
            self._acquire_slot()
            data = file.read(size)
            if not data:
                self._buffer_slots.release()
                return
            yield offset, data
            offset += len(data)

    def _send(self, send: Callable[[int, bytes], None], offset: int, data: bytes) -> None:
        try:
            send(offset, data)
            self._bar.update(len(data))
        finally:
            self._buffer_slots.release()

    def download(self, key: str, file: File, target: Path) -> None:
        """Download one file and verify it. If it is damaged, download it once more.

        Raises:
            InputError: the object is missing or damaged.
        """
        if _is_complete(target, file) and not self._is_published_file(target, key):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(PARTIAL + target.name)
        for _ in range(2):  # the second try repairs corruption in transit
            with naming(target.parent):
                found = self._download_rest(key, file, partial)
            if found == (file.size, file.sha256):
                partial.replace(target)
                return
            partial.unlink()
        raise InputError(_damage_message(f"{self._store.uri}/{key}", found, file))

    def find_problem(self, key: str, file: File) -> str | None:
        """Read an object, and return a message if it is missing or damaged."""
        try:
            for _ in range(2):  # the second try rules out corruption in transit
                found = self._read_and_hash(key, file)
                if found == (file.size, file.sha256):
                    return None
        except InputError as error:
            return error.message
        return _damage_message(f"{self._store.uri}/{key}", found, file)

    def _read_and_hash(self, key: str, file: File) -> SizeAndHash:
        path = self._existing_local_path(key)
        if path is not None:
            self._bar.update(file.size)
            return _hash_file(path)
        sha256 = hashlib.sha256()
        for data in self.ranges(key, 0, file.size):
            sha256.update(data)
        return file.size, sha256.hexdigest()

    def _existing_local_path(self, key: str) -> Path | None:
        path = self._store.local_path(key)
        if path is not None:
            try:
                size_of_regular_file(path)
            except (FileNotFoundError, NotADirectoryError):
                raise InputError(f"{self._store.uri}/{key} does not exist") from None
        return path

    def _is_published_file(self, target: Path, key: str) -> bool:
        """Whether `target` is a link to the object itself, so that a write to it would reach it."""
        source = self._store.local_path(key)
        return source is not None and source.is_file() and target.samefile(source)

    def _download_rest(self, key: str, file: File, partial: Path) -> SizeAndHash:
        """Append to `partial` what an interrupted download left to do."""
        source = self._existing_local_path(key)
        end = file.size if source is None else source.stat().st_size  # differs if it is damaged
        sha256 = hashlib.sha256()
        size = 0
        with _open_partial(partial) as out:
            _lock(out, partial)
            if source is not None and not partial.stat().st_size:
                clone(source, out)
            while block := out.read(1 << 20):
                sha256.update(block)
                size += len(block)
            self._bar.update(size)
            for data in self.ranges(key, size, end):
                sha256.update(data)
                _write_all(out, data)
                size += len(data)
        return size, sha256.hexdigest()

    def ranges(self, key: str, start: int, end: int) -> Iterator[memoryview]:
        """Yield the object's bytes from `start` to `end` in order, reading ahead concurrently.

        Each piece is valid until the next one is requested.

        Raises:
            InputError: the object does not exist or is too short.
        """
        if end == 0 and self._store.get(key) is None:
            raise InputError(f"{self._store.uri}/{key} does not exist")
        if 0 < end - start <= PART_SIZE:
            yield from self._single_range(key, start, end)
        else:
            yield from self._read_ahead(key, start, end)

    def _single_range(self, key: str, start: int, end: int) -> Iterator[memoryview]:
        buffer = self._acquire_buffer()
        view = memoryview(buffer)[: end - start]
        try:
            self._store.read(key, start, view)
            yield view
            self._bar.update(len(view))
        finally:
            self._release_buffer(buffer)

    def _read_ahead(self, key: str, start: int, end: int) -> Iterator[memoryview]:
        ahead: deque[tuple[Future[None], bytearray, int]] = deque()
        try:
            while start < end or ahead:
                # Waiting for a buffer while holding others would deadlock.
                while start < end and (buffer := self._try_buffer(wait=not ahead)) is not None:
                    length = min(PART_SIZE, end - start)
                    view = memoryview(buffer)[:length]
                    future = self._part_pool.submit(self._store.read, key, start, view)
                    ahead.append((future, buffer, length))
                    start += length
                future, buffer, length = ahead[0]
                future.result()
                yield memoryview(buffer)[:length]
                self._bar.update(length)
                ahead.popleft()
                self._release_buffer(buffer)
        finally:
            for future, buffer, _ in ahead:
                if not future.cancel():
                    future.exception()  # wait: the read fills the buffer until it ends
                self._release_buffer(buffer)

    def _acquire_slot(self, wait: bool = True) -> bool:
        """Reserve memory for one part. Return False if none is free and `wait` is False."""
        if not self._buffer_slots.acquire(blocking=wait):
            return False
        if self._stop.is_set():
            self._buffer_slots.release()
            raise _StoppedError
        return True

    def _try_buffer(self, wait: bool) -> bytearray | None:
        return self._new_or_free_buffer() if self._acquire_slot(wait) else None

    def _acquire_buffer(self) -> bytearray:
        self._acquire_slot()
        return self._new_or_free_buffer()

    def _new_or_free_buffer(self) -> bytearray:
        return self._free_buffers.pop() if self._free_buffers else bytearray(PART_SIZE)

    def _release_buffer(self, buffer: bytearray) -> None:
        self._free_buffers.append(buffer)
        self._buffer_slots.release()


def _is_complete(target: Path, file: File) -> bool:
    return (
        target.is_file()
        and target.stat().st_size == file.size
        and describe_file(target, file.path) == file
    )


def _hash_file(path: Path) -> SizeAndHash:
    found = describe_file(path, path.name)
    return found.size, found.sha256


def _open_partial(partial: Path) -> io.FileIO:
    """Open a temporary file, for reading from its start and for writing.

    A link is replaced first: writing through it would change a file elsewhere.
    """
    with contextlib.suppress(FileNotFoundError):
        if partial.is_symlink() or partial.stat().st_nlink > 1:
            partial.unlink()
    partial.touch()
    return partial.open("r+b", buffering=0)


def _lock(out: io.FileIO, partial: Path) -> None:
    """Keep a second process from writing to the same file."""
    if not try_lock(out, partial.parent):
        raise ConfigError(
            f"another process is downloading to {partial}",
            "wait for it to finish, or choose another folder",
        )


def _write_all(out: io.FileIO, data: memoryview) -> None:
    while len(data):
        data = data[out.write(data) :]


def _damage_message(where: str, found: SizeAndHash, expected: File) -> str:
    size, sha256 = found
    return (
        f"{where} is damaged: it has {size} bytes and sha256 {sha256[:12]}, "
        f"but was published with {expected.size} bytes and sha256 {expected.sha256[:12]}"
    )
