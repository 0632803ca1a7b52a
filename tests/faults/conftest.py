"""Stores for fault injection: a folder, and the strict S3 and GCS fakes."""

from tests.support.store_fixtures import credentials, fake_gcs, fake_s3, open_gcs, open_s3

__all__ = ["credentials", "fake_gcs", "fake_s3", "open_gcs", "open_s3"]
