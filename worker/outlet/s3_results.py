"""Results in an S3 bucket, at AWS or any endpoint of the same protocol. Credentials come from boto3's own chain."""

from contextlib import suppress

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

from producer.contract import Result
from worker.errors import ResultStoreError, StartRefusedError

CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 30
MAX_ATTEMPTS = 4  # of one put, boto3's own backoff between them
MAX_CONNECTIONS = 16
PROBE_NAME = (
    ".promptmill"  # written and deleted at every start, to learn before the first job whether writing is allowed
)


class S3ResultStore:
    """A `ResultStore`: one object a job. Uploads may run on several threads; boto3's clients allow it."""

    def __init__(self, bucket: str, prefix: str = "", *, endpoint_url: str | None = None) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._where = f"bucket {bucket!r} at {endpoint_url or 'AWS'}"
        config = Config(
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            read_timeout=READ_TIMEOUT_SECONDS,
            retries={"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
            max_pool_connections=MAX_CONNECTIONS,
            request_checksum_calculation="when_required",  # not every S3-compatible store knows the newer checksums
            response_checksum_validation="when_required",
        )
        try:
            self._client = boto3.client("s3", endpoint_url=endpoint_url, config=config)
        except (BotoCoreError, ValueError) as error:
            raise StartRefusedError(f"no S3 client for {self._where}: {error}") from error

    def check(self) -> None:
        probe = f"{self._prefix}{PROBE_NAME}"
        try:
            self._put(probe, "{}")
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise StartRefusedError(
                f"no credentials for {self._where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or an AWS profile "
                f"({error})"
            ) from error
        except ClientError as error:
            raise StartRefusedError(self._explain(error)) from error
        except BotoCoreError as error:
            raise StartRefusedError(
                f"cannot reach {self._where}: check --s3-endpoint-url and the network ({error})"
            ) from error
        with suppress(BotoCoreError, ClientError):  # a worker needs no right to delete; then the probe stays
            self._client.delete_object(Bucket=self._bucket, Key=probe)

    def put(self, result: Result, attempt: int) -> Result:
        key = f"{self._prefix}{object_name(result.job_id, attempt)}"
        try:
            self._put(key, result.to_wire())
        except (BotoCoreError, ClientError) as error:
            raise ResultStoreError(
                f"the result of job {result.job_id} cannot be put into {self._where}: {error}"
            ) from error
        return result.model_copy(update={"prompt": None, "choices": [], "stored": f"s3://{self._bucket}/{key}"})

    def _put(self, key: str, body: str) -> None:
        self._client.put_object(Bucket=self._bucket, Key=key, Body=body.encode(), ContentType="application/json")

    def _explain(self, error: ClientError) -> str:
        code = str(error.response.get("Error", {}).get("Code", "unknown"))
        if code in ("NoSuchBucket", "404"):
            return f"{self._where} does not exist: create it, or name another one in --results s3://BUCKET/PREFIX"
        if code in _DENIED:
            return f"{self._where} refuses to be written ({code}): grant s3:PutObject to these credentials, or fix them"
        return f"{self._where} cannot be written: {error}"


def object_name(job_id: str, attempt: int) -> str:
    """An attempt that started over has an object of its own: a late upload of an older one cannot replace it."""
    return f"{job_id}.json" if attempt == 1 else f"{job_id}.{attempt}.json"


_DENIED = ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled", "ExpiredToken")
