"""How we speak to S3, at AWS or any endpoint of its protocol, and what its refusals mean. Needs boto3.

Credentials come from boto3's own chain.
"""

from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    NoCredentialsError,
    PartialCredentialsError,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 30
MAX_ATTEMPTS = 4
MAX_CONNECTIONS = 128  # kept open once made; more are made where more threads ask at once

S3_ERRORS = (BotoCoreError, ClientError)
_DENIED = ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled", "ExpiredToken")
_REFUSED_OBJECT = ("AccessDenied", "403", "Forbidden", "InvalidObjectState")  # the last is of one in an archive


def connect(
    endpoint_url: str | None, *, max_attempts: int | None = None, read_timeout_seconds: float = READ_TIMEOUT_SECONDS
) -> "S3Client":
    """Opens no connection yet. A client may be used by several threads. Raises BotoCoreError or ValueError.

    max_attempts: of one request, boto3's own backoff between them; by default `MAX_ATTEMPTS`.
    """
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        read_timeout=read_timeout_seconds,
        retries={"mode": "standard", "total_max_attempts": max_attempts or MAX_ATTEMPTS},
        max_pool_connections=MAX_CONNECTIONS,
        request_checksum_calculation="when_required",  # not every S3-compatible store knows the newer checksums
        response_checksum_validation="when_required",
    )
    client = boto3.client("s3", endpoint_url=endpoint_url, config=config)
    client.meta.events.register_last("before-call.s3", _send_at_once)
    client.meta.events.register("after-call.s3.GetObject", _refuse_cut_headers)
    return client


def _send_at_once(params: dict[str, Any], **_: Any) -> None:
    """Without asking for a go-ahead (`Expect: 100-continue`), which costs a round trip: a connection that ends in the
    middle of that answer leaves botocore in a loop without an end."""
    params["headers"].pop("Expect", None)


def _refuse_cut_headers(http_response: Any, **_: Any) -> None:
    """Python's HTTP client takes a connection that ends within a reply's headers for their end: an object would be read
    as one of no bytes. A whole reply says how its body ends."""
    headers = http_response.headers
    if http_response.status_code < 300 and "content-length" not in headers and "transfer-encoding" not in headers:
        raise ConnectionClosedError(endpoint_url=http_response.url)


def describe(bucket: str, endpoint_url: str | None) -> str:
    return f"bucket {bucket!r} at {endpoint_url or 'AWS'}"


def error_code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def is_missing_key(error: Exception) -> bool:
    """Whether the bucket answered, and has nothing under that key."""
    return isinstance(error, ClientError) and error_code(error) == "NoSuchKey"


def is_refused_object(error: Exception) -> bool:
    """Whether the store knows the credentials, and does not let them read what was asked for: others it may."""
    return isinstance(error, ClientError) and error_code(error) in _REFUSED_OBJECT


def explain(error: BotoCoreError | ClientError, where: str, *, flag: str, rights: str) -> str:
    """Why the bucket `where` cannot be used, and the remedy. `flag` names it; `rights` is what its user needs."""
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return (
            f"no credentials for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or an AWS profile ({error})"
        )
    if not isinstance(error, ClientError):
        return f"cannot reach {where}: check --s3-endpoint-url and the network ({error})"
    code = error_code(error)
    if code in ("NoSuchBucket", "404"):
        return f"{where} does not exist: create it, or name another one in {flag} s3://BUCKET/PREFIX"
    if code in _DENIED:
        return f"{where} refuses to be written ({code}): grant {rights} to these credentials, or fix them"
    return f"{where} cannot be written: {error}"
