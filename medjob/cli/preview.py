"""`medjob preview`: prints rows with the trained tokens marked, and what a sample shows."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from medjob.cli.arguments import Commands, add_command, load_run_file_of
from medjob.runtime.printable import printable

if TYPE_CHECKING:
    from medjob.config import RunFile
    from medjob.data.preview import Preview, Sample, ShownRow

_GREEN, _BOLD, _RESET = "\x1b[32m", "\x1b[1m", "\x1b[0m"
_PLACES = 3
_ROLES = {
    "sources": "answers are trained; prepare holds some rows out",
    "safety": "answers are trained; prepare holds some rows out",
    "preference": "prompts for candidates; pairs for dpo if run.dpo.pairs is both",
    "pairs": "dpo trains on the chosen and rejected answers",
    "evaluation": "prompts of the evaluation; nothing is trained",
}
Mark = Callable[[str], str]


def add(commands: Commands) -> None:
    """Add `preview`."""
    command = add_command(
        commands,
        "preview",
        "show rows as the model will see them, on a sample of each source; publish nothing",
        "medjob preview -f jobs/demo.yaml",
        "medjob preview -f jobs/demo.yaml --rows 1 | less",
        "medjob preview -f jobs/demo.yaml --rows 0                      counts only",
        "medjob preview -f jobs/demo.yaml --set run.prompt.style=tags   try another layout",
    )
    command.add_argument(
        "--rows", type=_count, default=5, metavar="N", help="rows to show per source (default: 5)"
    )
    command.set_defaults(call=_preview)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0 (got {text})")
    return int(text)


def _preview(arguments: argparse.Namespace) -> None:
    from medjob.pipeline.preview import preview

    run_file = load_run_file_of(arguments)
    previews = preview(run_file, arguments.rows)
    print("\n".join(_lines(run_file, previews, has_colour=_has_colour())))


def _has_colour() -> bool:
    """Whether stdout shows colours. See https://no-color.org."""
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def _lines(run_file: RunFile, previews: list[Preview], has_colour: bool) -> Iterator[str]:
    from medjob.data.preview import SAMPLE

    name = run_file.run.name
    yield _visible(f"{name}: rows as the model will see them. Nothing was trained or published.")
    yield f"This is a sample: at most the first {SAMPLE:,} rows of each source are read."
    if has_colour:
        yield f"Trained tokens are {_coloured('green')}."
    else:
        yield "Trained tokens are between [[ and ]]."
    mark = _coloured if has_colour else _bracketed
    for preview in previews:
        yield ""
        title = _visible(f"{preview.sample.key}: {preview.sample.source.path}")
        yield f"{_BOLD}{title}{_RESET}" if has_colour else f"== {title} =="
        yield from _facts(run_file, preview)
        for row in preview.rows:
            yield ""
            yield from _row(run_file, row, mark)


def _facts(run_file: RunFile, preview: Preview) -> Iterator[str]:
    sample = preview.sample
    yield f"  use         {_ROLES[sample.role]}"
    yield f"  rows        {_rows_read(sample)}"
    if sample.source.weight is not None:
        yield f"  weight      {_weight(run_file, sample.source.weight)}"
    yield from _columns(sample)
    yield from _rejected(run_file, sample)
    if sample.records:
        yield f"  tokens      {_tokens(run_file, preview)}"
    if sample.role == "sources":
        style = run_file.run.prompt.style
        reasoning = sum(bool(record.reasoning) for record in sample.records)
        rows = len(sample.records)
        yield f"  reasoning   in {reasoning:,} of {rows:,} rows (run.prompt.style: {style})"
    if sample.role in ("sources", "preference"):
        yield f"  duplicates  {_duplicates(sample)}"
    if sample.role != "evaluation":
        yield f"  copies      {_copies(run_file, sample)}"


def _rows_read(sample: Sample) -> str:
    from medjob.data.preview import SCAN

    text = f"{sample.read:,} read"
    if sample.source.where:
        text += f" that match where, of at most {SCAN:,} searched"
    elif sample.is_partial:
        text += ", there may be more"
    return f"{text}; {len(sample.records):,} usable, {sample.rejections.rows:,} rejected"


