"""Where artifacts are kept, and how that place is reached."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from medjob.config.base import Kubernetes, or_string


class StoreRef(Kubernetes):
    """A folder or bucket; a plain string stands for its `uri`. Credentials are never written here: the SDKs find them."""

    model_config = ConfigDict(json_schema_extra=or_string)

    uri: Annotated[
        str, Field(pattern=r"^(file://.+|(s3|gs)://[a-zA-Z0-9][a-zA-Z0-9._-]+(/.*)?)$")
    ] = "file://runs"
    """`file://FOLDER` (relative to the working folder, or absolute), `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`."""
    endpoint: str | None = None
    """URL of an S3-compatible store or an emulator. Default: the cloud's own, or `AWS_ENDPOINT_URL`, `STORAGE_EMULATOR_HOST`."""
    region: str | None = None
    """Region of an S3 bucket. Default: asked of the bucket."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """S3: whether the bucket stands in the host's name; many S3-compatible stores need `path`."""
    request_checksum_calculation: Literal["when_supported", "when_required"] = "when_supported"
    """S3: `when_required` for stores that refuse the checksums of 2022 (CRC32C); bodies are then signed with their sha256."""
    kms_key: str | None = None
    """Key that the store encrypts objects with: its ARN for S3 (SSE-KMS), its resource name for GCS."""
    requester_pays: bool = False
    """S3: requests are billed to this account and not to the bucket's owner."""
    user_project: str | None = None
    """GCS: the project that is billed for requests to a requester-pays bucket."""
    anonymous: bool = False
    """Send no credentials: for reading public buckets."""
    single_writer: bool = False
    """For a store that ignores conditional writes: nothing but one process on one machine ever writes to it. Refused on a cluster."""
    retry_seconds: Annotated[float, Field(ge=0)] = 120
    """How long a failing request (5xx, 429, time-out) is tried again before the stage ends with exit code 75."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"uri": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_fit_the_scheme(self) -> StoreRef:
        scheme = self.uri.partition("://")[0]
        for name, schemes in _ONLY_FOR.items():
            field = StoreRef.model_fields[name]
            if scheme not in schemes and getattr(self, name) != field.default:
                raise ValueError(
                    f"{field.alias} is for {' and '.join(schemes)}:// stores (got {self.uri!r})"
                )
        return self


_ONLY_FOR = {
    "region": ("s3",),
    "addressing_style": ("s3",),
    "request_checksum_calculation": ("s3",),
    "requester_pays": ("s3",),
    "user_project": ("gs",),
    "endpoint": ("s3", "gs"),
    "kms_key": ("s3", "gs"),
    "anonymous": ("s3", "gs"),
}
