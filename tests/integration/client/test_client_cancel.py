"""Cancelling through the client on a real Redis: queued, running, ended and abandoned."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import redis
from rq import Queue
from rq.job import Job as RqJob
from rq.job import JobStatus as RqStatus
from rq.serializers import JSONSerializer

from producer import Client, Job, JobNotFoundError, JobStatus, cancel
from producer.contract import Result, Usage, keys
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.redis_reads import stream_rows
from tests.fakes.script_calls import claim, end_leases, sweep
from tests.fakes.worker_runs import leftovers
from worker.scripts import Scripts


def test_a_queued_job_ends_at_once_with_an_outcome_for_everybody(client: Client, redis_client: redis.Redis) -> None:
    job = client.submit("a", n=2, metadata={"row": 1})
    with redis_client.pubsub() as lines:
        lines.subscribe(keys.results_channel("promptmill"))
        assert lines.get_message(timeout=20)["type"] == "subscribe"
        assert job.cancel() is True
        line = Result.model_validate_json(lines.get_message(timeout=20)["data"])
    assert (line.job_id, line.status, line.choices) == (job.id, "cancelled", [])
    chunks = list(job.stream(timeout=10))
    assert [(chunk.index, chunk.finish_reason) for chunk in chunks] == [(0, "cancelled"), (1, "cancelled")]
    result = job.result(timeout=10)
    assert (result.status, result.metadata, result.attempts) == ("cancelled", {"row": 1}, 0)
    assert [choice.finish_reason for choice in result.choices] == ["cancelled", "cancelled"]
    assert result.usage == Usage()
    ids = [entry_id for entry_id, _ in stream_rows(redis_client, keys.stream_key(job.id))]
    assert ids == [b"1-0", b"1-1", b"1-2", b"1-3"]
    assert job.status() is JobStatus.CANCELLED
    assert RqJob.fetch(job.id, redis_client, JSONSerializer).get_status() is RqStatus.CANCELED
    assert redis_client.llen("rq:queue:promptmill") == 0
    for key in (f"rq:job:{job.id}", keys.stream_key(job.id), keys.result_key(job.id)):
        assert redis_client.ttl(key) > 0


def test_cancelling_twice_writes_one_outcome(client: Client, redis_client: redis.Redis) -> None:
    job = client.submit("a")
    assert job.cancel() and job.cancel()
    assert redis_client.xlen(keys.results_channel("promptmill")) == 1
    assert len(list(job.stream(timeout=10))) == 1


def test_cancelling_again_writes_no_second_outcome_where_a_fail_over_lost_the_streams_end(
    client: Client, redis_client: redis.Redis
) -> None:
    job = client.submit("a")
    assert job.cancel()
    stream = keys.stream_key(job.id)
    redis_client.xdel(stream, stream_rows(redis_client, stream)[-1][0])
    assert job.cancel()
    assert redis_client.xlen(keys.results_channel("promptmill")) == 1


def test_a_running_job_is_left_to_its_worker(client: Client, worker: FakeWorker, redis_client: redis.Redis) -> None:
    job = client.submit("a")
    held = worker.claim().begin()
    held.write("half ")
    with redis_client.pubsub() as requests:
        requests.subscribe(keys.CANCEL_CHANNEL)
        assert requests.get_message(timeout=20)["type"] == "subscribe"
        assert job.cancel() is True
        assert requests.get_message(timeout=20)["data"] == job.id.encode()
    assert held.is_cancelled()
    assert redis_client.get(keys.result_key(job.id)) is None
    held.write("", finish_reason="cancelled")
    held.end("cancelled")
    assert [(chunk.text, chunk.finish_reason) for chunk in job.stream(timeout=10)] == [
        ("half ", None),
        ("", "cancelled"),
    ]
    assert job.result(timeout=10).text == "half "
    assert job.cancel() is True


def test_a_job_that_has_ended_stays_as_it_is(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a")
    echo(worker.claim())
    assert job.cancel() is False
    assert job.status() is JobStatus.FINISHED


def test_a_done_entry_decides_before_rq_shows_it(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a")
    held = worker.claim().begin()
    held.write("whole", finish_reason="stop")
    held.write_done("finished")
    assert job.cancel() is False
    assert not held.is_cancelled()
    held.commit("finished")
    assert job.result(timeout=10).status == "finished"


def test_a_handed_over_job_keeps_its_partial_text(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a")
    held = worker.claim().begin()
    held.write("half ", reasoning="so", reasoning_tokens=3)
    held.hand_over()
    stream = job.stream(timeout=10)
    assert next(stream).text == "half "
    assert job.cancel() is True
    assert [(chunk.text, chunk.finish_reason) for chunk in stream] == [("", "cancelled")]
    result = job.result(timeout=10)
    assert (result.text, result.attempts) == ("half ", 1)
    assert result.usage == Usage(prompt_tokens=2, completion_tokens=5, total_tokens=7, reasoning_tokens=3)
    with pytest.raises(redis.ResponseError, match="equal or smaller"):
        held.write("a dead worker's token")


def test_choices_that_had_ended_stay_as_they_are(client: Client, worker: FakeWorker) -> None:
    job = client.submit("a", n=2)
    held = worker.claim().begin()
    held.write("whole", index=0, finish_reason="stop")
    held.write("ha", index=1)
    held.hand_over()
    assert job.cancel() is True
    ends = [(chunk.index, chunk.finish_reason) for chunk in job.stream(timeout=10) if chunk.finish_reason]
    assert ends == [(0, "stop"), (1, "cancelled")]


def let_go(job: Job, redis_client: redis.Redis) -> None:
    """Its worker has been gone for long."""
    redis_client.set(keys.fence_key(job.id), "1:execution")
    redis_client.zadd(keys.leases_key("promptmill"), {job.id: 1.0})


def while_composing(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Once, between what a cancel reads and what it writes."""
    compose, todo = cancel._compose, [happens]

    def meet(*args: Any) -> Any:
        while todo:
            todo.pop()()
        return compose(*args)

    monkeypatch.setattr(cancel, "_compose", meet)


