"""A worker that generates nothing: it takes jobs from a real Redis and writes what it is told, as the contract says.

`FakeWorker.claim()` hands a test one job, and the test decides each step of it: late tokens, lost publishes, resets,
hand-overs, crashes, failures. `FakeWorker.serving(behaviour)` does so for every job, on a thread.
"""

import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import redis
from rq import Queue
from rq.job import Job as RqJob
from rq.serializers import JSONSerializer

from producer.contract import (
    ErrorCode,
    ErrorInfo,
    WorkerInfo,
    keys,
)
from tests.fakes.held_job import HeldJob
from tests.fakes.redis_reads import last_row

LEASE_SECONDS = 3600.0

Behaviour = Callable[[HeldJob], object]


class FakeWorker:
    """Takes jobs from `queue`; each claim is an attempt under a lease."""

    def __init__(self, url: str, queue: str = keys.DEFAULT_QUEUE, name: str = "fake") -> None:
        self.connection = redis.Redis.from_url(url, socket_timeout=None)  # else a claim waits no longer than that
        self.queue = queue
        self.name = name

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def enqueue_again(self, job_id: str) -> None:
        """As RQ puts a job that has ended back onto its queue."""
        queue = Queue(self.queue, connection=self.connection, serializer=JSONSerializer)
        queue.enqueue_job(RqJob.fetch(job_id, self.connection, JSONSerializer))

    def claim(self, timeout: float = 60.0) -> HeldJob:
        """The next queued job. Jobs that were cancelled while they lay there are passed over, as a worker does."""
        while True:
            job = self.try_claim(timeout)
            assert job is not None, f"no job on {self.queue} within {timeout} s"
            if job.attempt:
                return job

    def try_claim(self, timeout: float, *, of_tenants: bool = False) -> HeldJob | None:
        names = [f"rq:queue:{self.queue}"]
        if of_tenants:
            found = cast("Iterator[bytes]", self.connection.sscan_iter("rq:queues", f"{names[0]}@*"))
            names += [name.decode() for name in found]
        popped = cast("tuple[bytes, bytes] | None", self.connection.blpop(names, timeout=timeout))
        if popped is None:
            return None
        queue, job_id = popped[0].decode().removeprefix("rq:queue:"), popped[1].decode()
        fields = cast("dict[bytes, bytes]", self.connection.hgetall(f"rq:job:{job_id}"))
        if fields.get(b"status") != b"queued":
            return HeldJob(self.connection, job_id, queue, 0, {})
        last = last_row(self.connection, keys.stream_key(job_id))
        attempt = int(last[0].split(b"-")[0]) + 1 if last else 1
        with self.connection.pipeline() as pipeline:
            pipeline.hset(f"rq:job:{job_id}", "status", "started")
            pipeline.zadd(keys.leases_key(queue), {job_id: time.time() + LEASE_SECONDS})
            pipeline.set(keys.attempt_key(job_id), attempt)
            pipeline.execute()
        label, _, _, arguments = json.loads(zlib.decompress(fields[b"data"]))
        assert label == keys.JOB_FUNCTION
        return HeldJob(self.connection, job_id, queue, attempt, arguments)

    @contextmanager
    def serving(self, behaviour: Behaviour, *, of_tenants: bool = False) -> Iterator[None]:
        """Do every job as `behaviour` says, perhaps those of tenants, too, on a thread, until the block ends."""
        stop = threading.Event()
        failures: list[BaseException] = []

        def serve() -> None:
            try:
                while not stop.is_set():
                    job = self.try_claim(0.05, of_tenants=of_tenants)
                    if job is not None and job.attempt:
                        behaviour(job)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=serve, name="fake-worker")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(30)
            assert not thread.is_alive()
            if failures:
                raise failures[0]

    def announce(
        self,
        *models: str,
        queues: list[str] | None = None,
        seconds: float = 60.0,
        max_request_bytes: int | None = None,
    ) -> WorkerInfo:
        """Be a live worker that serves `models`; with negative `seconds`, one that has died."""
        info = WorkerInfo(
            name=self.name,
            queues=queues or [self.queue],
            models=list(models),
            context_length=2048,
            max_request_bytes=max_request_bytes,
            device="cpu",
            hostname="test",
            pid=1,
            started_at=time.time(),
            beat_at=time.time(),
        )
        self.connection.set(keys.worker_key(self.name), info.model_dump_json())
        self.connection.zadd(keys.WORKERS_KEY, {self.name: time.time() + seconds})
        self.connection.zadd(keys.MODELS_KEY, dict.fromkeys(models, time.time()))
        return info


def echo(job: HeldJob, **others: Any) -> None:
    """The prompt back, a word a chunk, for each choice; a job whose prompt is `fail` fails behind its first word.
    `others`: more of the last chunk's fields."""
    prompt = job.arguments.get("prompt")
    text = prompt if isinstance(prompt, str) else str(job.arguments["messages"][-1]["content"])
    words = [word + " " for word in text.split(" ")][: job.arguments.get("max_tokens")]
    job.begin()
    if words[0] == "fail ":
        job.write(words[0], finish_reason="error", **others)
        job.end("failed", error=ErrorInfo(code=ErrorCode.ENGINE_ERROR, message="told to fail"))
        return
    for index in range(job.arguments.get("n", 1)):
        for word in words[:-1]:
            job.write(word, index=index)
        job.write(words[-1], index=index, finish_reason="length", **others)
    job.end()


def say(*words: str) -> Behaviour:
    """These words, a chunk each, whatever is asked."""

    def answer(job: HeldJob) -> None:
        job.begin()
        for word in words:
            job.write(word)
        job.write("", finish_reason="stop")
        job.end()

    return answer
