"""kill -9 to a worker in the middle of real steps."""

import signal
import time

import pytest
import redis

from producer import Client
from producer.contract import Marker, keys
from tests.acceptance.system import System

pytestmark = [pytest.mark.alone, pytest.mark.model, pytest.mark.timeout(600)]

MAX_SECONDS = 20.0  # promised, with the default lease of 15 s
FIELDS = {"max_tokens": 40, "ignore_eos": True}


def test_jobs_of_a_killed_worker_go_on_elsewhere_within_20_seconds_with_the_tokens_of_an_undisturbed_run(
    system: System,
) -> None:
    doomed, heir = [system.start_worker("--num-threads", "1") for _ in range(2)]
    heir.send_signal(signal.SIGSTOP)  # until the other one has all the jobs
    with Client(system.url) as client, redis.Redis.from_url(system.url) as connection:
        jobs = client.submit_many([{"prompt": f"Tell a story about {n}.", "seed": n, **FIELDS} for n in range(4)])
        watched = [job.stream(timeout=120) for job in jobs]
        chunks = [[next(stream)] for stream in watched]
        heir.send_signal(signal.SIGCONT)
        doomed.kill()
        killed_at = time.monotonic()
        for job in jobs:
            while not any(entry[0].startswith(b"2-") for entry in connection.xrange(keys.stream_key(job.id), "2-1")):
                assert time.monotonic() - killed_at < MAX_SECONDS, system.logs()
                time.sleep(0.05)
        for job, stream, seen in zip(jobs, watched, chunks, strict=True):
            seen += list(stream)
            result = job.result(timeout=120)
            assert result.attempts == 2 and not any(chunk.reset for chunk in seen)
            assert [token for chunk in seen for token in chunk.token_ids] == result.choices[0].token_ids
            marker = connection.xrange(keys.stream_key(job.id), "2-0", "2-0")[0][1][b"m"]
            assert not Marker.model_validate_json(marker).reset
        again = client.submit_many([{"prompt": f"Tell a story about {n}.", "seed": n, **FIELDS} for n in range(4)])
        for job, undisturbed in zip(jobs, again, strict=True):
            expected = undisturbed.result(timeout=120).choices[0].token_ids
            assert job.result(timeout=20).choices[0].token_ids == expected
