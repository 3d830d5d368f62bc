"""Jobs that end are counted for Prometheus: those of every producer, from the start of a gateway on."""

import re
import time

import httpx2 as httpx
import redis

from producer import Client
from producer.async_transport import AsyncTransport
from producer.contract import Result, Timings, Usage, keys
from producer.gateway.console.ended_jobs import EndedJob
from producer.gateway.console.results_follower import ResultsFollower
from producer.gateway.metrics import GatewayMetrics
from producer.queues import QueueStatus
from producer.rq_names import REGISTRIES
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import StartGateway
from tests.fakes.waiting import wait_until


def write_line(connection: redis.Redis, job_id: str, *, seconds_ago: float, queue: str = keys.DEFAULT_QUEUE) -> None:
    """As a worker does at a job's end."""
    line = Result(job_id=job_id, status="finished").to_wire()
    at = f"{int((time.time() - seconds_ago) * 1000)}-0"
    connection.xadd(keys.results_channel(queue), {keys.DATA_FIELD: line}, id=at)


async def test_what_ended_before_a_gateway_began_is_shown_and_not_counted(
    transport: AsyncTransport, worker: FakeWorker
) -> None:
    told: list[str] = []
    follower = ResultsFollower(transport, keys.DEFAULT_QUEUE, on_end=lambda job: told.append(job.job_id))
    write_line(worker.connection, "before", seconds_ago=30)
    await follower.look_for_queues()
    await follower.read()
    write_line(worker.connection, "after", seconds_ago=-1)
    await follower.look_for_queues()
    await follower.read()
    assert [job.job_id for job in follower.ended.newest(9)] == ["after", "before"]
    assert told == ["after"]


async def test_what_ends_before_the_first_read_is_counted(transport: AsyncTransport, worker: FakeWorker) -> None:
    """A gateway serves before it has read anything."""
    told: list[str] = []
    follower = ResultsFollower(transport, keys.DEFAULT_QUEUE, on_end=lambda job: told.append(job.job_id))
    write_line(worker.connection, "at-once", seconds_ago=0)
    await follower.look_for_queues()
    await follower.read()
    assert told == ["at-once"]


async def test_a_queue_that_is_not_listed_for_a_while_is_counted_once(
    transport: AsyncTransport, redis_client: redis.Redis
) -> None:
    told: list[str] = []
    follower = ResultsFollower(transport, keys.DEFAULT_QUEUE, on_end=lambda job: told.append(job.job_id))
    queue = keys.tenant_queue(keys.DEFAULT_QUEUE, "acme")
    await follower.look_for_queues()
    for number, command in enumerate(("SADD", "SREM", "SADD")):
        redis_client.execute_command(command, "rq:queues", f"rq:queue:{queue}")
        write_line(redis_client, f"job-{number}", seconds_ago=-1 - number, queue=queue)
        await follower.look_for_queues()
        await follower.read()
    assert told == ["job-0", "job-1", "job-2"]


def job(status: str, queue: str) -> EndedJob:
    result = Result(
        job_id="j",
        status=status,
        usage=Usage(prompt_tokens=3, completion_tokens=5, total_tokens=8),
        timings=Timings(queued=0.3, first_token=0.4, total=2.0),
    )
    return EndedJob.from_line(result, queue, ended_at=1.0)


def queue(name: str, *, depth: int = 0, **registries: int) -> QueueStatus:
    return QueueStatus(name=name, depth=depth, registries=dict.fromkeys(REGISTRIES, 0) | registries)


def test_tenants_of_which_nothing_waits_runs_or_has_failed_have_no_series() -> None:
    """There may be thousands, and their records are kept for a day."""
    tenants = [
        queue("promptmill@past", finished=7),
        queue("promptmill@waits", depth=1),
        queue("promptmill@runs", started=1),
        queue("promptmill@failed", failed=1),
    ]
    text = GatewayMetrics().render([queue("promptmill"), *tenants], [], {}, None, is_redis_up=True).decode()
    figures = [line for line in text.splitlines() if line.startswith("promptmill_queue_")]
    assert {re.findall(r'queue="([^"]+)"', line)[0] for line in figures} == {
        "promptmill",
        "promptmill@waits",
        "promptmill@runs",
        "promptmill@failed",
    }


def test_counters_begin_at_nought_and_tenants_share_those_of_their_class() -> None:
    metrics = GatewayMetrics()

    def lines() -> set[str]:
        queues = [queue("promptmill"), queue("promptmill@acme")]
        return set(metrics.render(queues, [], {}, None, is_redis_up=True).decode().splitlines())

    begun = lines()
    assert 'promptmill_jobs_ended_total{outcome="failed",queue="promptmill"} 0.0' in begun
    for name in ("jobs_ended_total", "job_tokens_total", "job_queued_seconds", "job_seconds"):
        assert any(line.startswith(f"# HELP promptmill_{name} ") and "max() over gateways" in line for line in begun)
    assert not any("acme" in line for line in begun if line.startswith(("promptmill_jobs_ended", "promptmill_job_")))
    metrics.observe_end(job("finished", "promptmill@acme"))
    metrics.observe_end(job("failed", "promptmill"))
    assert {
        'promptmill_jobs_ended_total{outcome="finished",queue="promptmill"} 1.0',
        'promptmill_jobs_ended_total{outcome="failed",queue="promptmill"} 1.0',
        'promptmill_job_tokens_total{kind="prompt",queue="promptmill"} 6.0',
        'promptmill_job_tokens_total{kind="output",queue="promptmill"} 10.0',
        'promptmill_job_queued_seconds_count{queue="promptmill"} 2.0',
        'promptmill_job_seconds_count{queue="promptmill"} 1.0',
    } <= lines()


def test_a_gateway_without_a_console_counts_the_jobs_of_other_producers(
    start_gateway: StartGateway, worker: FakeWorker, redis_url: str
) -> None:
    gateway = start_gateway(console=False)
    with Client(redis_url) as client:
        client.submit("x", max_tokens=1)
    job = worker.claim().begin()
    job.write("a", finish_reason="length")
    job.end()
    counted = 'promptmill_jobs_ended_total{outcome="finished",queue="promptmill"} 1.0'
    wait_until(lambda: counted in httpx.get(f"{gateway.url}/metrics").text)
