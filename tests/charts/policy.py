"""The `restricted` level of Pod Security.

See kubernetes.io/docs/concepts/security/pod-security-standards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
_SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
}


def violations(spec: dict[str, Any]) -> list[str]:
    """Return everything in a pod spec that the level forbids."""
    pod = spec.get("securityContext") or {}
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    found += [
        f"volume {volume['name']}"
        for volume in spec.get("volumes") or []
        if not set(volume) - {"name"} <= _VOLUMES
    ]
    found += [
        f"sysctl {sysctl['name']}"
        for sysctl in pod.get("sysctls") or []
        if sysctl["name"] not in _SYSCTLS
    ]
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in spec.get(kind) or []:
            found += [
                f"{container['name']}: {text}" for text in _container_violations(container, pod)
            ]
    return found


def _container_violations(container: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    own = container.get("securityContext") or {}
    capabilities = own.get("capabilities") or {}
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot"
    if own.get("runAsUser", pod.get("runAsUser")) == 0:
        yield "runAsUser"
    if (own.get("seccompProfile") or pod.get("seccompProfile") or {}).get("type") not in (
        "RuntimeDefault",
        "Localhost",
    ):
        yield "seccompProfile"
    if "ALL" not in (capabilities.get("drop") or []) or set(capabilities.get("add") or []) - {
        "NET_BIND_SERVICE"
    }:
        yield "capabilities"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if any(port.get("hostPort") for port in container.get("ports") or []):
        yield "hostPort"
