"""The Lease that lets only one orchestrator of a run act at a time.

Two of them overlap for about a second in an upgrade, and longer when a node is cut off.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from medjob.errors import MedjobError
from medjob.k8s.api import AlreadyExists, Api

DURATION_S = 15.0
_RENEW_S = 5.0


def owner_reference(config_map: Mapping[str, Any]) -> dict[str, Any]:
    """Return a reference that makes Kubernetes delete an object together with the ConfigMap.

    It does not set blockOwnerDeletion, which needs a right on finalizers in some clusters.
    """
    meta = config_map["metadata"]
    return {"apiVersion": "v1", "kind": "ConfigMap", "name": meta["name"], "uid": meta["uid"]}


class Lease:
    """A lease that one process holds at a time.

    Clocks differ, so the times that another holder wrote are never compared with the local clock.
    Another holder's lease counts as expired if the object has not changed for its whole duration.
    """

    def __init__(
        self,
        api: Api,
        name: str,
        holder: str,
        clock: Callable[[], float] = time.monotonic,
        owner: str | None = None,
    ) -> None:
        self._api = api
        self._name = name
        self._holder = holder
        self._clock = clock
        self._owner = owner
        self._object: dict[str, Any] | None = None
        self._renewed_at = -math.inf
        self._seen_version = ""
        self._seen_at = 0.0
        self.term = 0
        """Fencing term: grows with each change of the holder to this process.

        What this process read in an earlier term may have changed since.
        """

    @property
    def held(self) -> bool:
        """Whether this process certainly holds the lease. Change nothing without it."""
        return self._clock() - self._renewed_at < DURATION_S * 2 / 3

    def acquire(self) -> bool:
        """Acquire the lease, or renew it when that is due; return whether it is held now."""
        if self._clock() - self._renewed_at < _RENEW_S:
            return True
        asked_at = self._clock()
        try:
            acquired = self._try_to_acquire()
        except AlreadyExists:  # another process was faster
            acquired = False
        if acquired:
            self._renewed_at = asked_at
        return acquired and self.held  # a slow answer may arrive after the time that it covers

    def release(self) -> None:
        """Give up the lease, so that the next process need not wait until it expires."""
        if self.held and self._object is not None:
            with contextlib.suppress(MedjobError, AlreadyExists):
                self._object["spec"]["holderIdentity"] = ""
                self._api.replace_lease(self._object)
        self._renewed_at = -math.inf

    def _try_to_acquire(self) -> bool:
        found = self._api.lease(self._name)
        if found is None:
            self._object = self._api.create_lease(self._manifest())
            self.term += 1
            return True
        holder = found["spec"].get("holderIdentity") or ""
        if holder not in ("", self._holder) and not self._has_expired(found):
            return False
        self._object = self._api.replace_lease({**found, "spec": self._spec()})
        if holder != self._holder:
            self.term += 1
        return True

    def _manifest(self) -> dict[str, Any]:
        owner = self._api.config_map(self._owner) if self._owner else None
        meta = {
            "name": self._name,
            "namespace": self._api.namespace,
            "ownerReferences": [owner_reference(owner)] if owner else [],
        }
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": meta,
            "spec": self._spec(),
        }

    def _spec(self) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "holderIdentity": self._holder,
            "leaseDurationSeconds": int(DURATION_S),
            "renewTime": now,
        }

    def _has_expired(self, found: dict[str, Any]) -> bool:
        """Whether the holder has not renewed the lease for its duration, by the local clock."""
        version = str(found["metadata"]["resourceVersion"])
        if self._seen_version != version:
            self._seen_version = version
            self._seen_at = self._clock()
        return self._clock() - self._seen_at > DURATION_S
