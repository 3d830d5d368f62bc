"""Jobs from producers that know nothing of our client: plain RQ, and raw Redis commands from any language."""

import json
import shlex
import uuid

import pytest
import redis
from rq import Queue
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from producer import Client
from tests.acceptance.system import System

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]


def test_a_job_enqueued_by_plain_rq_runs_and_rq_reads_its_result(running_system: System, client: Client) -> None:
    with redis.Redis.from_url(running_system.url) as connection:
        queue = Queue("promptmill", connection=connection, serializer=JSONSerializer)
        job = queue.enqueue("promptmill.generate", prompt="The capital of France is", max_tokens=5, temperature=0)
        result = client.job(job.id).result(timeout=60)
        assert "Paris" in result.text
        assert job.get_status() is JobStatus.FINISHED
        assert job.return_value()["choices"][0]["text"] == result.text


def test_a_job_written_by_redis_commands_runs(running_system: System, client: Client) -> None:
    job_id = str(uuid.uuid4())
    data = json.dumps(
        ["promptmill.generate", None, [], {"prompt": "The capital of France is", "max_tokens": 5, "temperature": 0}]
    )
    job = f"created_at 2026-11-23T15:00:00.000000Z origin promptmill status queued timeout 180 data {shlex.quote(data)}"
    commands = [
        "MULTI",
        f"HSET rq:job:{job_id} {job}",
        "SADD rq:queues rq:queue:promptmill",
        f"RPUSH rq:queue:promptmill {job_id}",
        "EXEC",
    ]
    with redis.Redis.from_url(running_system.url, single_connection_client=True) as connection:
        for command in commands:
            connection.execute_command(*shlex.split(command))
    assert "Paris" in client.job(job_id).result(timeout=60).text


def test_a_pickled_job_fails_with_a_reason_and_the_next_one_runs(running_system: System, client: Client) -> None:
    with redis.Redis.from_url(running_system.url) as connection:
        pickled = Queue("promptmill", connection=connection).enqueue("promptmill.generate", prompt="Hello")
        assert "Paris" in client.submit("The capital of France is", max_tokens=5, temperature=0).result(timeout=60).text
        assert pickled.get_status() is JobStatus.FAILED
    with pytest.raises(Exception, match="JSON"):
        client.job(pickled.id).result(timeout=5)
