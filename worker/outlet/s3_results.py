"""Stores results in an S3 bucket, at AWS or any S3-compatible endpoint."""

from contextlib import suppress

from botocore.exceptions import BotoCoreError, ClientError

from producer.contract import Result
from producer.s3_connection import S3_ERRORS, connect, describe, explain
from worker.errors import ResultStoreError, StartRefusedError

# worker/uploads.py retries by itself; a store that hangs is given up after two minutes.
MAX_ATTEMPTS = 2
READ_TIMEOUT_SECONDS = 10.0

# Written and deleted at every start, to find out before the first job whether writing is allowed.
PROBE_NAME = ".promptmill"


class S3ResultStore:
    """A `ResultStore` with one object per job. Thread-safe, as boto3's clients are."""

    def __init__(self, bucket: str, prefix: str = "", *, endpoint_url: str | None = None) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._where = describe(bucket, endpoint_url)
        try:
            self._client = connect(endpoint_url, max_attempts=MAX_ATTEMPTS, read_timeout_seconds=READ_TIMEOUT_SECONDS)
        except (BotoCoreError, ValueError) as error:
            raise StartRefusedError(f"no S3 client for {self._where}: {error}") from error

    def check(self) -> None:
        probe = f"{self._prefix}{PROBE_NAME}"
        try:
            self._put(probe, "{}")
        except S3_ERRORS as error:
            raise StartRefusedError(explain(error, self._where, flag="--results", rights="s3:PutObject")) from error
        with suppress(BotoCoreError, ClientError):  # a worker need not be allowed to delete; then the probe stays
            self._client.delete_object(Bucket=self._bucket, Key=probe)

    def put(self, result: Result, attempt: int) -> Result:
        key = f"{self._prefix}{object_name(result.job_id, attempt)}"
        try:
            self._put(key, result.to_wire())
        except S3_ERRORS as error:
            raise ResultStoreError(
                f"the result of job {result.job_id} cannot be put into {self._where}: {error}"
            ) from error
        return result.without_output().model_copy(update={"stored": f"s3://{self._bucket}/{key}"})

    def _put(self, key: str, body: str) -> None:
        self._client.put_object(Bucket=self._bucket, Key=key, Body=body.encode(), ContentType="application/json")


def object_name(job_id: str, attempt: int) -> str:
    """The object's name. Each attempt has its own, so that a late upload of an older one cannot replace it."""
    return f"{job_id}.json" if attempt == 1 else f"{job_id}.{attempt}.json"
