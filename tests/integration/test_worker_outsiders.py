"""Other people's code and servers at a job's end: callbacks and receivers that do not come back hold up no other."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from rq import Callback, Queue
from rq.job import Job
from rq.webhook import Webhook

from tests.fakes.webhook_receiver import Reply, receiving
from tests.fakes.worker_runs import FUNCTION, WorkerThread, wait_for_no_leftovers, wait_for_result
from worker.commit import NUM_CALLBACK_THREADS, NUM_THREADS, NUM_WEBHOOK_THREADS
from worker.fence import FencedPipeline

LONG_SECONDS = 600
MANY = NUM_THREADS + NUM_CALLBACK_THREADS + NUM_WEBHOOK_THREADS + 1
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


def test_receivers_that_do_not_answer_hold_no_job_up(redis_url: str, queue: Queue, redis_client: redis.Redis) -> None:
    answer = threading.Event()
    with receiving(lambda number: Reply(holds=answer)) as receiver, WorkerThread(redis_url, webhooks=receiver.url):
        jobs = []
        for fields, status in (({"prompt": "Hello", "max_tokens": 2}, "finished"), ({"prompt": ""}, "failed")):
            hook = Webhook(receiver.url, status, method="POST", timeout=LONG_SECONDS)  # type: ignore[arg-type]
            jobs += [queue.enqueue(FUNCTION, **fields, webhooks=[hook]) for _ in range(MANY)]
        for job in jobs:
            wait_for_result(redis_client, job.id)
        wait_for_no_leftovers(redis_client)
        assert 0 < receiver.num_received <= NUM_WEBHOOK_THREADS  # none has been answered
        answer.set()
        assert {json.loads(receiver.next().body)["job_id"] for _ in jobs} == {job.id for job in jobs}


def test_a_webhook_is_sent_once_though_the_reply_to_the_commit_was_lost(
    redis_url: str, queue: Queue, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute, num_commits = FencedPipeline.execute, 0

    def lose_the_first_reply(pipe: FencedPipeline, raise_on_error: bool = True) -> list[Any]:
        nonlocal num_commits
        replies = execute(pipe, raise_on_error)
        num_commits += 1
        if num_commits == 1:
            raise redis.ConnectionError("the reply was lost")
        return replies

    monkeypatch.setattr(FencedPipeline, "execute", lose_the_first_reply)
    with receiving() as receiver, WorkerThread(redis_url, webhooks=receiver.url):
        for _ in range(2):
            hook = Webhook(receiver.url, "finished", method="POST")
            job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, webhooks=[hook])
            assert json.loads(receiver.next().body)["job_id"] == job.id
            wait_for_no_leftovers(redis_client)
        assert receiver.num_received == num_commits == 2
