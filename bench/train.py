"""Tokens per second of QLoRA SFT: medjob against the usual notebook recipe, same rows, same base.

    python -m bench.train                    print the table; its last line is `medjob/recipe: R`
    python -m bench.train --variants medjob  choose from recipe, medjob, medjob-bf16, unsloth

On a GPU it trains an 8B Llama with random weights on rows of real lengths. On a CPU it trains a
tiny Llama on shorter rows: that tests the command and says nothing about a GPU. Each variant runs
in a separate process, and the first steps are not counted.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.train_setup import Plan, prepare

VARIANTS = {
    "recipe": "TRL, batch 1 x 8, NF4",
    "medjob": "medjob, method qlora",
    "medjob-bf16": "medjob, method lora",
    "unsloth": "Unsloth, batch 2 x 4, NF4",
}
ABSENT = "not installed"
Result = dict[str, Any]


def main() -> None:
    """Measure, print, and write the JSON."""
    arguments = _arguments()
    if arguments.worker:
        _work(arguments.worker, arguments.scratch, arguments.steps)
        return
    began, scratch = time.monotonic(), arguments.scratch
    shutil.rmtree(scratch / "work", ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    environment = os.environ | _libraries(arguments.wheels, scratch / "site")
    command = [
        sys.executable,
        "-m",
        "bench.train",
        "--scratch",
        str(scratch),
        *(["--steps", str(arguments.steps)] if arguments.steps else []),
    ]
    if error := _measure("prepare", command, environment, scratch, arguments.limit).get("error"):
        raise SystemExit(error)
    plan = Plan.read(scratch)
    output = arguments.output or Path("bench/results") / f"train-{_slug(plan.device)}.json"
    results: dict[str, Result] = {}
    for name in arguments.variants:
        sys.stderr.write(f"{name} ...\n")
        results[name] = _measure(
            name, command, environment, scratch, arguments.limit - (time.monotonic() - began)
        )
        _write(output, plan, results)
    print("\n".join(_table(plan, results)))
    print(_last_line(results))
    sys.exit(any(result.get("error", ABSENT) != ABSENT for result in results.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--variants",
        type=_names,
        default=list(VARIANTS),
        help="variants, separated by commas; default: all",
    )
    parser.add_argument(
        "--steps", type=int, help="optimizer steps to count; default: 25 on a GPU, 8 on a CPU"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path("build/bench-train"),
        help="directory for the model (16 GB on a GPU)",
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        default=Path("build/wheels"),
        help="output of bench.wheels, used if trl is not installed",
    )
    parser.add_argument(
        "--output", type=Path, help="JSON; default: bench/results/train-<device>.json"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=570,
        help="seconds in total; variants that are not finished then are given up",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(
            f"unknown variant {', '.join(unknown)}; choose from {', '.join(VARIANTS)}"
        )
    return names


def _libraries(wheels: Path, target: Path) -> dict[str, str]:
    """If TRL is missing, install the wheels into `target`; return the variables to find them."""
    if importlib.util.find_spec("trl") is not None:
        return {}
    files = [str(file) for file in sorted(wheels.glob("*.whl"))]
    if not files:
        raise SystemExit(
            f"trl is not installed, and {wheels} has no wheels: "
            "run python -m bench.wheels on a machine with a package index"
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--find-links",
        str(wheels),
        "--no-deps",
        "--no-compile",
    ]
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run([*command, "--target", str(target), *files], check=True)
    return {
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(target.resolve()), os.environ.get("PYTHONPATH")])
        )
    }


def _measure(
    name: str, command: list[str], environment: dict[str, str], scratch: Path, seconds: float
) -> Result:
    """Run one variant in a separate process. Report a failure, and let the others run."""
    if name == "unsloth" and importlib.util.find_spec(name) is None:
        return {"error": ABSENT}
    log, result = scratch / f"{name}.log", scratch / f"{name}.json"
    result.unlink(missing_ok=True)
    with log.open("w") as file:
        try:
            code = subprocess.run(
                [*command, "--worker", name],
                stdout=file,
                stderr=file,
                env=environment,
                timeout=max(seconds, 1),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return {"error": "given up after the time limit"}
    if code:
        sys.stderr.write(f"{name} failed:\n{log.read_text(errors='replace')[-3000:]}\n")
        return {"error": f"failed with {code}; see {log}"}
    return dict(json.loads(result.read_text()))


def _work(name: str, scratch: Path, steps: int | None) -> None:
    """Run one variant in this process, or prepare the model and rows for all of them."""
    result: Result = {}
    if name == "prepare":
        prepare(scratch, steps)
    else:
        from bench.train_variants import run

        result = run(name, Plan.read(scratch))
    (scratch / f"{name}.json").write_text(json.dumps(result))


def _write(output: Path, plan: Plan, results: dict[str, Result]) -> None:
    report = {
        "device": plan.device,
        "machine": plan.machine,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "bench.train", *sys.argv[1:]]),
        "versions": plan.versions,
        "model": plan.sizes,
        "rows": {
            "mean_length": plan.mean_length,
            "max_length": plan.max_length,
            "shortened": plan.shortened,
        },
        "steps": {
            "warmup": plan.warmup,
            "counted": plan.steps,
            "rows": plan.batch_rows,
            "rows_when_packed": plan.packed_rows,
        },
        "variants": results,
        "medjob/recipe": _ratio(results),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")


def _table(plan: Plan, results: dict[str, Result]) -> list[str]:
    model = f"Llama {plan.sizes['hidden_size']} x {plan.sizes['num_hidden_layers']}"
    lines = [
        (
            f"{plan.device} ({plan.machine}): {model}, rows of {plan.mean_length:.0f} tokens, "
            f"{plan.steps} steps"
        ),
        (
            f"{'':38}{'tokens/s':>9}{'MFU':>8}{'GiB':>8}{'s/step':>8}{'tokens/step':>13}"
            f"{'J/1k tokens':>13}"
        ),
    ]
    for name, result in results.items():
        title = f"{name}: {VARIANTS[name]}"
        if "error" in result:
            lines.append(f"{title:38}  {result['error']}")
            continue
        mfu = "-" if result["mfu"] is None else f"{result['mfu']:.1%}"
        joules = (
            "-" if result["joules"] is None else f"{1000 * result['joules'] / result['tokens']:.0f}"
        )
        lines.append(
            f"{title:38}{result['tokens_per_second']:9,.0f}{mfu:>8}{result['peak_gib']:8.1f}"
            f"{result['seconds_per_step']:8.2f}{result['tokens'] / plan.steps:13,.0f}{joules:>13}"
        )
    return lines + [
        f"{name}: {line}" for name, result in results.items() for line in result.get("said", ())
    ]


def _ratio(results: dict[str, Result]) -> float | None:
    speeds = [results.get(name, {}).get("tokens_per_second") for name in ("medjob", "recipe")]
    return speeds[0] / speeds[1] if speeds[0] and speeds[1] else None


def _last_line(results: dict[str, Result]) -> str:
    return f"medjob/recipe: {_ratio(results) or float('nan'):.2f}"


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


if __name__ == "__main__":
    main()
