"""The command line. A verb imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from medjob import __version__
from medjob.cli import cluster as cli_cluster
from medjob.cli import store as cli_store
from medjob.cli.arguments import Parser, add_verb, run_file_of
from medjob.errors import EXIT_CODES, MedjobError, translate
from medjob.runtime import secrets, signals
from medjob.stage import STAGES, Stage, get_stage

if TYPE_CHECKING:
    from medjob.config import RunFile

_EXAMPLES = """examples:
  medjob run -f jobs/demo.yaml                          the whole line on this machine
  medjob run -f jobs/demo.yaml --dry-run                what it would do
  medjob plan -f jobs/o1-llama.yaml --gpu H100          memory, steps, hours and cost of the trainings
  medjob sft -f jobs/demo.yaml --set run.sft.learning_rate=1e-4
  medjob show -f jobs/qa-smollm2.yaml -f jobs/presets/qa-fast.yaml
  medjob evaluate -f jobs/demo.yaml --model ./my-model
  medjob pull export -f jobs/demo.yaml -o ./model       the merged model, every byte verified

exit codes:
"""


def entry() -> NoReturn:
    """The command: `main`, ended at once. Threads that still talk to a store that is away would hold the process for minutes."""
    try:
        main()
    except SystemExit as ended:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # its reader is gone
                stream.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and end the process with its exit code."""
    signals.install()
    arguments = parser().parse_args(argv)
    from medjob.artifacts.progress import setup_logging

    setup_logging(arguments.debug)
    try:
        secrets.install()
        _run(arguments)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
    except Exception as error:
        if arguments.debug:
            raise
        sys.exit(_report(translate(error)))
    sys.exit(0)


def _report(error: BaseException) -> int:
    """Print an error; the exit code that goes with it."""
    if isinstance(error, MedjobError):
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stderr.write(
        f"error: unexpected {type(error).__name__}: {error}\nhint: this is a fault of medjob; --debug shows where\n"
    )
    return 1


def parser() -> argparse.ArgumentParser:
    """The parser, made from STAGES."""
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
    top = Parser(
        prog="medjob",
        description="A run file goes in, a better medical language model comes out.",
        epilog=_EXAMPLES + codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"medjob {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    run = add_verb(
        verbs,
        "run",
        "run every stage whose artifact is missing",
        "medjob run -f jobs/demo.yaml --until sft",
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="print what is published and what would run; run nothing",
    )
    run.add_argument(
        "--until",
        metavar="STAGE",
        choices=[stage.name for stage in STAGES],
        help="stop after this stage",
    )
    for stage in STAGES:
        verb = add_verb(verbs, stage.name, stage.summary, f"medjob {stage.name} -f jobs/demo.yaml")
        if stage.name == "evaluate":
            verb.add_argument(
                "--model",
                action="append",
                default=[],
                metavar="PATH|HUB_ID",
                help="also compare this model (repeatable)",
            )
    plan = add_verb(
        verbs,
        "plan",
        "what the trainings will take: memory, steps, hours, cost; nothing is run",
        "medjob plan -f jobs/o1-llama.yaml --gpu H100",
    )
    plan.add_argument(
        "--gpu",
        metavar="NAME",
        help="plan for this GPU (H100, A100-80, L4, ...), whatever the profiles say",
    )
    add_verb(
        verbs,
        "show",
        "print the run file with all defaults filled in",
        "medjob show -f jobs/demo.yaml --set run.seed=7",
    )
    cli_store.add(verbs)
    cli_cluster.add(verbs)
    return top


def _run(arguments: argparse.Namespace) -> None:
    if hasattr(arguments, "call"):  # set by the verbs of cli_store and cli_cluster
        arguments.call(arguments)
        return
    run_file = run_file_of(arguments)
    match arguments.verb:
        case "show":
            _show(run_file)
        case "plan":
            _plan(run_file, arguments.gpu)
        case "run":
            _run_line(run_file, arguments.until or STAGES[-1].name, arguments.dry_run)
        case stage:
            _run_stage(run_file, get_stage(stage))


def _show(run_file: RunFile) -> None:
    import yaml

    print(
        yaml.safe_dump(
            run_file.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True
        ),
        end="",
    )


def _plan(run_file: RunFile, gpu: str | None) -> None:
    from medjob.pipeline.planning import plan_lines

    print("\n".join(plan_lines(run_file, gpu)))


def _run_line(run_file: RunFile, until: str, dry_run: bool) -> None:
    from medjob.cli.tables import plan_table
    from medjob.pipeline.runner import Pipeline
    from medjob.store import probe

    pipeline = Pipeline.open(run_file)
    stages = STAGES[: STAGES.index(get_stage(until)) + 1]
    if dry_run:
        print(plan_table(pipeline, stages))
        return
    pipeline.refuse_several_nodes(stages)
    probe(pipeline.store)
    for stage in stages:
        _print_result(pipeline, stage, pipeline.run(stage).metrics)


def _run_stage(run_file: RunFile, stage: Stage) -> None:
    from medjob.pipeline.runner import Pipeline
    from medjob.store import probe

    pipeline = Pipeline.open(run_file)
    probe(pipeline.store)
    if stage.name != "fetch" and not pipeline.node(stage).rank:
        pipeline.run(
            get_stage("fetch")
        )  # takes no time where it is done, and pins what a flag has added
    _print_result(pipeline, stage, pipeline.run(stage).metrics)


def _print_result(pipeline: object, stage: Stage, metrics: dict[str, object]) -> None:
    """A stage's own summary on stdout, for those that end in something to read."""
    if "summary" in metrics:
        print(metrics["summary"])
    from medjob.cli.tables import report_path

    report = report_path(pipeline, stage)  # type: ignore[arg-type]
    if report:
        print(f"{stage.name}: report {report}")
