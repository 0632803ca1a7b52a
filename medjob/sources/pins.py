"""`pins.json`, which `fetch` publishes."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, ValidationError

from medjob.artifacts.artifact import Artifact, Manifest
from medjob.errors import InputError

PINS = "pins.json"


class Pins(BaseModel):
    """The commit or digest of every model and data set of a run, by the reference's key. It has no
    local paths."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    hub: dict[str, str] = {}
    """Commits."""
    buckets: dict[str, str] = {}
    """Digests of the copied objects."""
    packages: dict[str, str] = {}
    """Digests of files in installed packages. A machine that lacks the package computes keys from
    them."""
    local: tuple[str, ...] = ()
    """Digests of local directories and files."""

    @classmethod
    def of(cls, artifact: Artifact, manifest: Manifest) -> Pins:
        """Read the pins of a published `fetch`.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            return cls.model_validate_json(artifact.read(manifest, PINS))
        except ValidationError as error:
            # The bytes are verified, so another version of medjob wrote them.
            reason = error.errors()[0]["msg"]
            raise InputError(
                f"{artifact.prefix}: {PINS} was written by another version of medjob: {reason}"
            ) from None

    def by_key(self) -> dict[str, str]:
        """Return the pins that hold on every machine, by the reference's key."""
        return self.hub | self.buckets | self.packages

    def dump(self) -> str:
        """Return the contents of the file."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True)
