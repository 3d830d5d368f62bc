"""Results in S3, against a server of its protocol."""

import json
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import pytest

from producer.contract import Choice, Result
from tests.fakes.flaky_s3 import ENVIRONMENT
from tests.fakes.ports import free_port
from worker.errors import ResultStoreError, StartRefusedError
from worker.outlet.s3_results import S3ResultStore
from worker.outlet.select import select_result_store


@pytest.fixture
def bucket(s3_endpoint: str) -> Iterator[Any]:
    bucket = boto3.resource("s3", endpoint_url=s3_endpoint).Bucket("results")
    bucket.objects.all().delete()
    yield bucket


def _check_credentials_after(endpoint: str, *, num_requests: bytes) -> None:
    """Tell the server to answer so many requests without a look at who sends them."""
    plain = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", data=num_requests, headers=plain)
    urllib.request.urlopen(request, timeout=10).close()


def result(job_id: str = "job-1", text: str = "größte") -> Result:
    choices = [Choice(index=0, text=text, token_ids=[1, 2], finish_reason="stop")]
    return Result(job_id=job_id, model="m", status="finished", choices=choices, attempts=1)


def keys(bucket: Any) -> set[str]:
    return {entry.key for entry in bucket.objects.all()}


def test_the_object_holds_the_full_result_and_redis_keeps_where_it_is(s3_endpoint: str, bucket: Any) -> None:
    store = select_result_store("s3://results/some/prefix/", s3_endpoint_url=s3_endpoint)
    assert store is not None
    kept = store.put(result(), 1)
    assert kept.stored == "s3://results/some/prefix/job-1.json"
    assert kept.choices == [] and kept.model == "m"
    stored = bucket.Object("some/prefix/job-1.json").get()
    assert Result.model_validate_json(stored["Body"].read()) == result()
    assert stored["ContentType"] == "application/json"


def test_without_a_prefix_objects_lie_at_the_buckets_top(s3_endpoint: str, bucket: Any) -> None:
    S3ResultStore("results", endpoint_url=s3_endpoint).put(result(), 1)
    assert keys(bucket) == {"job-1.json"}


def test_an_attempt_that_started_over_has_an_object_of_its_own(s3_endpoint: str, bucket: Any) -> None:
    store = S3ResultStore("results", "p", endpoint_url=s3_endpoint)
    store.put(result(text="old"), 1)
    assert store.put(result(text="new"), 3).stored == "s3://results/p/job-1.3.json"
    assert keys(bucket) == {"p/job-1.json", "p/job-1.3.json"}


def test_the_same_put_twice_leaves_the_same(s3_endpoint: str, bucket: Any) -> None:
    store = S3ResultStore("results", "p", endpoint_url=s3_endpoint)
    assert store.put(result(), 1) == store.put(result(), 1)
    assert keys(bucket) == {"p/job-1.json"}


def test_puts_may_run_on_several_threads(s3_endpoint: str, bucket: Any) -> None:
    store = S3ResultStore("results", "p", endpoint_url=s3_endpoint)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.put(result(f"job-{number}"), 1), range(40)))
    assert keys(bucket) == {f"p/job-{number}.json" for number in range(40)}
    assert json.loads(bucket.Object("p/job-7.json").get()["Body"].read())["job_id"] == "job-7"


def test_a_writable_bucket_passes_the_check_and_is_left_as_it_was(s3_endpoint: str, bucket: Any) -> None:
    S3ResultStore("results", "p", endpoint_url=s3_endpoint).check()
    S3ResultStore("results", "", endpoint_url=s3_endpoint).check()
    assert keys(bucket) == set()


def test_a_missing_bucket_refuses_the_start(s3_endpoint: str) -> None:
    store = S3ResultStore("no-such-bucket", "p", endpoint_url=s3_endpoint)
    with pytest.raises(StartRefusedError, match=r"'no-such-bucket' at http://127.0.0.1.* does not exist: create it"):
        store.check()
    with pytest.raises(ResultStoreError, match="job-1"):
        store.put(result(), 1)


def test_missing_credentials_refuse_the_start(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    with pytest.raises(StartRefusedError, match=r"no credentials .* AWS_ACCESS_KEY_ID"):
        S3ResultStore("results", "p", endpoint_url=s3_endpoint).check()


def test_a_refused_write_at_the_start_names_the_permission(s3_endpoint: str, bucket: Any) -> None:
    _check_credentials_after(s3_endpoint, num_requests=b"0")
    try:
        with pytest.raises(StartRefusedError, match="s3:PutObject"):
            S3ResultStore("results", "p", endpoint_url=s3_endpoint).check()
    finally:
        _check_credentials_after(s3_endpoint, num_requests=b"inf")


def test_an_endpoint_that_does_not_answer_refuses_the_start(s3_endpoint: str) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(StartRefusedError, match=r"cannot reach bucket 'results' at http://127.0.0.1.*s3-endpoint-url"):
        S3ResultStore("results", "p", endpoint_url=nobody).check()


def test_a_store_that_hangs_up_amid_its_first_answer_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where botocore waits for a go-ahead, the end of the connection amid that leaves it in an endless loop."""
    monkeypatch.setattr("worker.outlet.s3_results.MAX_ATTEMPTS", 1)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        store = S3ResultStore("results", "p", endpoint_url=f"http://127.0.0.1:{listener.getsockname()[1]}")

        def hang_up() -> None:
            connection, _ = listener.accept()
            with connection:
                assert b"expect" not in connection.recv(65536).lower(), "that would be a loop for ever"
                connection.sendall(b"HTTP/1.1 100 Continue\r\n")

        with ThreadPoolExecutor() as pool:
            hung_up = pool.submit(hang_up)
            with pytest.raises(ResultStoreError, match="job-1"):
                store.put(result(), 1)
            hung_up.result()
