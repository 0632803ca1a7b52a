"""Commands for runs on a cluster.

`submit`, `preflight`, `status`, `logs`, `pause`, `resume` and `cancel` run on a user's machine,
`orchestrate` in a pod of the chart.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from medjob.cli.arguments import Commands, add_command, add_release_command, load_run_file_of
from medjob.errors import ConfigError
from medjob.stage import STAGES, stages_of

if TYPE_CHECKING:
    from medjob.config import RunFile
    from medjob.k8s.api import Api
    from medjob.k8s.client.release import Installed

_FILES = "-f jobs/o1-llama.yaml -f jobs/clusters/gke.yaml"


def add(commands: Commands) -> None:
    """Add the commands."""
    _add_submit(commands)
    preflight = add_command(
        commands,
        "preflight",
        "check the store, the permissions and a dry run of every Job; start nothing",
        f"medjob preflight {_FILES}",
    )
    preflight.set_defaults(call=_preflight)
    orchestrate = add_command(
        commands,
        "orchestrate",
        "run the pipeline inside the cluster; the chart's orchestrator pod does this",
        "medjob orchestrate -f /etc/medjob/job.yaml",
    )
    orchestrate.set_defaults(call=_orchestrate)
    _add_status(commands)
    _add_logs(commands)
    pause = add_release_command(
        commands,
        "pause",
        "save and stop the running stages, and start none until resume",
        "medjob pause demo -n medjob",
    )
    pause.set_defaults(call=_pause)
    resume = add_release_command(
        commands, "resume", "continue a paused run", "medjob resume demo -n medjob"
    )
    resume.set_defaults(call=_resume)
    cancel = add_release_command(
        commands,
        "cancel",
        "uninstall the release; running stages save and stop, and the store keeps everything",
        "medjob cancel demo -n medjob",
    )
    cancel.set_defaults(call=_cancel)


def _add_submit(commands: Commands) -> None:
    submit = add_command(
        commands,
        "submit",
        "run the pipeline on a cluster, after checks and a confirmation",
        f"medjob submit {_FILES} --dry-run",
        f"medjob submit {_FILES} --wait",
    )
    submit.add_argument(
        "--dry-run",
        action="store_true",
        help="run all checks and print the manifests; change nothing",
    )
    submit.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    submit.add_argument(
        "--wait",
        action="store_true",
        help="wait until the run ends, and exit with its exit code",
    )
    submit.add_argument(
        "--release", metavar="NAME", help="name of the release (default: the name of the run)"
    )
    submit.add_argument(
        "--chart",
        metavar="CHART",
        help="folder or oci:// address of the chart (default: charts/medjob of this checkout)",
    )
    submit.set_defaults(call=_submit)


def _add_status(commands: Commands) -> None:
    status = add_release_command(
        commands, "status", "show the state of a run", "medjob status demo -n medjob --watch"
    )
    status.add_argument(
        "--watch",
        action="store_true",
        help="update until the run ends, and exit with its exit code",
    )
    status.set_defaults(call=_status)


def _add_logs(commands: Commands) -> None:
    logs = add_release_command(
        commands,
        "logs",
        "print the log of a stage or of the orchestrator",
        "medjob logs demo sft -n medjob -f",
    )
    stages = [stage.name for stage in STAGES]
    logs.add_argument(
        "stage",
        metavar="STAGE",
        choices=["orchestrator", *stages],
        help=f"one of orchestrator, {', '.join(stages)}",
    )
    logs.add_argument(
        "-f", "--follow", action="store_true", help="keep printing until the log ends"
    )
    logs.add_argument(
        "--shard", type=int, metavar="I", help="the log of this shard, if the stage has several"
    )
    logs.set_defaults(call=_logs)


def _submit(arguments: argparse.Namespace) -> None:
    from medjob.k8s.api import Api
    from medjob.k8s.client import submit, watch
    from medjob.k8s.client.release import Installed
    from medjob.pipeline.consent import with_consent

    run_file = load_run_file_of(arguments)
    release = arguments.release or submit.release_name(run_file)
    chart = submit.find_chart(arguments.chart)
    submit.check_locally(run_file)
    api = Api.connect(run_file.cluster.context, run_file.cluster.namespace)
    rendered = submit.render(run_file, release, chart, api.namespace)
    submit.check_on_server(run_file, rendered, api)
    if arguments.dry_run:
        print(rendered)
        return
    print("\n".join(submit.describe(run_file, api)))
    if not arguments.yes:
        _ask(f"submit to namespace {api.namespace} as release {release}?")
    submit.install(with_consent(run_file), release, chart, api)
    print(f"submitted as release {release}; the run does not need this terminal")
    print(f"medjob status {release} -n {api.namespace} --watch shows its state")
    if arguments.wait:
        watch.follow(Installed(release, api))


def _ask(question: str) -> None:
    """Ask a yes-or-no question on the terminal.

    Raises:
        ConfigError: the answer is no, or stdin is not a terminal.
    """
    if not sys.stdin.isatty():
        raise ConfigError(
            "cannot ask for confirmation: stdin is not a terminal",
            "pass --yes, or YES=1 with make",
        )
    answer = ""
    with contextlib.suppress(EOFError):
        answer = input(f"{question} [y/N] ")
    if answer.strip().lower() not in ("y", "yes"):
        raise ConfigError("not confirmed; nothing was submitted")


def _preflight(arguments: argparse.Namespace) -> None:
    from medjob.k8s.api import Api

    run_file = load_run_file_of(arguments)
    folder = Path(arguments.file[0]).parent
    api = Api.connect(run_file.cluster.context, run_file.cluster.namespace)
    if (folder / "fetch.yaml").is_file():  # the manifests are mounted in a pod of the chart
        _check_in_pod(run_file, folder, api)
    else:
        _check_from_client(run_file, api)
    print("OK: every Job passes a dry run")


def _check_in_pod(run_file: RunFile, folder: Path, api: Api) -> None:
    from medjob.k8s import preflight
    from medjob.k8s.client import submit
    from medjob.k8s.orchestrator import main as orchestrator
    from medjob.pipeline.runner import Pipeline

    manifests = orchestrator.read_manifests(run_file, folder)
    preflight.check(Pipeline.open(run_file), api, manifests, submit.stage_names(run_file))


def _check_from_client(run_file: RunFile, api: Api) -> None:
    from medjob.k8s.client import submit
    from medjob.pipeline.consent import check_consent
    from medjob.pipeline.runner import Pipeline

    submit.check_locally(run_file)
    check_consent(Pipeline.open(run_file), stages_of(run_file.run, run_file.pipeline.until))
    release = submit.release_name(run_file)
    rendered = submit.render(run_file, release, submit.find_chart(None), api.namespace)
    submit.check_on_server(run_file, rendered, api)


def _orchestrate(arguments: argparse.Namespace) -> None:
    from medjob.k8s.orchestrator import main as orchestrator

    folder = Path(arguments.file[0]).parent
    print(orchestrator.orchestrate(load_run_file_of(arguments), folder))


def _installed(arguments: argparse.Namespace) -> Installed:
    from medjob.k8s.api import Api
    from medjob.k8s.client.release import Installed

    return Installed(arguments.release, Api.connect(arguments.context, arguments.namespace))


def _status(arguments: argparse.Namespace) -> None:
    from medjob.k8s.client import status, watch

    installed = _installed(arguments)
    if arguments.watch:
        watch.follow(installed)
    else:
        print("\n".join(status.table(installed)))


def _logs(arguments: argparse.Namespace) -> None:
    from medjob.k8s.client import status

    lines = status.log(_installed(arguments), arguments.stage, arguments.follow, arguments.shard)
    for line in lines:
        print(line, flush=arguments.follow)


def _pause(arguments: argparse.Namespace) -> None:
    from medjob.k8s.orchestrator.reconcile import PAUSED

    installed = _installed(arguments)
    installed.annotate({PAUSED: "true"})
    print(f"{installed.name}: pausing; running stages save and stop")
    print(f"medjob resume {installed.name} -n {installed.api.namespace} continues the run")


def _resume(arguments: argparse.Namespace) -> None:
    from medjob.k8s.orchestrator.reconcile import PAUSED

    installed = _installed(arguments)
    installed.annotate({PAUSED: None})
    print(f"{installed.name}: resumed")


def _cancel(arguments: argparse.Namespace) -> None:
    from medjob.k8s.client import submit

    installed = _installed(arguments)
    installed.values()  # fails if there is no such release
    submit.uninstall(installed.name, installed.api.namespace, arguments.context)
    print(f"{installed.name}: uninstalled; published artifacts and checkpoints remain in the store")
