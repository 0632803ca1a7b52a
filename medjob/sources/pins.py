"""`pins.json`: what `fetch` publishes."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, ValidationError

from medjob.artifacts.artifact import Artifact, Manifest
from medjob.errors import InputError

PINS = "pins.json"


class Pins(BaseModel):
    """What stands behind every model and data set of a run when it was fetched, by spelling. Paths of this machine are not kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    hub: dict[str, str] = {}
    """Commits."""
    buckets: dict[str, str] = {}
    """Digests of what was copied."""
    packages: dict[str, str] = {}
    """Digests of files in installed packages: another machine may lack the package, and still has to know the keys."""
    local: tuple[str, ...] = ()
    """Digests of local folders and files."""

    @classmethod
    def of(cls, artifact: Artifact, manifest: Manifest) -> Pins:
        """Those of a published `fetch`.

        Raises:
            InputError: the file is missing or damaged.
        """
        try:
            return cls.model_validate_json(artifact.read(manifest, PINS))
        except ValidationError as error:  # its bytes are those that were published
            raise InputError(
                f"{artifact.prefix}: {PINS} is of another version of medjob: {error.errors()[0]['msg']}"
            ) from None

    def by_key(self) -> dict[str, str]:
        """The pin of each model and data set that another machine can know."""
        return self.hub | self.buckets | self.packages

    def dump(self) -> str:
        """As the file holds it."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True)
