"""Reads results that a worker wrote to an S3-compatible store, and deletes them. Loads boto3 only when there is one."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from producer.errors import ResultStoreError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MAX_READS_AT_ONCE = 16  # of one call; a read is mostly waiting

ObjectRead = bytes | ResultStoreError | None
"""What is behind a URL: its bytes, or why this one object is not to be had. None: the bucket has no such key."""

_connecting = threading.Lock()  # boto3's default session makes clients for one thread at a time


def read_objects(urls: Sequence[str], endpoint_url: str | None) -> list[ObjectRead]:
    """See `read_object`, of each URL, side by side. Raises ResultStoreError, the first in order."""
    if len(urls) == 1:
        return [read_object(urls[0], endpoint_url)]
    # Threads of this call alone: a pool kept for the next one would be without threads in a forked process.
    with ThreadPoolExecutor(min(len(urls), MAX_READS_AT_ONCE), thread_name_prefix="promptmill-results") as pool:
        return list(pool.map(lambda url: read_object(url, endpoint_url), urls))


def read_object(url: str, endpoint_url: str | None) -> ObjectRead:
    """The bytes behind `s3://bucket/key`. Raises ResultStoreError for what other objects would meet as well."""
    bucket, key = _parse(url)
    from producer.s3_connection import S3_ERRORS, is_missing_key, is_refused_object

    try:
        with _connect(endpoint_url).get_object(Bucket=bucket, Key=key)["Body"] as body:
            return body.read()
    except (*S3_ERRORS, ValueError) as error:
        if is_missing_key(error):
            return None
        if is_refused_object(error):
            message = f"the result at {url} may not be read: {error}; grant s3:GetObject on it to these credentials"
            return ResultStoreError(message)
        raise ResultStoreError(
            f"the result at {url} cannot be read from {endpoint_url or 'AWS S3'}: {error}; check the credentials and "
            "PROMPTMILL_S3_ENDPOINT_URL"
        ) from error


def delete_object(url: str, endpoint_url: str | None) -> None:
    """What is behind `s3://bucket/key`, if anything. Raises ResultStoreError."""
    bucket, key = _parse(url)
    from producer.s3_connection import S3_ERRORS

    try:
        _connect(endpoint_url).delete_object(Bucket=bucket, Key=key)
    except (*S3_ERRORS, ValueError) as error:
        raise ResultStoreError(
            f"the result at {url} cannot be deleted: {error}; try again, or grant s3:DeleteObject on it to these "
            "credentials"
        ) from error


def _parse(url: str) -> tuple[str, str]:
    """Bucket and key. Raises ResultStoreError, also where boto3 is not installed."""
    try:
        import producer.s3_connection  # noqa: F401
    except ImportError as error:
        raise ResultStoreError(f"the result is at {url}; reading it needs: pip install 'promptmill[s3]'") from error
    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.netloc:
        raise ResultStoreError(f"the result is at {url}, which is not an s3://bucket/key URL; read it by other means")
    return parts.netloc, parts.path.lstrip("/")


def _connect(endpoint_url: str | None) -> "S3Client":
    with _connecting:
        return _client(endpoint_url)


@cache
def _client(endpoint_url: str | None) -> "S3Client":
    """One for all results: making it takes 10 ms, and it keeps its connections."""
    from producer.s3_connection import connect

    return connect(endpoint_url)
