"""Which result store a `--results` value means."""

from worker.errors import StartRefusedError
from worker.outlet.base import ResultStore


def select_result_store(results: str, *, s3_endpoint_url: str | None = None) -> ResultStore | None:
    """That of `s3://bucket/prefix`; None for `redis`, where the commit writes results whole.

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
