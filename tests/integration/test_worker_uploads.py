"""What happens to a job while its result is on its way to the store: a cancel that was promised is kept."""

import threading
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import JobStatus

from producer import Client
from producer.contract import Done, Result, keys, parse_entry
from tests.fakes.redis_reads import stream_rows
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import FUNCTION, WorkerThread, wait_for_no_leftovers, wait_for_result


class SlowStore:
    """A result store that takes a put once it may."""

    def __init__(self) -> None:
        self.is_asked = threading.Event()
        self.may_go_on = threading.Event()
        self.objects: list[Result] = []

    def check(self) -> None:
        return

    def put(self, result: Result, attempt: int) -> Result:
        self.is_asked.set()
        assert self.may_go_on.wait(60)
        self.objects.append(result)
        return result.without_output().model_copy(update={"stored": f"s3://bucket/{result.job_id}.{attempt}"})


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> SlowStore:
    store = SlowStore()
    monkeypatch.setattr("tests.fakes.worker_runs.select_result_store", lambda *args, **kwargs: store)
    return store


def assert_cancelled(client: redis.Redis, store: SlowStore, job: Any) -> None:
    result = wait_for_result(client, job.id)
    assert result.status == "cancelled" and result.stored == f"s3://bucket/{job.id}.1"
    assert [stored.status for stored in store.objects] == ["finished", "cancelled"]
    assert store.objects[1].choices[0].text == store.objects[0].choices[0].text
    _, last = stream_rows(client, keys.stream_key(job.id))[-1]
    done = parse_entry(last[b"d"])
    assert isinstance(done, Done) and done.status == "cancelled"
    wait_for_no_leftovers(client)
    assert job.get_status() is JobStatus.CANCELED
    assert client.xlen(keys.results_channel(keys.DEFAULT_QUEUE)) == 1


@pytest.mark.parametrize("has_dependent", [False, True])
def test_a_job_that_is_cancelled_while_its_result_is_stored_is_cancelled(
    redis_url: str, queue: Queue, redis_client: redis.Redis, store: SlowStore, has_dependent: bool
) -> None:
    with WorkerThread(redis_url), Client(redis_url) as client:
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
        if has_dependent:
            queue.enqueue(FUNCTION, prompt="Then", max_tokens=5, depends_on=job)
        assert store.is_asked.wait(60)
        assert client.cancel(job.id)
        store.may_go_on.set()
        assert_cancelled(redis_client, store, job)


def test_a_cancel_counts_until_the_very_entry_that_ends_the_stream(
    redis_url: str, queue: Queue, redis_client: redis.Redis, store: SlowStore
) -> None:
    store.may_go_on.set()
    with WorkerThread(redis_url) as running, Client(redis_url) as client:
        committer = running.service._loop._committer
        build = committer.build

        def cancel_and_build(job: Any) -> Any:  # between the last look at the job and its end
            assert client.cancel(job.job_id)
            return build(job)

        committer.build = cancel_and_build
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
        assert_cancelled(redis_client, store, job)


def test_a_job_that_nobody_cancels_is_stored_once_and_committed_with_its_end(
    redis_url: str, queue: Queue, redis_client: redis.Redis, store: SlowStore
) -> None:
    store.may_go_on.set()
    with WorkerThread(redis_url) as running, Client(redis_url) as client:
        running.service._loop._committer.commit = lambda jobs: pytest.fail("it is a second step")
        job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
        waits_for_none = wait_for_result(redis_client, job.id)
        assert waits_for_none.status == "finished" and len(store.objects) == 1
        wait_until(lambda: job.get_status() is JobStatus.FINISHED)
        wait_for_no_leftovers(redis_client)
        assert not client.cancel(job.id)