def _weight(run_file: RunFile, weight: float) -> str:
    total = sum(source.weight or 0 for source in run_file.run.prepare.sources)
    return f"{weight:g}: {weight / total:.1%} of the training rows, without safety rows"


def _columns(sample: Sample) -> Iterator[str]:
    mapped = sample.mapped
    for field, name in sample.source.columns.items():
        found = mapped.counts[field]
        yield _visible(f"  columns     {field} is {name!r}, in {found:,} of {mapped.rows:,} rows")
        if not found:
            yield (
                f"  warning     no row of this sample has the column of {field}; prepare stops if "
                "no row of the source has it"
            )


def _rejected(run_file: RunFile, sample: Sample) -> Iterator[str]:
    rejections = sample.rejections
    for reason, count in rejections.reasons.most_common():
        places = ", ".join(rejections.examples[reason][:_PLACES])
        yield _visible(f"  rejected    {count:,} x {reason}: {places}")
    limit = run_file.run.prepare.max_rejected_fraction
    if sample.read and rejections.rows / sample.read > limit:
        yield (
            f"  warning     {rejections.rows / sample.read:.1%} of these rows are rejected; "
            f"prepare stops above run.prepare.max_rejected_fraction ({limit:g})"
        )


def _tokens(run_file: RunFile, preview: Preview) -> str:
    lengths, limit = preview.lengths, run_file.run.sft.max_length
    total, answer = lengths["row_tokens"], lengths["answer_row_tokens"]
    text = f"median {total['p50']:,.0f}, longest {total['p100']:,.0f}"
    if preview.sample.role not in ("sources", "safety"):
        return f"{text} per prompt"
    action = "left out" if run_file.run.sft.overlong == "drop" else "cut"
    return (
        f"{text} per row; median {answer['p50']:,.0f} per answer; "
        f"{lengths['overlong_rows']:,} rows over run.sft.max_length ({limit:,}) are {action}"
    )


def _duplicates(sample: Sample) -> str:
    exact = len(sample.repeats) - sample.near
    text = f"{exact:,} exact, {sample.near:,} near"
    pairs = [f"{sample.places[n]} repeats {place}" for n, place in sample.repeats.items()]
    return _visible(": ".join([text, ", ".join(pairs[:_PLACES])]) if pairs else text)


def _copies(run_file: RunFile, sample: Sample) -> str:
    if not run_file.run.prepare.evaluation_sources:
        return "not checked, because run.prepare.evaluation_sources is empty"
    text = f"{len(sample.copies):,} of rows in evaluation_sources"
    places = ", ".join(sample.copies[:_PLACES])
    return _visible(f"{text}: {places}" if places else text)


def _row(run_file: RunFile, row: ShownRow, mark: Mark) -> Iterator[str]:
    from medjob.data.row_examples import shortened

    yield _visible(f"-- {row.place}: {_row_tokens(run_file, row)} --")
    texts = [(_visible(shortened(span.text)), span.trained) for span in row.spans]
    yield "".join(mark(text) if trained else text for text, trained in texts).rstrip("\n")
    for name, text in row.answers.items():
        yield _visible(f"-- {name}: {shortened(text)}")


def _row_tokens(run_file: RunFile, row: ShownRow) -> str:
    if row.answer_tokens is None:
        return f"prompt {row.context_tokens:,} tokens"
    total = row.context_tokens + row.answer_tokens
    answers = "answer" if row.turns == 1 else f"{row.turns} answers"
    text = f"context {row.context_tokens:,} + {answers} {row.answer_tokens:,} = {total:,} tokens"
    if not row.is_overlong:
        return text
    action = "cut there" if row.is_trained else "left out, not trained"
    return f"{text}, over run.sft.max_length ({run_file.run.sft.max_length:,}): {action}"


def _coloured(text: str) -> str:
    """Colour each line, because pagers reset colours at line breaks."""
    return "\n".join(f"{_GREEN}{line}{_RESET}" if line else line for line in text.split("\n"))


def _bracketed(text: str) -> str:
    return f"[[{text}]]"


def _visible(text: str) -> str:
    return printable(text, line_breaks=True)
