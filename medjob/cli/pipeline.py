"""Commands that work on this machine: run, one per stage, plan, show and outcome."""

from __future__ import annotations

import argparse
import codecs
import json
import logging
import sys
from typing import TYPE_CHECKING

from medjob.cli import calibrate
from medjob.cli.arguments import Commands, Parser, add_command, load_run_file_of
from medjob.config.stages import unused_sections
from medjob.errors import ConfigError
from medjob.stage import ROW_STAGES, STAGES, Stage, get_stage, stages_of

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from medjob.artifacts.artifact import Manifest
    from medjob.config import Run
    from medjob.launch.nodes import Node
    from medjob.pipeline.runner import Pipeline


def add_run(commands: Commands) -> None:
    """Add `run` and one command per stage."""
    run = add_command(
        commands,
        "run",
        "run the pipeline on this machine, and skip stages that are already published",
        "medjob run -f jobs/demo.yaml",
        "medjob run -f jobs/demo.yaml --until sft",
        "medjob run -f jobs/demo.yaml --only evaluate",
        "medjob run -f jobs/demo.yaml --dry-run",
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="list the stages that are published and those that would run; run nothing",
    )
    _add_yes(run)
    names = [stage.name for stage in STAGES]
    which = run.add_mutually_exclusive_group()
    which.add_argument("--until", metavar="STAGE", choices=names, help="stop after this stage")
    which.add_argument(
        "--only",
        metavar="STAGE",
        choices=names,
        help="run this stage only, whose inputs must be published; the same as `medjob STAGE`",
    )
    run.set_defaults(call=_run_pipeline)
    for stage in STAGES:
        _add_stage(commands, stage)


def _add_stage(commands: Commands, stage: Stage) -> None:
    examples = [f"medjob {stage.name} -f jobs/demo.yaml"]
    if stage.name == "evaluate":
        examples.append("medjob evaluate -f jobs/demo.yaml --model ./my-model")
    if stage.name == "judge":
        examples += calibrate.EXAMPLES
    command = add_command(commands, stage.name, stage.summary, *examples)
    if stage.name == "evaluate":
        command.add_argument(
            "--model",
            action="append",
            default=[],
            metavar="PATH|HUB_ID|ENDPOINT",
            help="evaluate this model too (repeatable)",
        )
    if stage.name in ROW_STAGES:
        command.add_argument(
            "--shard",
            metavar="INDEX",
            help=f"compute only this one of resources.{stage.name}.shards, from 0 "
            "(default: MEDJOB_SHARD, or all)",
        )
    if stage.name in ("judge", "evaluate"):
        _add_yes(command)
    if stage.name == "judge":
        calibrate.add_arguments(command)
    command.set_defaults(call=_run_stage, stage=stage, yes=False)


def _add_yes(command: Parser) -> None:
    command.add_argument(
        "--yes",
        action="store_true",
        help="agree that rows are sent to the endpoints that the run file names",
    )


def add_inspect(commands: Commands) -> None:
    """Add `plan`, `show` and `outcome`, which run nothing."""
    plan = add_command(
        commands,
        "plan",
        "estimate memory, steps, hours and cost; run nothing",
        "medjob plan -f jobs/demo.yaml",
        "medjob plan -f jobs/o1-llama.yaml --gpu H100",
    )
    plan.add_argument(
        "--gpu",
        metavar="NAME",
        help="plan for this GPU (H100, A100-80, L4, ...) instead of the GPUs in the profiles",
    )
    plan.set_defaults(call=_plan)
    show = add_command(
        commands,
        "show",
        "print the run file with all defaults filled in",
        "medjob show -f jobs/demo.yaml --set run.seed=7",
        "medjob show -f jobs/qa-smollm2.yaml -f jobs/presets/qa-fast.yaml",
    )
    show.set_defaults(call=_show)
    outcome = add_command(
        commands,
        "outcome",
        "print how the newest attempt of a stage ended, and exit with its exit code",
        "torchrun --nproc-per-node 8 -m medjob sft -f run.yaml; medjob outcome sft -f run.yaml",
    )
    outcome.add_argument("stage", choices=[stage.name for stage in STAGES], metavar="STAGE")
    outcome.set_defaults(call=_outcome)


def _run_pipeline(arguments: argparse.Namespace) -> None:
    from medjob.cli.tables import plan_table
    from medjob.launch.nodes import ONE_NODE
    from medjob.pipeline import consent
    from medjob.pipeline.runner import Pipeline
    from medjob.store import probe

    pipeline = Pipeline.open(load_run_file_of(arguments), arguments.yes)
    stages = _chosen_stages(pipeline.run_file.run, arguments)
    for text in unused_sections(pipeline.run_file.run):
        _log.warning("%s", text)
    if arguments.dry_run:
        print("\n".join([plan_table(pipeline, stages), *consent.lines(pipeline, stages)]))
        return
    pipeline.refuse_other_processes(stages)
    consent.check_consent(pipeline, stages)
    probe(pipeline.store)
    for stage in stages:
        _run_and_print(pipeline, stage, ONE_NODE)


