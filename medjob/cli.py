"""The command line. A verb imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from medjob import __version__, preempt
from medjob.errors import EXIT_CODES, ConfigError, MedjobError
from medjob.stage import STAGES, Stage, get_stage

if TYPE_CHECKING:
    from medjob.config import Job

_EXAMPLES = """examples:
  medjob run -f jobs/demo.yaml                          the whole line on this machine
  medjob run -f jobs/demo.yaml --dry-run                what it would do
  medjob sft -f jobs/demo.yaml --set run.sft.learning_rate=1e-4
  medjob show -f jobs/qa-smollm2.yaml -f jobs/presets/qa-fast.yaml
  medjob evaluate -f jobs/demo.yaml --model ./my-model

exit codes:
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and end the process with its exit code."""
    preempt.install()
    arguments = parser().parse_args(argv)
    from medjob.progress import setup_logging

    setup_logging(arguments.debug)
    try:
        _run(arguments)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
    except Exception as error:
        if arguments.debug:
            raise
        sys.exit(_report(error))
    sys.exit(0)


def _report(error: Exception) -> int:
    """Print an error; the exit code that goes with it."""
    if isinstance(error, MedjobError):
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stderr.write(f"error: unexpected {type(error).__name__}: {error}\nhint: this is a fault of medjob; --debug shows where\n")
    return 1


def parser() -> argparse.ArgumentParser:
    """The parser, made from STAGES."""
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
    top = _Parser(
        prog="medjob",
        description="A run file goes in, a better medical language model comes out.",
        epilog=_EXAMPLES + codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"medjob {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    run = _verb(verbs, "run", "run every stage whose artifact is missing", "medjob run -f jobs/demo.yaml --until sft")
    run.add_argument("--dry-run", action="store_true", help="print what is published and what would run; run nothing")
    run.add_argument("--until", metavar="STAGE", choices=[stage.name for stage in STAGES], help="stop after this stage")
    for stage in STAGES:
        verb = _verb(verbs, stage.name, stage.summary, f"medjob {stage.name} -f jobs/demo.yaml")
        if stage.name == "evaluate":
            verb.add_argument("--model", action="append", default=[], metavar="PATH|HUB_ID", help="also compare this model (repeatable)")
    _verb(verbs, "show", "print the run file with all defaults filled in", "medjob show -f jobs/demo.yaml --set run.seed=7")
    _verb(verbs, "ls", "list the run's artifacts", "medjob ls -f jobs/demo.yaml")
    return top


class _Parser(argparse.ArgumentParser):
    """argparse, with the table's code for a wrong flag."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        sys.stderr.write(f"error: {message}\nhint: {self.prog} --help\n")
        sys.exit(ConfigError.exit_code)


def _verb(verbs: argparse._SubParsersAction[_Parser], name: str, summary: str, example: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=summary, description=f"{summary}.", epilog=f"example: {example}")
    verb.add_argument(
        "-f", "--file", action="append", type=Path, required=True, metavar="FILE", help="run file (repeatable; later ones win)"
    )
    verb.add_argument("--set", action="append", default=[], metavar="a.b=c", help="set one value, written as in YAML (repeatable)")
    verb.add_argument("--debug", action="store_true", help="show debug messages, and tracebacks instead of errors")
    return verb


def _run(arguments: argparse.Namespace) -> None:
    from medjob.config import load_job

    sets = list(arguments.set)
    if getattr(arguments, "model", None):
        sets.append(f"run.evaluate.extra_models={arguments.model}")
    job = load_job(arguments.file, sets)
    match arguments.verb:
        case "show":
            _show(job)
        case "ls":
            _ls(job)
        case "run":
            _run_line(job, arguments.until or STAGES[-1].name, arguments.dry_run)
        case stage:
            _run_stage(job, get_stage(stage))


def _show(job: Job) -> None:
    import yaml

    print(yaml.safe_dump(job.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True), end="")


def _ls(job: Job) -> None:
    from medjob.listing import artifacts_table
    from medjob.store import open_store

    print(artifacts_table(open_store(job.cluster.store), job.run.name))


def _run_line(job: Job, until: str, dry_run: bool) -> None:
    from medjob.listing import plan_table
    from medjob.runner import Line

    line = Line.open(job)
    stages = STAGES[: STAGES.index(get_stage(until)) + 1]
    if dry_run:
        print(plan_table(line, stages))
        return
    for stage in stages:
        _print_result(line, stage, line.run(stage).metrics)


def _run_stage(job: Job, stage: Stage) -> None:
    from medjob.runner import Line

    line = Line.open(job)
    if stage.name != "fetch":
        line.run(get_stage("fetch"))  # takes no time where it is done, and pins what a flag has added
    _print_result(line, stage, line.run(stage).metrics)


def _print_result(line: object, stage: Stage, metrics: dict[str, object]) -> None:
    """A stage's own summary on stdout, for those that end in something to read."""
    if "summary" in metrics:
        print(metrics["summary"])
    from medjob.listing import report_path

    report = report_path(line, stage)  # type: ignore[arg-type]
    if report:
        print(f"{stage.name}: report {report}")
