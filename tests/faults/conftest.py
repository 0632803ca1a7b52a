"""The stores that faults are injected into: a folder, and strict S3 and GCS servers."""

from tests.support.store_fixtures import credentials, fake_gcs, fake_s3, open_gcs, open_s3

__all__ = ["credentials", "fake_gcs", "fake_s3", "open_gcs", "open_s3"]
