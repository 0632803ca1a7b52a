"""`medjob judge --calibrate`: how well the judges of a run agree with a user's own grades."""

from __future__ import annotations

import argparse
from pathlib import Path

from medjob.cli.arguments import Parser, load_run_file_of
from medjob.errors import ConfigError

EXAMPLES = (
    "medjob judge -f run.yaml --calibrate grades.csv            compare the judge with your grades",
    "medjob judge -f run.yaml --calibrate grades.csv --dry-run  count the questions, and ask none",
)
_OUTPUT = Path("calibration-report")


def add_arguments(command: Parser) -> None:
    """Add the options of `--calibrate` to the command `judge`."""
    command.add_argument(
        "--calibrate",
        metavar="FILE",
        help="only compare the judges of the run file with the graded answers in FILE (.jsonl, "
        ".csv, ...), and exit with 67 if one is not calibrated; publish nothing. Columns: "
        "question, reference, better, worse; or question, answer, grade; or question, answer, "
        "criterion, met",
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"with --calibrate: where to write calibration.json and report.html (default: "
        f"./{_OUTPUT})",
    )
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="with --calibrate: print how many questions the judges would be asked",
    )


def was_asked(arguments: argparse.Namespace) -> bool:
    """Whether to calibrate, instead of running the stage.

    Raises:
        ConfigError: an option is given that only works with `--calibrate`.
    """
    if arguments.calibrate is not None:
        return True
    for name, given in (("--output", arguments.output), ("--dry-run", arguments.dry_run)):
        if given:
            raise ConfigError(
                f"{name} of `medjob judge` only works with --calibrate FILE",
                "`medjob run --only judge --dry-run` shows whether the stage would run",
            )
    return False


def calibrate(arguments: argparse.Namespace) -> None:
    """Compare the judges with the grades, or count what they would be asked."""
    from medjob.pipeline.calibration import calibrate_judges, count_questions

    run_file = load_run_file_of(arguments)
    if arguments.dry_run:
        asked = count_questions(run_file, arguments.calibrate)
        print(f"{arguments.calibrate}: {asked.rows:,} graded rows")
        for judge in asked.judges or ["overlap"]:
            print(f"{judge}: {asked.questions if asked.judges else 0:,} questions")
        return
    output = arguments.output or _OUTPUT
    for line in calibrate_judges(run_file, arguments.calibrate, output, arguments.yes):
        print(line)
    print(f"{output / 'report.html'}")
