"""S3 and S3-compatible object stores, through boto3."""
