"""`cluster.store`: where artifacts are stored, and how to connect to it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from medjob.config.addresses import check_bucket_uri, refuse_credentials
from medjob.config.base import Kubernetes, Seconds, or_string

URI_PATTERN = r"^(file://.+|(s3|gs)://[a-zA-Z0-9][a-zA-Z0-9._-]+(/.*)?)$"


class StoreRef(Kubernetes):
    """A store: either its `uri` as a plain string, or these fields.

    Credentials do not belong here. The SDKs read them from the environment.
    """

    model_config = ConfigDict(json_schema_extra=or_string)

    uri: Annotated[str, Field(pattern=URI_PATTERN)] = "file://runs"
    """`file://FOLDER` (absolute, or relative to the working directory), `s3://BUCKET/PREFIX` or
    `gs://BUCKET/PREFIX`."""
    endpoint: str | None = None
    """URL of an S3-compatible store or an emulator. Default: `AWS_ENDPOINT_URL` or
    `STORAGE_EMULATOR_HOST`, else the endpoint of AWS or Google Cloud."""
    region: str | None = None
    """Region of an S3 bucket. Default: looked up from the bucket."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """S3: whether the bucket name is part of the path or of the host name (`virtual`). Many
    S3-compatible stores need `path`."""
    request_checksum_calculation: Literal["when_supported", "when_required"] = "when_supported"
    """S3: use `when_required` for stores that reject CRC32C checksums, which S3 introduced in 2022.
    Requests are then signed with the SHA-256 of their body."""
    kms_key: str | None = None
    """Key for encryption at rest: the ARN of a KMS key for S3 (SSE-KMS), a resource name for
    GCS."""
    requester_pays: bool = False
    """S3: bill requests to your account instead of the bucket's owner."""
    user_project: str | None = None
    """GCS: project to bill for requests to a requester-pays bucket."""
    anonymous: bool = False
    """Send no credentials, to read public buckets."""
    single_writer: bool = False
    """Use a store that ignores conditional writes. You must ensure that only one process on one
    machine writes to it. Refused on a cluster."""
    retry_seconds: Seconds = 120
    """Seconds for which a failing request (5xx, 429, timeout) is retried before the stage exits
    with code 75."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        fields = {"uri": value} if isinstance(value, str) else value
        if isinstance(fields, dict):
            # First of all, since the messages of other checks contain the value.
            for name in ("uri", "endpoint"):
                if isinstance(fields.get(name), str):
                    refuse_credentials(f"cluster.store.{name}", fields[name])
            if isinstance(fields.get("uri"), str):
                check_bucket_uri("cluster.store", fields["uri"])
        return fields

    @model_validator(mode="after")
    def _options_fit_the_scheme(self) -> StoreRef:
        scheme = self.uri.partition("://")[0]
        for name, schemes in _ONLY_FOR.items():
            field = StoreRef.model_fields[name]
            if scheme not in schemes and getattr(self, name) != field.default:
                raise ValueError(
                    f"{field.alias} is only valid for "
                    f"{' and '.join(f'{s}://' for s in schemes)} stores "
                    f"(got {self.uri!r})"
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
