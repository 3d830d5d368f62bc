"""SIGTERM to a worker in the middle of real steps."""

import signal
import time

import pytest
import redis
from rq import Queue
from rq.serializers import JSONSerializer

from producer import Client
from producer.contract import Marker, keys
from tests.acceptance.system import System, remaining_keys

pytestmark = [pytest.mark.alone, pytest.mark.model, pytest.mark.timeout(600)]


def test_sigterm_hands_running_jobs_to_the_next_worker_within_two_seconds(system: System) -> None:
    first = system.start_worker()
    with Client(system.url) as client, redis.Redis.from_url(system.url) as connection:
        jobs = client.submit_many(
            [{"prompt": f"Tell a story about {number}.", "max_tokens": 40, "ignore_eos": True} for number in range(64)]
        )
        next(iter(jobs[0].stream(timeout=60)))
        began = time.monotonic()
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 0
        assert time.monotonic() - began < 2.0
        queue = Queue("promptmill", connection=connection, serializer=JSONSerializer)
        assert queue.get_job_ids() == [job.id for job in jobs]
        assert remaining_keys(system.url, ["promptmill:leases:*", "promptmill:fence:*", "rq:execution*"]) == []

        for job in jobs[8:]:
            job.cancel()
        system.start_worker()
        for job in jobs[:8]:
            result = job.result(timeout=200)
            assert result.attempts == 2 and result.usage.completion_tokens == 40
            assert "".join(chunk.text for chunk in job.stream(timeout=10)) == result.text
            marker = connection.xrange(keys.stream_key(job.id), "2-0", "2-0")[0][1][b"m"]
            assert not Marker.model_validate_json(marker).reset  # it went on where it was
