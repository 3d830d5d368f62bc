"""500 jobs from 5 producer processes through 2 worker processes: all of them once, and nothing left behind."""

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from rq import Queue
from rq.registry import CanceledJobRegistry, FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer

from producer import Client
from tests.acceptance.system import System, remaining_keys
from tests.fakes.tiny_models import make_tiny_model

pytestmark = pytest.mark.timeout(600)

PRODUCER = """
import json, sys
from producer import Client

number = int(sys.argv[1])
with Client() as client:
    jobs = [
        client.submit(f"Count from {i} on: {i}, {i + 1},", max_tokens=4 + i % 9, temperature=i % 2, ignore_eos=True)
        for i in range(number * 100, number * 100 + 100)
    ]
print(json.dumps([job.id for job in jobs]))
"""


def test_five_hundred_jobs_all_finish_once_and_leave_nothing_behind(system: System, tmp_path: Path) -> None:
    model = str(make_tiny_model("llama", tmp_path / "model"))
    workers = [system.start_worker("--model", model, "--num-threads", "1") for _ in range(2)]

    with ThreadPoolExecutor(5) as pool:
        job_ids = [job_id for ids in pool.map(lambda number: produce(system, number), range(5)) for job_id in ids]
    assert len(set(job_ids)) == 500

    with Client(system.url) as client:
        jobs = [client.job(job_id) for job_id in job_ids]
        results = Counter(result.job_id for result in client.as_completed(jobs, timeout=400))
        assert results == Counter(job_ids)
        for job in jobs:
            result = job.result(timeout=20)
            chunks = list(job.stream(timeout=20))
            assert "".join(chunk.text for chunk in chunks) == result.text
            assert [token for chunk in chunks for token in chunk.token_ids] == result.choices[0].token_ids
            assert result.attempts == 1
        blocks_used = {info.name: info.kv_blocks_used for info in client.workers()}

    with redis.Redis.from_url(system.url) as connection:
        queue = Queue("promptmill", connection=connection, serializer=JSONSerializer)
        assert queue.count == 0
        assert sorted(FinishedJobRegistry(queue=queue).get_job_ids()) == sorted(job_ids)
        for registry in (StartedJobRegistry, FailedJobRegistry, CanceledJobRegistry):
            assert registry(queue=queue).get_job_ids() == []
    assert remaining_keys(system.url, ["promptmill:leases:*", "promptmill:fence:*", "rq:execution*"]) == []
    assert len(blocks_used) == 2
    for worker in workers:
        assert worker.poll() is None


def produce(system: System, number: int) -> list[str]:
    finished = subprocess.run(
        [sys.executable, "-c", PRODUCER, str(number)],
        env=system.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    ids: list[str] = json.loads(finished.stdout)
    return ids
