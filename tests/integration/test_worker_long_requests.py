"""Requests that take long to read: their tokenising holds up nobody's tokens, and the order of jobs stays."""

import threading

import redis
from rq import Queue

from producer import Client
from producer.contract import keys
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.waiting import wait_until
from tests.fakes.worker_runs import FUNCTION, WorkerThread, wait_for_no_leftovers, wait_for_result
from worker.intake import LONG_REQUEST_BYTES

LONG_PROMPT = "word " * (LONG_REQUEST_BYTES // 5 + 1)  # some bytes for Redis, which has it packed


class HeldReading:
    """Holds the tokenising of long prompts up."""

    def __init__(self, engine: FakeEngine) -> None:
        self.has_begun = threading.Event()
        self.may_end = threading.Event()
        encode = engine.tokenizer.encode

        def held(text: str, *, add_special_tokens: bool = True) -> list[int]:
            if len(text) >= LONG_REQUEST_BYTES:
                self.has_begun.set()
                assert self.may_end.wait(60)
            return encode(text, add_special_tokens=add_special_tokens)

        engine.tokenizer.encode = held


def test_a_long_request_holds_up_nobodys_tokens_and_comes_before_those_behind_it(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    engine = FakeEngine(step_seconds=0.01, max_model_len=100_000)
    reading = HeldReading(engine)
    with WorkerThread(redis_url, engine):
        running = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=90_000)
        wait_until(lambda: engine.running)
        long, behind = (queue.enqueue(FUNCTION, prompt=prompt, max_tokens=5) for prompt in (LONG_PROMPT, "Hello"))
        assert reading.has_begun.wait(60)
        num_entries = redis_client.xlen(keys.stream_key(running.id))
        wait_until(lambda: redis_client.xlen(keys.stream_key(running.id)) > num_entries + 2)
        assert engine.submitted == [f"{running.id}:1"]
        reading.may_end.set()
        assert wait_for_result(redis_client, long.id).status == "finished"
        assert wait_for_result(redis_client, behind.id).status == "finished"
        assert engine.submitted == [f"{job.id}:1" for job in (running, long, behind)]


def test_a_long_request_that_is_cancelled_while_it_is_read_is_never_begun(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    engine = FakeEngine(max_model_len=100_000)
    reading = HeldReading(engine)
    with WorkerThread(redis_url, engine), Client(redis_url) as client:
        job = client.submit(LONG_PROMPT, max_tokens=5)
        assert reading.has_begun.wait(60)
        job.cancel()
        behind = queue.enqueue(FUNCTION, prompt="Hello", max_tokens=5)
        wait_until(lambda: redis_client.llen(queue.key) == 0)
        reading.may_end.set()
        assert wait_for_result(redis_client, job.id).status == "cancelled"
        assert wait_for_result(redis_client, behind.id).status == "finished"
        assert engine.submitted == [f"{behind.id}:1"]
        wait_for_no_leftovers(redis_client)


def test_a_long_request_that_is_being_read_is_handed_over_with_the_others(
    redis_url: str, queue: Queue, redis_client: redis.Redis
) -> None:
    engine = FakeEngine(max_model_len=100_000)
    reading = HeldReading(engine)
    with WorkerThread(redis_url, engine):
        job = queue.enqueue(FUNCTION, prompt=LONG_PROMPT, max_tokens=5)
        assert reading.has_begun.wait(60)
    assert queue.get_job_ids() == [job.id]
    reading.may_end.set()
    with WorkerThread(redis_url, FakeEngine(max_model_len=100_000)):
        assert wait_for_result(redis_client, job.id).status == "finished"
        wait_for_no_leftovers(redis_client)
