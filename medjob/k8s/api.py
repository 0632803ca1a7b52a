"""A small client for the Kubernetes API, with plain dictionaries as objects.

It uses the transport and the authentication of the `kubernetes` package (37.x), but not its
generated classes. Those reject fields that they do not know, but objects that Helm rendered must
reach the server unchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medjob.errors import ConfigError, RetryError

Object = dict[str, Any]
TIMEOUT_S = 15.0
_BATCH, _CORE, _LEASES = "/apis/batch/v1", "/api/v1", "/apis/coordination.k8s.io/v1"
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class AlreadyExists(Exception):
    """An object of this name already exists, or has changed since it was read."""


class QuotaExceeded(RetryError):
    """The request exceeds a quota, which may have room for it later."""


class Api:
    """Access to the objects of one namespace.

    Every method raises RetryError if the same request may succeed later, and ConfigError if not.
    """

    def __init__(self, client: Any, namespace: str) -> None:
        self._client = client
        self.namespace = namespace

    @classmethod
    def connect(cls, context: str | None = None, namespace: str | None = None) -> Api:
        """Connect as the pod's service account, or outside a pod with the kubeconfig.

        Raises:
            ConfigError: the kubeconfig is missing or invalid, or has no such context.
        """
        from kubernetes.client import ApiClient, Configuration
        from kubernetes.config import ConfigException, load_incluster_config, load_kube_config
        from yaml import YAMLError

        configuration = Configuration()
        try:
            if context is None and "KUBERNETES_SERVICE_HOST" in os.environ and _NAMESPACE.exists():
                load_incluster_config(client_configuration=configuration)
                namespace = namespace or _NAMESPACE.read_text().strip()
            else:
                load_kube_config(context=context, client_configuration=configuration)
                namespace = namespace or _namespace_of(context)
        except (ConfigException, OSError, YAMLError, TypeError, ValueError) as error:
            raise ConfigError(
                f"cannot connect to a cluster: {error}",
                "kubectl config get-contexts lists the contexts; KUBECONFIG names the file",
            ) from None
        # The client retries only requests that may be sent twice. Callers handle failed creates.
        configuration.retries = 2
        # Without keep-alive, following a log over a dead connection hangs for ever.
        configuration.keep_alive = True
        return cls(ApiClient(configuration), str(namespace))

    @property
    def server(self) -> str:
        """URL of the API server."""
        return str(self._client.configuration.host)

    # ---- jobs and pods

    def jobs(self, selector: str) -> list[Object]:
        """List the Jobs that match a label selector."""
        return list(self._get(self._path(_BATCH, "jobs"), labelSelector=selector)["items"])

    def job(self, name: str) -> Object | None:
        """Return a Job, or None."""
        return self._send("GET", self._path(_BATCH, "jobs", name), None, missing_is_fine=True)

    def pods(self, selector: str) -> list[Object]:
        """List the pods that match a label selector."""
        return list(self._get(self._path(_CORE, "pods"), labelSelector=selector)["items"])

    def create_job(self, manifest: Object, dry_run: bool = False) -> Object:
        """Create a Job, or have the server check it in a dry run. Raises AlreadyExists."""
        return self._create(self._path(_BATCH, "jobs"), manifest, dry_run)

    def check_pod(self, manifest: Object) -> None:
        """Have the server check a pod in a dry run.

        It checks Pod Security, service account and priority class only for pods.
        """
        self._create(self._path(_CORE, "pods"), manifest, dry_run=True)

    def delete_job(self, name: str) -> None:
        """Delete a Job and its pods, which get their grace period.

        Without a propagation policy the pods would keep running without an owner.
        """
        self._send(
            "DELETE",
            self._path(_BATCH, "jobs", name),
            {"propagationPolicy": "Background"},
            missing_is_fine=True,
        )

    def patch_job(self, name: str, patch: Object) -> None:
        """Change fields of a Job by a JSON merge patch."""
        self._send(
            "PATCH",
            self._path(_BATCH, "jobs", name),
            patch,
            content_type="application/merge-patch+json",
        )

    def log(self, pod: str, follow: bool = False) -> Iterator[bytes]:
        """Yield a pod's log in chunks. Raises RetryError if the connection breaks."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        path = self._path(_CORE, "pods", pod) + "/log"
        try:
            query: dict[str, Any] = {"container": "medjob"}  # a service mesh adds other containers
            if follow:
                query["follow"] = True
            yield from self._open("GET", path, None, query, timeout=None).stream(65536)
        except ApiException as error:
            raise _translate("GET", path, error) from None
        except HTTPError as error:
            raise RetryError(
                f"the connection broke while reading the log of {pod}: {error}",
                "run the command again; it shows the log from the beginning",
            ) from None

    # ---- other objects

    def events(self, kind: str, name: str) -> list[Object]:
        """List the Events about an object, oldest first."""
        found = self._get(
            self._path(_CORE, "events"),
            fieldSelector=f"involvedObject.kind={kind},involvedObject.name={name}",
        )["items"]
        return sorted(
            found, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or ""
        )

    def create_event(self, event: Object) -> None:
        """Create an Event."""
        self._create(self._path(_CORE, "events"), event, dry_run=False)

    def has_secret(self, name: str) -> bool:
        """Whether a Secret exists. Raises ConfigError if the user may not read it."""
        return (
            self._send("GET", self._path(_CORE, "secrets", name), None, missing_is_fine=True)
            is not None
        )

    def has_local_queue(self, name: str) -> bool:
        """Whether a LocalQueue of Kueue exists.

        Raises ConfigError if Kueue is not installed or the user may not read the queue.
        """
        group = self._send("GET", "/apis/kueue.x-k8s.io", None, missing_is_fine=True)
        if group is None:
            raise ConfigError(
                "Kueue is not installed in this cluster", "install it, or remove cluster.queue"
            )
        version = f"/apis/{group['preferredVersion']['groupVersion']}"
        return (
            self._send("GET", self._path(version, "localqueues", name), None, missing_is_fine=True)
            is not None
        )

    def config_map(self, name: str) -> Object | None:
        """Return a ConfigMap, or None."""
        return self._send("GET", self._path(_CORE, "configmaps", name), None, missing_is_fine=True)

    def annotate_config_map(self, name: str, annotations: dict[str, str | None]) -> None:
        """Set annotations of a ConfigMap. The value None removes an annotation."""
        patch = {"metadata": {"annotations": annotations}}
        self._send(
            "PATCH",
            self._path(_CORE, "configmaps", name),
            patch,
            content_type="application/merge-patch+json",
        )

    def lease(self, name: str) -> Object | None:
        """Return a Lease, or None."""
        return self._send("GET", self._path(_LEASES, "leases", name), None, missing_is_fine=True)

    def create_lease(self, lease: Object) -> Object:
        """Create a Lease. Raises AlreadyExists."""
        return self._create(self._path(_LEASES, "leases"), lease, dry_run=False)

    def replace_lease(self, lease: Object) -> Object:
        """Replace a Lease. Raises AlreadyExists if it has changed since it was read."""
        return (
            self._send("PUT", self._path(_LEASES, "leases", lease["metadata"]["name"]), lease) or {}
        )

    # ---- requests

    def _path(self, group: str, kind: str, name: str = "") -> str:
        return f"{group}/namespaces/{self.namespace}/{kind}" + (f"/{name}" if name else "")

    def _get(self, path: str, **query: str) -> Object:
        return self._send("GET", path, None, query=query) or {}

    def _create(self, path: str, manifest: Object, dry_run: bool) -> Object:
        query = {"fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        return self._send("POST", path, manifest, query=query) or {}

    def _send(
        self,
        method: str,
        path: str,
        body: Object | None,
        query: dict[str, str] | None = None,
        content_type: str = "application/json",
        missing_is_fine: bool = False,
    ) -> Object | None:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return dict(json.loads(self._open(method, path, body, query or {}, content_type).data))
        except ApiException as error:
            if error.status == 404 and missing_is_fine:
                return None
            raise _translate(method, path, error) from None
        except (HTTPError, ValueError, TypeError) as error:
            # The answer is incomplete, or a proxy answered instead of the server.
            raise RetryError(
                f"the API server's answer is incomplete or invalid: {error}",
                "kubectl cluster-info shows whether the server is reachable",
            ) from None

    def _open(
        self,
        method: str,
        path: str,
        body: Object | None,
        query: dict[str, Any],
        content_type: str = "application/json",
        timeout: Any = TIMEOUT_S,
    ) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        request = self._client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = self._client.call_api(*request, _request_timeout=timeout).response
            if not 200 <= response.status <= 299:
                raise ApiException(
                    status=response.status,
                    reason=response.reason,
                    body=response.data.decode(errors="replace"),
                )
        except HTTPError as error:
            raise RetryError(
                f"the API server cannot be reached: {error}",
                "kubectl cluster-info shows whether it is reachable",
            ) from None
        return response


def _namespace_of(context: str | None) -> str:
    """Return the namespace of a context in the kubeconfig.

    `list_kube_config_contexts` needs a current context even if another one is named, so it is not
    used.
    """
    from kubernetes.config.kube_config import KUBE_CONFIG_DEFAULT_LOCATION, KubeConfigMerger

    config = KubeConfigMerger(KUBE_CONFIG_DEFAULT_LOCATION).config
    named = config["contexts"].get_with_name(context or config["current-context"])
    return named["context"].safe_get("namespace") or "default"


def _translate(method: str, path: str, error: Any) -> Exception:
    """Translate an error response of the API."""
    try:
        message = str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        message = f"{error.status} {error.reason}"
    if error.status == 409:
        return AlreadyExists(message)
    if error.status == 403 and "exceeded quota" in message:
        return QuotaExceeded(message)
    if error.status == 401:  # a token is being renewed, or the server has just started
        return RetryError(
            f"the API server does not accept the credentials: {message}",
            "kubectl auth whoami shows which user it recognizes",
        )
    if error.status == 429 or error.status >= 500:
        return RetryError(f"the API server is busy: {message}")
    target = "/".join(path.partition("/namespaces/")[2].split("/")[1:]) or path
    hint = "kubectl auth can-i --list shows your permissions" if error.status == 403 else ""
    return ConfigError(f"the API server rejects {method} {target}: {message}", hint)
