"""The strict S3 and GCS servers, for runs whose models, data or artifacts are in buckets."""

from tests.store.conftest import credentials, fake_gcs, fake_s3

__all__ = ["credentials", "fake_gcs", "fake_s3"]
