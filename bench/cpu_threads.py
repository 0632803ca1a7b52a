"""Time of a LoRA step on a CPU, with and without passive waiting of OpenMP's threads.

    python -m bench.cpu_threads

The demo's model trains on two threads, on quiet cores and beside one busy process. There is one
worker per setting. The workers take their steps in turn, so that other load affects all alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
}
THREADS = 2
ROWS = 2
TOKENS = 256
WARM_UP = 2
BUSY = "while True: pass"


def main() -> None:
    """Measure and print a table of medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=15, help="timed steps per setting")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments.worker)
        return
    with tempfile.TemporaryDirectory() as cache:
        workers = {name: _start(variables, cache) for name, variables in SETTINGS.items()}
    try:
        for _ in range(WARM_UP):
            _round(workers)
        _report("quiet", [_round(workers) for _ in range(arguments.steps)])
        busy = subprocess.Popen([sys.executable, "-c", BUSY])
        try:
            _report("one busy process", [_round(workers) for _ in range(arguments.steps)])
        finally:
            busy.kill()
            busy.wait()
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()


def _start(variables: dict[str, str], cache: str) -> subprocess.Popen[str]:
    """Start a worker and wait until it has loaded the model."""
    plain = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", "bench.cpu_threads", "--worker", cache],
        env={**plain, "OMP_NUM_THREADS": str(THREADS), **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout
    assert worker.stdout.readline() == "ready\n"
    return worker


def _round(workers: dict[str, subprocess.Popen[str]]) -> dict[str, tuple[float, float]]:
    """One step of each worker; (forward, backward) in seconds."""
    times = {}
    for name, worker in workers.items():
        assert worker.stdin
        assert worker.stdout
        worker.stdin.write("step\n")
        worker.stdin.flush()
        forward, backward = worker.stdout.readline().split()
        times[name] = (float(forward), float(backward))
        sys.stderr.write(f"{name} {sum(times[name]):.2f}  ")
    sys.stderr.write("s\n")
    return times


def _report(load: str, rounds: list[dict[str, tuple[float, float]]]) -> None:
    print(f"{load}: median seconds of {len(rounds)} steps (fastest to slowest)")
    for name in SETTINGS:
        steps = [sum(times[name]) for times in rounds]
        middle = statistics.median(steps)
        forward = statistics.median(times[name][0] for times in rounds)
        span = f"{min(steps):.2f} to {max(steps):.2f}"
        print(f"  {name:25} {middle:6.2f} ({span}), forward {forward:.2f}")
    sys.stdout.flush()


def _work(cache: Path) -> None:
    """Load the model, which is converted in `cache`, and take one step per line of stdin."""
    from medjob import stages  # noqa: F401  # quiets the libraries, as in a run
    from medjob.config.load import load_run_file
    from medjob.sources.locations import locate

    run = load_run_file([Path("jobs/demo.yaml")]).run
    import torch

    from medjob.train.adapters import add_adapter
    from medjob.train.model import ModelSpec, load_model

    location = locate(run.base_model, {}, cache)
    base = load_model(ModelSpec.base_of(run, location))
    model = add_adapter(base, run.lora, run.seed).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, 40_000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        forward = time.perf_counter() - began
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sys.stdout.write(f"{forward:.4f} {time.perf_counter() - began - forward:.4f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
