"""Other people's code at a job's end: callbacks that do not come back hold up no other."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from rq import Callback, Queue
from rq.job import Job

from tests.fakes.worker_runs import FUNCTION, WorkerThread, wait_for_no_leftovers, wait_for_result
from worker.commit import NUM_CALLBACK_THREADS, NUM_THREADS

LONG_SECONDS = 600
MANY = NUM_THREADS + NUM_CALLBACK_THREADS + 1
entered, leave = threading.Semaphore(0), threading.Event()


def hang(job: Job, connection: redis.Redis, result: Any) -> None:
    entered.release()
    leave.wait(LONG_SECONDS)


@pytest.fixture
def free_again() -> Iterator[None]:
    leave.clear()
    yield
    leave.set()


@pytest.mark.usefixtures("free_again")
def test_callbacks_that_hang_hold_no_other_job_up(redis_url: str, queue: Queue, redis_client: redis.Redis) -> None:
    name = f"{__name__}.hang"
    with WorkerThread(redis_url, callbacks=name):
        callback = Callback(name, timeout=LONG_SECONDS)
        hanging = [queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, on_success=callback) for _ in range(MANY)]
        assert entered.acquire(timeout=30)
        first = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2)
        dependent = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, depends_on=first)
        refused = queue.enqueue(FUNCTION, prompt="")
        statuses = [wait_for_result(redis_client, job.id).status for job in (first, dependent, refused)]
        assert statuses == ["finished", "finished", "failed"]
        leave.set()
        assert {wait_for_result(redis_client, job.id).status for job in hanging} == {"finished"}
        wait_for_no_leftovers(redis_client)
