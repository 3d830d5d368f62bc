"""Batches on gateways as processes: whichever is killed, and when, each line is answered once, and run once."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import openai
import pytest
import redis

from producer.contract import keys
from producer.gateway.batches.batch_record import BatchRecord, BatchStatus
from producer.gateway.batches.batch_scripts import BEGIN, FINISH, RECORD
from producer.operations import Script
from tests.fakes.batches import URL, batch_bench, jsonl, line
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.gateway_process import GatewayProcess
from tests.fakes.held_job import HeldJob
from tests.fakes.processes import children_of, wait_until_gone
from tests.fakes.redis_reads import sorted_set_scores
from tests.fakes.tcp_proxy import HoldingProxy
from tests.fakes.waiting import wait_until

LOW = keys.class_queue(keys.DEFAULT_QUEUE, "low")
NUM_LINES = 60
MAX_IN_FLIGHT = 20

OPTIONS = ("--batch-lease-seconds", "3", "--batch-max-in-flight", str(MAX_IN_FLIGHT), "--http-drain-seconds", "0")

Start = Callable[..., GatewayProcess]


@pytest.fixture
def start(start_process: Start, tmp_path: Path) -> Start:
    return partial(start_process, *OPTIONS, "--files", str(tmp_path / "files"))


class Files:
    """The files' store, as the gateways share it."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self._redis_url = redis_url
        self._folder = folder

    def put(self, data: bytes) -> str:
        async def run() -> str:
            async with batch_bench(self._redis_url, self._folder) as bench:
                return await bench.put_file(data)

        return asyncio.run(run())

    def read(self, batch_id: str) -> tuple[BatchRecord, list[str]]:
        """The batch, and the custom_ids in its files."""

        async def run() -> tuple[BatchRecord, list[str]]:
            async with batch_bench(self._redis_url, self._folder) as bench:
                record = await bench.get(batch_id)
                lines = await bench.read_lines(record.output_file_id) + await bench.read_lines(record.error_file_id)
                return record, [entry["custom_id"] for entry in lines]

        return asyncio.run(run())


@pytest.fixture
def files(redis_url: str, tmp_path: Path) -> Files:
    return Files(redis_url, tmp_path / "files")


@pytest.fixture
def runs() -> Counter[str]:
    return Counter()


def test_a_replica_killed_while_it_validates_loses_nothing(
    start: Start, low: FakeWorker, files: Files, redis_url: str, runs: Counter[str]
) -> None:
    with _held_at(BEGIN, redis_url) as proxy:
        batch_id, killed = _create(start(url=proxy.url), files)
        assert proxy.has_held.wait(60)
        assert files.read(batch_id)[0].status is BatchStatus.VALIDATING
        _end_elsewhere(start(), killed, low, files, batch_id, runs)


