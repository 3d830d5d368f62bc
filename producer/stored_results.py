"""Reads results that a worker wrote to an S3-compatible store. Loads boto3 only when there is one to read."""

from typing import Any
from urllib.parse import urlsplit

from producer.errors import ResultStoreError


def read_object(url: str, endpoint_url: str | None) -> bytes:
    """The bytes behind `s3://bucket/key`. Credentials come from boto3's own chain. Raises ResultStoreError."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise ResultStoreError(f"the result lies at {url}; reading it needs: pip install promptmill[s3]") from error
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.netloc:
        raise ResultStoreError(f"the result lies at {url}, which is no s3://bucket/key; read it by other means")
    try:
        client = boto3.client("s3", endpoint_url=endpoint_url)
        found: Any = client.get_object(Bucket=parts.netloc, Key=parts.path.lstrip("/"))
        body: bytes = found["Body"].read()
    except (BotoCoreError, ClientError, ValueError) as error:
        raise ResultStoreError(
            f"the result at {url} cannot be read from {endpoint_url or 'AWS S3'}: {error}; check the credentials and "
            "PROMPTMILL_S3_ENDPOINT_URL"
        ) from error
    return body