def test_what_is_written_while_an_outcome_is_composed_is_in_it(
    client: Client, worker: FakeWorker, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.submit("a")
    held = worker.claim().begin()
    let_go(job, redis_client)
    while_composing(monkeypatch, lambda: held.write("late"))
    assert job.cancel() is True
    assert job.result(timeout=10).text == "late"


def test_a_job_that_is_deleted_while_its_outcome_is_composed_stays_deleted(
    client: Client, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.submit("a")
    while_composing(monkeypatch, lambda: redis_client.delete(f"rq:job:{job.id}"))
    with pytest.raises(JobNotFoundError, match="nothing to cancel"):
        job.cancel()
    assert not redis_client.exists(f"rq:job:{job.id}", keys.result_key(job.id), keys.stream_key(job.id))


def test_a_job_that_waits_for_its_time_never_comes_back_once_it_is_cancelled(
    client: Client, redis_client: redis.Redis, queue: Queue
) -> None:
    job = queue.enqueue_in(timedelta(hours=1), "promptmill.generate", prompt="Hello")
    assert client.cancel(job.id) is True
    assert queue.scheduled_job_registry.get_job_ids() == []
    second = client.submit("b", depends_on=client.submit("a"))
    redis_client.zadd(queue.canceled_job_registry.key, {"long ago": 1})
    assert second.cancel() is True
    assert queue.deferred_job_registry.get_job_ids() == []
    assert set(queue.canceled_job_registry.get_job_ids()) == {job.id, second.id}


@pytest.mark.parametrize("was_adopted", [False, True])
def test_nothing_is_left_of_a_run_whose_worker_is_long_gone(
    client: Client, redis_client: redis.Redis, scripts: Scripts, was_adopted: bool
) -> None:
    job = client.submit("a")
    assert len(claim(redis_client, scripts)) == 1
    end_leases(redis_client)
    if was_adopted:  # by one that is gone, too
        RqJob.fetch(job.id, redis_client, JSONSerializer).cancel()
        assert len(sweep(redis_client, scripts)[1]) == 1
        end_leases(redis_client)
    assert job.cancel() is True
    assert leftovers(redis_client) == [] and redis_client.ttl(keys.results_channel("promptmill")) > 0


def test_a_job_that_embeds_is_cancelled_without_choices(client: Client) -> None:
    job = client.submit(task="embed", inputs=["a"])
    assert job.cancel() is True
    assert job.result(timeout=10).choices == []


def test_a_job_whose_worker_is_long_gone_ends_here(
    client: Client, worker: FakeWorker, redis_client: redis.Redis
) -> None:
    job = client.submit("a")
    held = worker.claim().begin()
    held.write("half ")
    let_go(job, redis_client)
    assert job.cancel() is True
    assert job.result(timeout=10).text == "half "
    assert redis_client.exists(keys.fence_key(job.id)) == 0
    assert redis_client.zscore(keys.leases_key("promptmill"), job.id) is None


def test_an_unknown_job_cannot_be_cancelled_and_a_forgotten_one_tells_how_it_ended(
    client: Client, worker: FakeWorker, redis_client: redis.Redis
) -> None:
    with pytest.raises(JobNotFoundError, match="nothing to cancel"):
        client.cancel("nobody")
    job = client.submit("a")
    echo(worker.claim())
    redis_client.delete(f"rq:job:{job.id}")
    assert job.cancel() is False
    redis_client.set(keys.result_key(job.id), '{"v": 2}')  # a newer contract's
    assert job.cancel() is False
    cancelled = client.submit("a")
    cancelled.cancel()
    redis_client.delete(f"rq:job:{cancelled.id}")
    assert cancelled.cancel() is True