def test_a_replica_killed_while_it_enqueues_loses_nothing_and_enqueues_nothing_twice(
    start: Start, low: FakeWorker, files: Files, redis_client: redis.Redis, runs: Counter[str]
) -> None:
    batch_id, killed = _create(start(), files)
    wait_until(lambda: redis_client.llen(f"rq:queue:{LOW}") >= MAX_IN_FLIGHT // 2)
    _end_elsewhere(start(), killed, low, files, batch_id, runs)


def test_a_replica_killed_while_answers_come_in_loses_none_and_writes_none_twice(
    start: Start, low: FakeWorker, files: Files, redis_url: str, runs: Counter[str]
) -> None:
    batch_id, killed = _create(start(), files)
    for _ in range(NUM_LINES // 2):
        _count(runs)(low.claim(60))
    wait_until(lambda: files.read(batch_id)[0].num_completed > 0)
    _end_elsewhere(start(), killed, low, files, batch_id, runs)


def test_a_replica_killed_between_a_written_part_and_its_record_leaves_no_line_out(
    start: Start, low: FakeWorker, files: Files, redis_url: str, runs: Counter[str]
) -> None:
    with _held_at(RECORD, redis_url) as proxy:
        batch_id, killed = _create(start(url=proxy.url), files)
        for _ in range(5):
            _count(runs)(low.claim(60))
        assert proxy.has_held.wait(60)
        _end_elsewhere(start(), killed, low, files, batch_id, runs)


def test_a_replica_killed_while_it_finalizes_leaves_the_end_to_another(
    start: Start, low: FakeWorker, files: Files, redis_url: str, runs: Counter[str]
) -> None:
    with _held_at(FINISH, redis_url) as proxy:
        batch_id, killed = _create(start(url=proxy.url), files)
        with low.serving(_count(runs)):
            assert proxy.has_held.wait(60)
        record, answered = files.read(batch_id)
        assert record.status is BatchStatus.FINALIZING and len(answered) == NUM_LINES
        _end_elsewhere(start(), killed, low, files, batch_id, runs)


def test_a_restart_carries_on_what_the_only_gateway_left(
    start: Start, low: FakeWorker, files: Files, redis_client: redis.Redis, runs: Counter[str]
) -> None:
    batch_id, killed = _create(start(), files)
    wait_until(lambda: redis_client.llen(f"rq:queue:{LOW}") >= MAX_IN_FLIGHT // 2)
    killed.kill()
    _end_elsewhere(start(), killed, low, files, batch_id, runs)


def test_a_gateway_that_is_told_to_stop_hands_its_batches_over_at_once(
    start: Start, low: FakeWorker, files: Files, redis_client: redis.Redis, runs: Counter[str]
) -> None:
    batch_id, leaving = _create(start(), files)
    wait_until(lambda: redis_client.llen(f"rq:queue:{LOW}") >= MAX_IN_FLIGHT // 2)
    [carrier] = children_of(leaving.process.pid)
    leaving.process.send_signal(signal.SIGTERM)
    assert leaving.process.wait(30) == 0
    assert not Path(f"/proc/{carrier}").exists()
    assert sorted_set_scores(redis_client, "promptmill:batches:open")[batch_id] < time.time()
    _end_elsewhere(start(), leaving, low, files, batch_id, runs)


def test_a_carrier_does_not_outlive_its_gateway(
    start: Start, low: FakeWorker, files: Files, redis_client: redis.Redis
) -> None:
    batch_id, killed = _create(start(), files)
    wait_until(lambda: redis_client.llen(f"rq:queue:{LOW}") >= MAX_IN_FLIGHT // 2)
    [carrier] = children_of(killed.process.pid)
    killed.process.kill()
    killed.process.wait()
    wait_until_gone(carrier)
    assert files.read(batch_id)[0].status is BatchStatus.IN_PROGRESS


def _create(gateway: GatewayProcess, files: Files) -> tuple[str, GatewayProcess]:
    file_id = files.put(jsonl([line(f"r{number}", f"word {number}") for number in range(NUM_LINES)]))
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=60) as client:
        return client.batches.create(input_file_id=file_id, endpoint=URL, completion_window="24h").id, gateway


def _end_elsewhere(
    other: GatewayProcess,
    killed: GatewayProcess,
    low: FakeWorker,
    files: Files,
    batch_id: str,
    runs: Counter[str],
) -> None:
    """Kill the one, and see the other bring the batch to its end."""
    killed.kill()
    with ExitStack() as stack:
        client = stack.enter_context(openai.OpenAI(base_url=f"{other.url}/v1", api_key="none", timeout=60))
        stack.enter_context(low.serving(_count(runs)))
        wait_until(lambda: client.batches.retrieve(batch_id).status == "completed")
        ended = client.batches.retrieve(batch_id)
    _, answered = files.read(batch_id)
    assert sorted(answered) == sorted(f"r{number}" for number in range(NUM_LINES))
    counts = ended.request_counts
    assert counts is not None and (counts.completed, counts.failed) == (NUM_LINES, 0)
    assert sorted(runs.values()) == [1] * NUM_LINES


def _count(runs: Counter[str]) -> Callable[[HeldJob], None]:
    def behave(job: HeldJob) -> None:
        runs[job.job_id] += 1
        echo(job)

    return behave


@contextmanager
def _held_at(script: Script, redis_url: str) -> Iterator[HoldingProxy]:
    """A proxy that lets everything happen up to that script."""
    sha = str(script.call([], [])[1]).encode()
    port = urlsplit(redis_url).port
    assert port is not None
    with HoldingProxy(port, sha) as proxy:
        yield proxy
