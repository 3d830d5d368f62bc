"""Jobs that failed: listed with their reasons, and put back to start over."""

import json
import re

import pytest
import redis
from rq.registry import FailedJobRegistry

from producer import AsyncClient, Client, JobFailedError, JobNotFoundError, JobStatus
from producer.contract import keys
from tests.fakes.command_line import Invoke
from tests.fakes.redis_proxy import CuttingProxy
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import WorkerThread, leftovers, rq_queue, wait_for_no_leftovers


def let_fail(client: Client, worker: WorkerThread, tenant: str | None = None) -> str:
    """A job that put out a few tokens and failed."""
    worker.engine.hold_after(5)
    job = client.submit("Hello", max_tokens=2000, tenant=tenant)
    next(iter(job.stream(timeout=20)))
    worker.engine.fail(job.id, "out of luck")
    worker.engine.go_on()
    with pytest.raises(JobFailedError):
        job.result(timeout=20)
    wait_until(lambda: job.status() is JobStatus.FAILED)
    return job.id


def test_failed_jobs_are_listed_with_their_reasons_the_last_one_first(client: Client, redis_url: str) -> None:
    with WorkerThread(redis_url) as worker:
        ids = [let_fail(client, worker, tenant) for tenant in (None, "acme")]
        refused = client.submit("Hello", model=None, max_tokens=10**6)
        with pytest.raises(JobFailedError):
            refused.result(timeout=20)
        wait_until(lambda: len(client.failed()) == 3)
    jobs = client.failed()
    assert [job.job_id for job in jobs] == [refused.id, *reversed(ids)]
    assert [job.code for job in jobs] == ["context_length_exceeded", "engine_error", "engine_error"]
    assert jobs[1].message == "out of luck" and jobs[1].queue == "promptmill@acme" and jobs[1].attempts == 1
    assert jobs[0].failed_at > jobs[2].failed_at and "Hello" in jobs[1].description


def test_what_rq_itself_failed_is_listed_too(client: Client, redis_client: redis.Redis) -> None:
    queue = rq_queue(redis_client)
    job = queue.enqueue(keys.JOB_FUNCTION, prompt="Hello")
    queue.remove(job)
    job.set_status("failed")
    FailedJobRegistry(queue=queue).add(job, exc_string="AbandonedJobError: gone")
    [listed] = client.failed()
    assert (listed.job_id, listed.attempts) == (job.id, 0) and listed.code == "internal"


def test_a_failed_job_whose_result_cannot_be_read_is_listed_all_the_same(
    client: Client, redis_client: redis.Redis
) -> None:
    queue = rq_queue(redis_client)
    job = queue.enqueue(keys.JOB_FUNCTION, prompt="Hello")
    job.set_status("failed")
    FailedJobRegistry(queue=queue).add(job)
    redis_client.set(keys.result_key(job.id), '{"v": 2}')  # a newer contract's
    [listed] = client.failed()
    assert (listed.job_id, listed.code) == (job.id, "result_store_error") and "not a result of job" in listed.message


def test_nothing_stays_for_ever_of_a_retried_job_that_is_deleted_before_it_runs(
    client: Client, redis_url: str, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url) as worker:
        job = client.job(let_fail(client, worker))
    assert client.retry(job)
    rq_queue(redis_client).fetch_job(job.id).delete()
    assert 0 < redis_client.ttl(keys.stream_key(job.id)) <= keys.WAITING_STREAM_TTL_SECONDS


def test_a_retried_job_waits_for_as_long_as_it_takes_and_has_no_result_meanwhile(
    client: Client, redis_url: str, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url) as worker:
        job_id = let_fail(client, worker)
    assert redis_client.ttl(f"rq:job:{job_id}") > 0 and redis_client.exists(keys.result_key(job_id))
    assert client.retry(job_id)
    assert redis_client.ttl(f"rq:job:{job_id}") == -1 and not redis_client.exists(keys.result_key(job_id))


def test_a_retried_job_has_nothing_in_rqs_record_of_the_run_that_failed(
    client: Client, redis_url: str, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url) as worker:
        job_id = let_fail(client, worker)
    assert client.retry(job_id)
    job = rq_queue(redis_client).fetch_job(job_id)
    assert (job.started_at, job.ended_at, job.worker_name) == (None, None, None) and job._exc_info is None


def test_a_retried_job_starts_over_and_its_readers_see_a_reset(
    client: Client, redis_url: str, redis_client: redis.Redis
) -> None:
    with WorkerThread(redis_url) as worker:
        job = client.job(let_fail(client, worker, "acme"))
        worker.engine.pause()
        assert client.retry(job) and job.status() in (JobStatus.QUEUED, JobStatus.RUNNING)
        assert not client.retry(job) and client.failed() == []
        chunks = iter(job.stream(timeout=20))
        worker.engine.go_on()
        result = job.result(timeout=60)
        assert result.status == "finished" and result.attempts == 2 and result.usage.completion_tokens == 2000
        for reader in (chunks, job.stream(timeout=20)):
            text = ""
            for chunk in reader:
                text = "" if chunk.reset else text + chunk.text
            assert text == result.text
        wait_for_no_leftovers(redis_client)
    assert redis_client.zcard("rq:failed:promptmill@acme") == 0 and leftovers(redis_client) == []


async def test_the_asyncio_client_retries_too(client: Client, redis_url: str) -> None:
    with WorkerThread(redis_url) as worker:
        job_id = let_fail(client, worker)
        async with AsyncClient(redis_url) as other:
            assert [job.job_id for job in await other.failed()] == [job_id]
            assert await other.retry(job_id)
            assert (await other.result(job_id, timeout=60)).status == "finished"


def test_a_job_that_did_not_fail_is_left_alone(client: Client) -> None:
    job = client.submit("Hello")
    assert not client.retry(job)
    with pytest.raises(JobNotFoundError):
        client.retry("nobody")


def test_a_lost_reply_retries_once(client: Client, redis_url: str, redis_client: redis.Redis) -> None:
    with WorkerThread(redis_url) as worker:
        ids = [let_fail(client, worker) for _ in range(5)]
    port = redis_client.connection_pool.connection_kwargs["port"]
    with CuttingProxy(port, seed=3) as proxy, Client(proxy.url) as flaky:
        proxy.probability = 0.2
        assert all(flaky.retry(job_id) for job_id in ids)
        assert proxy.num_cuts > 0
    assert rq_queue(redis_client).get_job_ids() == ids


def test_the_command_line_lists_and_retries(
    promptmill: Invoke, client: Client, redis_url: str, redis_client: redis.Redis
) -> None:
    assert promptmill("failed").stdout == "no job has failed\n"
    with WorkerThread(redis_url) as worker:
        first, second, third = (let_fail(client, worker) for _ in range(3))
    shown = promptmill("failed").stdout.splitlines()
    assert len(shown) == 3 and shown[-1].startswith(first) and shown[-1].endswith("engine_error: out of luck")
    assert re.search(r"  20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ  1 attempt  ", shown[-1])
    lines = promptmill("failed", "--json", "--limit", "2").stdout.splitlines()
    assert [json.loads(line)["job_id"] for line in lines] == [third, second]
    one = promptmill("retry", first, "nobody")
    assert one.exit_code == 1 and one.stdout == f"{first} queued again\n"
    rest = promptmill("retry", "--all")
    assert rest.exit_code == 0 and len(rest.stdout.splitlines()) == 2
    assert set(rq_queue(redis_client).get_job_ids()) == {first, second, third}
    assert promptmill("retry").exit_code == 2
