"""The command line. A verb imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from medjob import __version__, preempt, secrets
from medjob.errors import EXIT_CODES, ConfigError, InputError, MedjobError, told
from medjob.stage import STAGES, Stage, get_stage

if TYPE_CHECKING:
    from medjob.config import Job
    from medjob.store import Store

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
    preempt.install()
    arguments = parser().parse_args(argv)
    from medjob.progress import setup_logging

    setup_logging(arguments.debug)
    try:
        secrets.install()
        _run(arguments)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
    except Exception as error:
        if arguments.debug:
            raise
        sys.exit(_report(told(error)))
    sys.exit(0)


def _report(error: BaseException) -> int:
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
    plan = _verb(
        verbs,
        "plan",
        "what the trainings will take: memory, steps, hours, cost; nothing is run",
        "medjob plan -f jobs/o1-llama.yaml --gpu H100",
    )
    plan.add_argument("--gpu", metavar="NAME", help="plan for this GPU (H100, A100-80, L4, ...), whatever the profiles say")
    _verb(verbs, "show", "print the run file with all defaults filled in", "medjob show -f jobs/demo.yaml --set run.seed=7")
    _store_verbs(verbs)
    return top


def _store_verbs(verbs: argparse._SubParsersAction[_Parser]) -> None:
    ls = _verb(verbs, "ls", "list artifacts with their sizes", "medjob ls -f jobs/demo.yaml; medjob ls --store s3://bucket/prefix", True)
    pull = _verb(verbs, "pull", "download one artifact, every byte verified", "medjob pull export -f jobs/demo.yaml -o ./model", True)
    pull.add_argument("artifact", metavar="STAGE[/KEY]", help="what to download; KEY where several are published")
    pull.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="where to (default: ./STAGE)")
    verify = _verb(
        verbs, "verify", "read and verify every byte of a run's artifacts and checkpoints", "medjob verify -f jobs/demo.yaml", True
    )
    gc = _verb(verbs, "gc", "list what nothing refers to any more; with --delete, remove it", "medjob gc -f jobs/demo.yaml --delete", True)
    gc.add_argument("--delete", action="store_true", help="remove it; without this flag nothing is changed")
    for verb in (ls, pull, verify, gc):
        verb.add_argument("--run", metavar="NAME", help="with --store: which run")


class _Parser(argparse.ArgumentParser):
    """argparse, with the table's code for a wrong flag."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        sys.stderr.write(f"error: {message}\nhint: {self.prog} --help\n")
        sys.exit(ConfigError.exit_code)


def _verb(
    verbs: argparse._SubParsersAction[_Parser], name: str, summary: str, example: str, takes_store: bool = False
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=summary, description=f"{summary}.", epilog=f"example: {example}")
    where = verb.add_mutually_exclusive_group(required=True)
    where.add_argument("-f", "--file", action="append", type=Path, metavar="FILE", help="run file (repeatable; later ones win)")
    if takes_store:
        where.add_argument("--store", metavar="URI", help="look into this store, without a run file: file://, s3:// or gs://")
    verb.add_argument("--set", action="append", default=[], metavar="a.b=c", help="set one value, written as in YAML (repeatable)")
    verb.add_argument("--debug", action="store_true", help="show debug messages, and tracebacks instead of errors")
    return verb


def _run(arguments: argparse.Namespace) -> None:
    if arguments.verb in _STORE_VERBS:
        _STORE_VERBS[arguments.verb](arguments, *_place(arguments))
        return
    job = _job(arguments)
    match arguments.verb:
        case "show":
            _show(job)
        case "plan":
            _plan(job, arguments.gpu)
        case "run":
            _run_line(job, arguments.until or STAGES[-1].name, arguments.dry_run)
        case stage:
            _run_stage(job, get_stage(stage))


def _job(arguments: argparse.Namespace) -> Job:
    from medjob.config import load_job

    sets = list(arguments.set)
    if getattr(arguments, "model", None):
        sets.append(f"run.evaluate.extra_models={arguments.model}")
    return load_job(arguments.file, sets)


def _place(arguments: argparse.Namespace) -> tuple[Store, str | None]:
    """The store that a verb looks into, and the run."""
    from medjob.config.load import store_ref
    from medjob.store import open_store

    if arguments.store is None:
        job = _job(arguments)
        return open_store(job.cluster.store), arguments.run or job.run.name
    if arguments.run is None and arguments.verb != "ls":
        raise ConfigError("--store: needs --run NAME as well", f"medjob ls --store {arguments.store} lists the runs")
    return open_store(store_ref(arguments.store, arguments.set)), arguments.run


def _show(job: Job) -> None:
    import yaml

    print(yaml.safe_dump(job.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True), end="")


def _plan(job: Job, gpu: str | None) -> None:
    from medjob.planning import plan_lines

    print("\n".join(plan_lines(job, gpu)))


def _ls(_: argparse.Namespace, store: Store, run: str | None) -> None:
    from medjob.listing import artifacts_table, runs_table

    print(artifacts_table(store, run) if run else runs_table(store))


def _pull(arguments: argparse.Namespace, store: Store, run: str) -> None:
    from medjob import upkeep
    from medjob.listing import size_of

    artifact, manifest = upkeep.find_published(store, run, arguments.artifact)
    folder = arguments.output or Path(artifact.stage)
    upkeep.pull(artifact, manifest, folder)
    print(f"{artifact.prefix}: {len(manifest.files)} files, {size_of(sum(file.size for file in manifest.files))}, verified, in {folder}")


def _verify(_: argparse.Namespace, store: Store, run: str) -> None:
    from medjob import upkeep
    from medjob.listing import checks_table

    checks = list(upkeep.verify(store, run))
    print(checks_table(checks))
    problems = [problem for check in checks for problem in check.problems]
    for problem in problems:
        print(problem)
    if problems:
        raise InputError(f"{run}: {len(problems)} of {sum(check.files for check in checks)} files are damaged or missing")


def _gc(arguments: argparse.Namespace, store: Store, run: str) -> None:
    from medjob import upkeep
    from medjob.listing import size_of, waste_table

    found = upkeep.waste(store, run)
    print(waste_table(found))
    size = size_of(sum(waste.size for waste in found))
    if not arguments.delete:
        if found:
            print(f"nothing was removed; --delete frees {size}")
        return
    for waste in found:
        upkeep.remove(store, waste)
    print(f"removed, {size} freed")


_STORE_VERBS: dict[str, Callable[..., None]] = {"ls": _ls, "pull": _pull, "verify": _verify, "gc": _gc}


def _run_line(job: Job, until: str, dry_run: bool) -> None:
    from medjob.listing import plan_table
    from medjob.runner import Line
    from medjob.store import probe

    line = Line.open(job)
    stages = STAGES[: STAGES.index(get_stage(until)) + 1]
    if dry_run:
        print(plan_table(line, stages))
        return
    line.refuse_several_nodes(stages)
    probe(line.store)
    for stage in stages:
        _print_result(line, stage, line.run(stage).metrics)


def _run_stage(job: Job, stage: Stage) -> None:
    from medjob.runner import Line
    from medjob.store import probe

    line = Line.open(job)
    probe(line.store)
    if stage.name != "fetch" and not line.node(stage).rank:
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
