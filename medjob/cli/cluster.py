"""Verbs of a run on a cluster: submit, preflight, status, logs, pause, resume, cancel; and orchestrate, which is a pod's."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from medjob.cli.arguments import Parser, add_verb, run_file_of
from medjob.errors import ConfigError
from medjob.stage import STAGES

if TYPE_CHECKING:
    from medjob.k8s.client.release import Installed

_FILES = "-f jobs/o1-llama.yaml -f jobs/clusters/gke.yaml"


def add(verbs: argparse._SubParsersAction[Parser]) -> None:
    """Add them to the command line."""
    submit = add_verb(
        verbs,
        "submit",
        "run the whole line on a cluster: checks, asks, installs the chart",
        f"medjob submit {_FILES} --dry-run",
    )
    submit.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and print the manifests; change nothing",
    )
    submit.add_argument("--yes", action="store_true", help="do not ask")
    submit.add_argument(
        "--wait",
        action="store_true",
        help="stay until the run has ended, and end with its exit code",
    )
    submit.add_argument(
        "--release", metavar="NAME", help="name of the release (default: the run's)"
    )
    submit.add_argument(
        "--chart",
        metavar="CHART",
        help="folder or oci:// address (default: charts/medjob of this checkout)",
    )
    submit.set_defaults(call=_submit)
    check = add_verb(
        verbs,
        "preflight",
        "check store, permissions and every Job as a dry run; start nothing",
        f"medjob preflight {_FILES}",
    )
    check.set_defaults(call=_preflight)
    walk = add_verb(
        verbs,
        "orchestrate",
        "walk the line from within the cluster (what the chart's small pod does)",
        "medjob orchestrate -f /etc/medjob/job.yaml",
    )
    walk.set_defaults(call=_orchestrate)
    status = _release_verb(
        verbs, "status", "how a run stands", "medjob status demo -n medjob --watch", _status
    )
    status.add_argument(
        "--watch",
        action="store_true",
        help="go on until the run has ended, and end with its exit code",
    )
    logs = _release_verb(verbs, "logs", "a stage's log", "medjob logs demo sft -n medjob -f", _logs)
    logs.add_argument(
        "stage",
        metavar="STAGE",
        choices=["orchestrator", *(stage.name for stage in STAGES)],
        help="whose",
    )
    logs.add_argument("-f", "--follow", action="store_true", help="go on until it ends")
    _release_verb(
        verbs,
        "pause",
        "save and stop what runs, and start nothing until resume",
        "medjob pause demo -n medjob",
        _pause,
    )
    _release_verb(verbs, "resume", "go on after a pause", "medjob resume demo -n medjob", _resume)
    _release_verb(
        verbs,
        "cancel",
        "uninstall the release: running stages save and stop, the bucket keeps everything",
        "medjob cancel demo -n medjob",
        _cancel,
    )


def _release_verb(
    verbs: argparse._SubParsersAction[Parser],
    name: str,
    summary: str,
    example: str,
    call: Callable[..., None],
) -> Parser:
    verb = verbs.add_parser(
        name, help=summary, description=f"{summary}.", epilog=f"example: {example}"
    )
    verb.add_argument("release", metavar="RELEASE", help="name of the release")
    verb.add_argument(
        "-n", "--namespace", metavar="NAME", help="where it is (default: the kubeconfig's)"
    )
    verb.add_argument(
        "--context", metavar="NAME", help="kubeconfig context (default: the current one)"
    )
    verb.add_argument(
        "--debug", action="store_true", help="show debug messages, and tracebacks instead of errors"
    )
    verb.set_defaults(call=lambda arguments: call(arguments, _installed(arguments)))
    return verb


def _installed(arguments: argparse.Namespace) -> Installed:
    from medjob.k8s.api import Api
    from medjob.k8s.client.release import Installed

    return Installed(arguments.release, Api.connect(arguments.context, arguments.namespace))


def _submit(arguments: argparse.Namespace) -> None:
    from medjob.k8s.api import Api
    from medjob.k8s.client import submit, watch
    from medjob.k8s.client.release import Installed

    config = run_file_of(arguments)
    release, chart = (
        arguments.release or submit.release_name(config),
        submit.chart_folder(arguments.chart),
    )
    submit.check_locally(config)
    api = Api.connect(config.cluster.context, config.cluster.namespace)
    rendered = submit.render(config, release, chart, api.namespace)
    submit.check_on_server(config, rendered, api)
    if arguments.dry_run:
        print(rendered)
        return
    print("\n".join(submit.describe(config, api)))
    _ask(f"submit to namespace {api.namespace} as release {release}?", arguments.yes)
    submit.install(config, release, chart, api)
    print(
        f"submitted. medjob status {release} -n {api.namespace} --watch shows how it stands; nothing of it needs this terminal"
    )
    if arguments.wait:
        watch.follow(Installed(release, api))


def _ask(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} Nobody is here to answer", "--yes, or YES=1 for make")
    answer = ""
    with contextlib.suppress(EOFError):
        answer = input(f"{question} [y/N] ")
    if answer.strip().lower() not in ("y", "yes"):
        raise ConfigError("nothing was submitted")


def _preflight(arguments: argparse.Namespace) -> None:
    from medjob.k8s import preflight
    from medjob.k8s.api import Api
    from medjob.k8s.client import submit
    from medjob.k8s.orchestrator import main as walk
    from medjob.pipeline.runner import Pipeline

    config = run_file_of(arguments)
    folder = Path(arguments.file[0]).parent
    api = Api.connect(config.cluster.context, config.cluster.namespace)
    if (folder / "fetch.yaml").is_file():  # in a pod of the chart
        preflight.check(Pipeline.open(config), api, walk.rendered(folder), submit.stages_of(config))
    else:
        submit.check_locally(config)
        rendered = submit.render(
            config, submit.release_name(config), submit.chart_folder(None), api.namespace
        )
        submit.check_on_server(config, rendered, api)
    print("all well: every Job passes as a dry run")


def _orchestrate(arguments: argparse.Namespace) -> None:
    from medjob.k8s.orchestrator import main as walk

    print(walk.orchestrate(run_file_of(arguments), Path(arguments.file[0]).parent))


def _status(arguments: argparse.Namespace, installed: Installed) -> None:
    from medjob.k8s.client import status, watch

    if arguments.watch:
        watch.follow(installed)
    else:
        print("\n".join(status.table(installed)))


def _logs(arguments: argparse.Namespace, installed: Installed) -> None:
    from medjob.k8s.client import status

    for line in status.log(installed, arguments.stage, arguments.follow):
        print(line, flush=arguments.follow)


def _pause(_: argparse.Namespace, installed: Installed) -> None:
    from medjob.k8s.orchestrator.reconcile import PAUSED

    installed.annotate({PAUSED: "true"})
    print(
        f"{installed.name}: what runs saves and stops; medjob resume {installed.name} -n {installed.api.namespace} goes on"
    )


def _resume(_: argparse.Namespace, installed: Installed) -> None:
    from medjob.k8s.orchestrator.reconcile import PAUSED

    installed.annotate({PAUSED: None})
    print(f"{installed.name}: goes on")


def _cancel(arguments: argparse.Namespace, installed: Installed) -> None:
    from medjob.k8s.client import submit

    installed.values()
    submit.uninstall(installed.name, installed.api.namespace, arguments.context)
    print(
        f"{installed.name}: uninstalled; what is published and every checkpoint stay in {installed.name}'s store"
    )
