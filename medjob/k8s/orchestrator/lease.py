"""A Lease that keeps two orchestrators of one run apart: they overlap for about a second in an upgrade, and longer when a node is cut off."""

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
    """What makes an object go with the release. Without blockOwnerDeletion: setting it needs a right on finalizers in some clusters."""
    meta = config_map["metadata"]
    return {"apiVersion": "v1", "kind": "ConfigMap", "name": meta["name"], "uid": meta["uid"]}


class Lease:
    """Held by one process at a time. Times of another holder are never compared with our clock: only whether it still renews."""

    def __init__(
        self,
        api: Api,
        name: str,
        holder: str,
        clock: Callable[[], float] = time.monotonic,
        owner: str | None = None,
    ) -> None:
        self._api, self._name, self._holder, self._clock, self._owner = (
            api,
            name,
            holder,
            clock,
            owner,
        )
        self._object: dict[str, Any] | None = None
        self._renewed = -math.inf
        self.term = 0
        """Counts how often it came to us from somebody else: what was seen in an earlier term may have changed."""
        self._seen: tuple[str, float] = ("", 0.0)

    @property
    def held(self) -> bool:
        """Whether it is ours for sure. Nothing may be changed without it."""
        return self._clock() - self._renewed < DURATION_S * 2 / 3

    def keep(self) -> bool:
        """Take it, or renew it when it is time to; whether it is ours now."""
        if self._clock() - self._renewed < _RENEW_S:
            return True
        began = self._clock()
        try:
            taken = self._take()
        except AlreadyExists:  # another one was faster
            taken = False
        if taken:
            self._renewed = began
        return taken and self.held  # answers that took longer than it is sure for are worth nothing

    def release(self) -> None:
        """Let the next one in at once."""
        if self.held and self._object is not None:
            with contextlib.suppress(MedjobError, AlreadyExists):
                self._object["spec"]["holderIdentity"] = ""
                self._api.replace_lease(self._object)
        self._renewed = -math.inf

    def _take(self) -> bool:
        found = self._api.lease(self._name)
        if found is None:
            meta = {
                "name": self._name,
                "namespace": self._api.namespace,
                "ownerReferences": self._owners(),
            }
            self._object = self._api.create_lease(
                {
                    "apiVersion": "coordination.k8s.io/v1",
                    "kind": "Lease",
                    "metadata": meta,
                    "spec": self._spec(),
                }
            )
            self.term += 1
            return True
        holder = found["spec"].get("holderIdentity") or ""
        if holder not in ("", self._holder) and not self._silent(found):
            return False
        self._object = self._api.replace_lease({**found, "spec": self._spec()})
        self.term += holder != self._holder
        return True

    def _owners(self) -> list[dict[str, Any]]:
        """The ConfigMap whose end is the Lease's too."""
        found = self._api.config_map(self._owner) if self._owner else None
        return [owner_reference(found)] if found else []

    def _spec(self) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "holderIdentity": self._holder,
            "leaseDurationSeconds": int(DURATION_S),
            "renewTime": now,
        }

    def _silent(self, found: dict[str, Any]) -> bool:
        """Whether its holder has not renewed it for its whole duration, by our clock."""
        version = str(found["metadata"]["resourceVersion"])
        if self._seen[0] != version:
            self._seen = (version, self._clock())
        return self._clock() - self._seen[1] > DURATION_S
