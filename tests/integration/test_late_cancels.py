"""Cancels in the last moments of a job: what is said of it, to whoever cancels and by RQ, is how it ends."""

from collections.abc import Callable
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import Job, JobStatus

from producer import Client
from producer.contract import Done, Marker, Usage, keys
from producer.job import Job as ClientJob
from tests.fakes.script_calls import claim, end_leases, sweep
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import (
    FUNCTION,
    WorkerThread,
    stored_chunks,
    stream_text,
    wait_for_no_leftovers,
    wait_for_result,
)
from worker.scripts import Append, Scripts


def before(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, act: Callable[[], object]) -> None:
    """Do it before the method's first call."""
    method, is_due = getattr(owner, name), [True]

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_due:
            is_due.clear()
            act()
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def hold_job(worker_thread: WorkerThread, queue: Queue, client: redis.Redis) -> Job:
    """A job that has put out all that it does before the engine goes on."""
    worker_thread.engine.hold_after(3)
    job = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
    wait_until(lambda: sum(len(chunk.token_ids) for chunk in stored_chunks(client, job.id)) == 3)
    return job


@pytest.mark.parametrize("is_failing", [True, False], ids=["failing", "awaited"])
def test_a_job_that_is_cancelled_as_its_end_is_decided_ends_as_the_cancel_was_told(
    redis_url: str,
    worker_thread: WorkerThread,
    queue: Queue,
    redis_client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    is_failing: bool,
) -> None:
    """Where the end is not one step: the job fails, or others wait for it."""
    job = hold_job(worker_thread, queue, redis_client)
    queue.enqueue(FUNCTION, prompt="Hello", max_tokens=2, depends_on=job)
    verdicts: list[bool] = []
    with Client(redis_url) as client:
        finisher = worker_thread.service._loop._finisher
        before(monkeypatch, finisher, "_seal", lambda: verdicts.append(client.cancel(job.id)))
        if is_failing:
            worker_thread.engine.fail(job.id)
        else:
            worker_thread.engine.go_on()
        result = wait_for_result(redis_client, job.id)
    assert verdicts == [True] and result.status == "cancelled" and result.error is None
    assert result.text and stream_text(redis_client, job.id) == result.text
    wait_for_no_leftovers(redis_client)
    assert job.get_status() is JobStatus.CANCELED and queue.deferred_job_registry.count == 1


def test_a_refused_job_that_is_cancelled_as_its_end_is_decided_ends_as_the_cancel_was_told(
    client: Client,
    worker_thread: WorkerThread,
    queue: Queue,
    redis_client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its stream begins with its end."""
    verdicts: list[bool] = []
    finisher = worker_thread.service._loop._finisher
    before(monkeypatch, finisher, "_seal", lambda: verdicts.append(client.cancel("refused")))
    queue.enqueue(FUNCTION, prompt="Hello", max_tokens=0, job_id="refused")
    result = wait_for_result(redis_client, "refused")
    assert verdicts == [True] and result.status == "cancelled" and result.error is None
    wait_for_no_leftovers(redis_client)


def test_a_job_that_is_enqueued_again_while_it_ends_as_cancelled_is_cancelled_for_rq_too(
    worker_thread: WorkerThread,
    queue: Queue,
    redis_client: redis.Redis,
    scripts: Scripts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def enqueue_again() -> None:
        queue.canceled_job_registry.requeue(job.id)
        reply = scripts.claim(
            redis_client, request_id="r", worker="other", queues=[queue.name], max_jobs=1, lease_seconds=30
        )
        assert reply is not None and reply[1] == [[job.id.encode(), b"it is running"]]

    job = hold_job(worker_thread, queue, redis_client)
    before(monkeypatch, worker_thread.service._loop._committer, "commit", enqueue_again)
    job.cancel()
    assert wait_for_result(redis_client, job.id).status == "cancelled"
    wait_for_no_leftovers(redis_client)
    assert job.get_status() is JobStatus.CANCELED and queue.get_job_ids() == []
    assert queue.canceled_job_registry.get_job_ids() == [job.id]
    queue.canceled_job_registry.requeue(job.id)
    worker_thread.engine.go_on()
    wait_until(lambda: job.get_status() is JobStatus.FINISHED, "the job's second run")


@pytest.fixture
def ended_by_dead(client: Client, redis_client: redis.Redis, scripts: Scripts) -> ClientJob:
    """A job whose worker died between its done entry, which says that it finished, and its commit."""
    job = client.submit("a")
    [held] = claim(redis_client, scripts)
    begun = Marker(job_id=job.id, attempt=1, worker="w", prompt_token_ids=[1], seed=1, fingerprint="fake")
    ended = Done(job_id=job.id, done=True, status="finished", usage=Usage())
    entries = ["1-0", begun.to_wire(), "1-1", ended.to_wire()]
    names = keys.stream_key(job.id), keys.fence_key(job.id)
    scripts.append(redis_client, [Append(*names, held.fence, "", entries, publish=False, is_end=True)])
    end_leases(redis_client)
    return job


def test_a_cancel_comes_too_late_for_a_job_that_a_dead_worker_had_ended_and_another_commits(
    ended_by_dead: ClientJob,
    redis_client: redis.Redis,
    scripts: Scripts,
    heir: WorkerThread,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert sweep(redis_client, scripts) == ([ended_by_dead.id], [])
    verdicts: list[bool] = []
    before(monkeypatch, heir.service._loop._finisher, "_decide", lambda: verdicts.append(ended_by_dead.cancel()))
    with heir:
        assert wait_for_result(redis_client, ended_by_dead.id).status == "finished"
    assert verdicts == [False]


def test_a_cancel_comes_too_late_for_one_that_rq_cancelled_before_another_commits_it(
    ended_by_dead: ClientJob, queue: Queue, redis_client: redis.Redis, scripts: Scripts
) -> None:
    job = queue.fetch_job(ended_by_dead.id)
    assert job is not None
    job.cancel()
    [held] = sweep(redis_client, scripts)[1]
    assert held.is_orphan and held.is_resumable  # which commits what the done entry says
    assert not ended_by_dead.cancel()
