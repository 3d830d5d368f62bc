"""Selects the result store for a `--results` value."""

from worker.errors import StartRefusedError
from worker.outlet.base import ResultStore


def select_result_store(results: str, *, s3_endpoint_url: str | None = None) -> ResultStore | None:
    """The store for `s3://bucket/prefix`; None for `redis`, in which the commit writes whole results.

    Raises StartRefusedError if the store's library is not installed.
    """
    if results == "redis":
        return None
    try:
        from worker.outlet.s3_results import S3ResultStore
    except ModuleNotFoundError as error:
        raise StartRefusedError(f"S3 results need {error.name}: pip install 'promptmill[worker]'") from error
    bucket, _, prefix = results.removeprefix("s3://").partition("/")
    return S3ResultStore(bucket, prefix.strip("/"), endpoint_url=s3_endpoint_url)