def _chosen_stages(run: Run, arguments: argparse.Namespace) -> tuple[Stage, ...]:
    for name in filter(None, (arguments.until, arguments.only)):
        _check_has_stage(run, name)
    if arguments.only:
        return tuple(get_stage(name) for name in dict.fromkeys(("fetch", arguments.only)))
    return stages_of(run, arguments.until)


def _check_has_stage(run: Run, name: str) -> None:
    names = [stage.name for stage in stages_of(run)]
    if name not in names:
        raise ConfigError(
            f"{name} is not a stage of this run (run.stages: {', '.join(names[1:])})",
            f"add it with --set 'run.stages=[{', '.join([*names[1:], name])}]'",
        )


def _run_stage(arguments: argparse.Namespace) -> None:
    from medjob.launch.external import launched
    from medjob.pipeline.runner import Pipeline
    from medjob.pipeline.shards import shard_of_process
    from medjob.store import probe

    stage: Stage = arguments.stage
    if stage.name == "judge" and calibrate.was_asked(arguments):
        calibrate.calibrate(arguments)
        return
    if stage.name == "evaluate" and arguments.model:
        _add_models(arguments)
    run_file = load_run_file_of(arguments)
    _check_has_stage(run_file.run, stage.name)
    with launched(run_file, stage.name) as (run_file, node):
        pipeline = Pipeline.open(run_file, arguments.yes)
        probe(pipeline.store)
        if stage.name != "fetch" and node.rank == 0:
            # Pins models and data that a flag has added. Does nothing if they are already pinned.
            pipeline.run(get_stage("fetch"))
        shard = shard_of_process(run_file, stage, getattr(arguments, "shard", None))
        if shard is None:
            _run_and_print(pipeline, stage, node)
        else:
            _print_result(pipeline, stage, pipeline.run_shard(stage, shard))


def _add_models(arguments: argparse.Namespace) -> None:
    """Append `--model` to the run file's list, which `--set` alone would replace."""
    listed = load_run_file_of(arguments).run.evaluate.extra_models
    models = [*(model.model_dump() for model in listed), *arguments.model]
    text = json.dumps(models, ensure_ascii=False)  # JSON is YAML; repr escapes in another way
    arguments.set.append(f"run.evaluate.extra_models={text}")


def _run_and_print(pipeline: Pipeline, stage: Stage, node: Node) -> None:
    """Run a stage, and print its summary and the path of its report if it has them."""
    _print_result(pipeline, stage, pipeline.run(stage, node))


def _print_result(pipeline: Pipeline, stage: Stage, manifest: Manifest | None) -> None:
    from medjob.cli.tables import report_path

    if manifest is None:  # other shards are not finished
        return
    if "summary" in manifest.metrics:
        print(manifest.metrics["summary"])
    report = report_path(pipeline, stage)
    if report:
        print(f"{stage.name}: report {report}")


def _plan(arguments: argparse.Namespace) -> None:
    from medjob.pipeline import consent
    from medjob.pipeline.planning import plan_lines
    from medjob.pipeline.runner import Pipeline

    run_file = load_run_file_of(arguments)
    sent = consent.lines(Pipeline.open(run_file), stages_of(run_file.run))
    print("\n".join([*plan_lines(run_file, arguments.gpu), *sent]))


def _outcome(arguments: argparse.Namespace) -> None:
    """Read the record in the store: a launcher passes on neither exit code nor reason."""
    from medjob.errors import InputError, RetryError
    from medjob.pipeline.outcome import newest_record
    from medjob.pipeline.runner import Pipeline

    run_file = load_run_file_of(arguments)
    _check_has_stage(run_file.run, arguments.stage)
    artifact = Pipeline.open(run_file).artifact(get_stage(arguments.stage))
    if artifact.manifest() is not None:
        print(f"{artifact.stage}: published {artifact.prefix}")
        return
    epoch = artifact.epoch()
    if not epoch:
        raise InputError(
            f"{artifact.stage} was not started yet", f"`medjob {artifact.stage}` runs it"
        )
    record = newest_record(artifact)
    if record is None:
        raise RetryError(
            f"{artifact.stage}: attempt {epoch} has stored no outcome",
            "it is running, or it was killed: then start it again, and it resumes",
        )
    print(f"{artifact.stage}: attempt {epoch} ended with {record['exit_code']}: {record['reason']}")
    sys.exit(record["exit_code"])


def _show(arguments: argparse.Namespace) -> None:
    import yaml

    tree = load_run_file_of(arguments).model_dump(mode="json", by_alias=True)
    # Without Unicode the result has escapes, and is the same YAML.
    unicode = codecs.lookup(sys.stdout.encoding).name.startswith("utf-")
    print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=unicode), end="")
