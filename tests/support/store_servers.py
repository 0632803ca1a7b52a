"""Real servers on loopback, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from tests.support.ports import free_ports

ACCESS_KEY, SECRET_KEY, BUCKET = "test", "testsecret", "bucket"
# This user may read and write objects but not create buckets.
USER_KEY, USER_SECRET = "user", "usersecret"
SECOND_KEY, SECOND_SECRET = "rotated", "rotatedsecret"  # the same rights
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def program(name: str) -> str:
    """Return the path of a program that a package of this environment installed."""
    found = shutil.which(
        name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    )
    assert found, f"{name} is not installed: make .venv/installed-dev"
    return found


def s3_client(endpoint: str) -> object:
    """Return a plain boto3 client that is independent of the code under test."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 3}),
    )


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """Run SeaweedFS's S3 server with an empty bucket, and yield its endpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    identities = [
        _identity(ACCESS_KEY, SECRET_KEY, "Admin"),
        _identity(USER_KEY, USER_SECRET, "Read", "Write", "List"),
        _identity(SECOND_KEY, SECOND_SECRET, "Read", "Write", "List"),
    ]
    (folder / "identities.json").write_text(json.dumps({"identities": identities}))
    s3_port, *other_ports = free_ports(8)
    log = folder / "log"
    with _running(_seaweedfs_command(folder, s3_port, other_ports), log) as process:
        endpoint = f"http://127.0.0.1:{s3_port}"
        client: Any = s3_client(endpoint)
        _until(lambda: client.create_bucket(Bucket=BUCKET), process, log)
        _until(lambda: client.put_object(Bucket=BUCKET, Key="up", Body=b"x"), process, log)
        yield endpoint


def _seaweedfs_command(folder: Path, s3_port: int, other_ports: list[int]) -> list[str]:
    master, volume, filer, *grpc = other_ports
    grpc_ports = zip(("master", "volume", "filer", "s3"), grpc, strict=True)
    return [
        program("weed"),
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-master.port={master}",
        f"-volume.port={volume}",
        f"-filer.port={filer}",
        f"-s3.port={s3_port}",
        *(f"-{name}.port.grpc={port}" for name, port in grpc_ports),
        f"-s3.config={folder / 'identities.json'}",
        "-master.volumeSizeLimitMB=512",
        "-volume.max=200",
        "-volume.preStopSeconds=0",
    ]


def _identity(key: str, secret: str, *actions: str) -> dict[str, object]:
    return {
        "name": key,
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": actions,
    }


@contextlib.contextmanager
def gcs_emulator(folder: Path) -> Iterator[str]:
    """Run gcp-storage-emulator with an empty bucket, and yield its endpoint.

    It ignores conditions and accepts wrong checksums.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    command = [
        program("gcp-storage-emulator"),
        "start",
        "--host=127.0.0.1",
        f"--port={port}",
        "--in-memory",
        f"--default-bucket={BUCKET}",
    ]
    with _running(command, folder / "log") as process:
        endpoint = f"http://127.0.0.1:{port}"
        _until(
            lambda: urllib.request.urlopen(f"{endpoint}/storage/v1/b/{BUCKET}"),
            process,
            folder / "log",
        )
        yield endpoint


@contextlib.contextmanager
def moto() -> Iterator[str]:
    """Run moto's S3 with an empty bucket, and yield its endpoint. It accepts wrong checksums."""
    from moto.server import ThreadedMotoServer

    (port,) = free_ports(1)
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{port}"
        s3_client(endpoint).create_bucket(Bucket=BUCKET)  # type: ignore[attr-defined]
        yield endpoint
    finally:
        server.stop()


@contextlib.contextmanager
def _running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process,
    ):
        try:
            yield process
        finally:
            process.kill()  # its data is not needed


def _until(works: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            works()
            return
        except Exception:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-2000:])
