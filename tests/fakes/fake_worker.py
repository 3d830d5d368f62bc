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
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import redis

from producer.contract import (
    Choice,
    Chunk,
    Done,
    ErrorCode,
    ErrorInfo,
    FinishReason,
    JobOutcome,
    Marker,
    Result,
    Timings,
    Usage,
    WorkerInfo,
    keys,
    parse_entry,
)
from tests.fakes.redis_reads import last_row, stream_rows

LEASE_SECONDS = 3600.0
RQ_STATUS = {"finished": "finished", "cancelled": "canceled", "stopped": "stopped", "failed": "failed"}


@dataclass
class HeldJob:
    """One attempt at a job. Every method writes at once; what was written is remembered for the result."""

    connection: redis.Redis
    job_id: str
    queue: str
    attempt: int
    arguments: dict[str, Any]
    seq: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    model: str = "fake"
    num_prompt_tokens: int = 2

    def begin(self, *, reset: bool = False) -> "HeldJob":
        """The marker of this attempt. With `reset`, nothing of the attempts before counts; else it goes on there."""
        rows = [] if reset else stream_rows(self.connection, keys.stream_key(self.job_id))
        stored = [parse_entry(row[keys.DATA_FIELD.encode()]) for _, row in rows if keys.DATA_FIELD.encode() in row]
        self.chunks = [entry for entry in stored if isinstance(entry, Chunk)]
        marker = Marker(job_id=self.job_id, attempt=self.attempt, worker="fake", reset=reset, prompt_token_ids=[1, 2])
        self._append(keys.MARKER_FIELD, marker.to_wire(), publish=False)
        return self

    def write(
        self,
        text: str,
        *,
        index: int = 0,
        finish_reason: FinishReason | None = None,
        publish: bool = True,
        num_tokens: int | None = None,
    ) -> None:
        """One chunk, a token a character unless it is said how many. Without `publish` it is stored only, as if the
        message was lost."""
        offset = sum(len(chunk.token_ids) for chunk in self.chunks if chunk.index == index)
        chunk = Chunk(
            job_id=self.job_id,
            index=index,
            token_offset=offset,
            text=text,
            token_ids=[ord(character) for character in text] if num_tokens is None else list(range(num_tokens)),
            finish_reason=finish_reason,
        )
        self.chunks.append(chunk)
        self.seq += 1
        self._append(keys.DATA_FIELD, chunk.to_wire(), publish=publish)

    def republish(self) -> None:
        """Send the last chunk once more, as after a lost reply."""
        self.connection.publish(keys.stream_key(self.job_id), f"{self.attempt}-{self.seq} {self.chunks[-1].to_wire()}")

    def end(
        self,
        status: JobOutcome = "finished",
        *,
        error: ErrorInfo | None = None,
        stored: str | None = None,
        publish: bool = True,
    ) -> Result:
        """The done entry, the result and its line, and RQ's status."""
        self.write_done(status, error=error, publish=publish)
        return self.commit(status, error=error, stored=stored, publish=publish)

    def write_done(self, status: JobOutcome, *, error: ErrorInfo | None = None, publish: bool = True) -> None:
        done = Done(job_id=self.job_id, done=True, status=status, usage=self._usage(), error=error)
        self.seq += 1
        self._append(keys.DATA_FIELD, done.to_wire(), publish=publish)
        self.connection.expire(keys.stream_key(self.job_id), keys.STREAM_TTL_SECONDS)

    def commit(
        self,
        status: JobOutcome,
        *,
        error: ErrorInfo | None = None,
        stored: str | None = None,
        publish: bool = True,
    ) -> Result:
        whole = self.result(status, error)
        kept = whole.model_copy(update={"choices": [], "stored": stored}) if stored else whole
        line = kept.model_copy(update={"choices": []}).to_wire()
        with self.connection.pipeline() as pipeline:
            pipeline.set(keys.result_key(self.job_id), kept.to_wire(), ex=keys.RESULT_TTL_SECONDS)
            pipeline.hset(f"rq:job:{self.job_id}", "status", RQ_STATUS[status])
            pipeline.zrem(keys.leases_key(self.queue), self.job_id)
            pipeline.xadd(keys.results_channel(self.queue), {keys.DATA_FIELD: line})
            if publish:
                pipeline.publish(keys.results_channel(self.queue), line)
            pipeline.execute()
        return whole

    def result(self, status: JobOutcome, error: ErrorInfo | None = None) -> Result:
        num_choices = self.arguments.get("n", 1)
        return Result(
            job_id=self.job_id,
            model=self.model,
            status=status,
            choices=[self._choice(index) for index in range(num_choices)],
            usage=self._usage(),
            timings=self.timings,
            attempts=self.attempt,
            metadata=self.arguments.get("metadata", {}),
            error=error,
        )

    def hand_over(self) -> None:
        """Back to the front of the queue, as on SIGTERM."""
        with self.connection.pipeline() as pipeline:
            pipeline.hset(f"rq:job:{self.job_id}", "status", "queued")
            pipeline.zrem(keys.leases_key(self.queue), self.job_id)
            pipeline.lpush(f"rq:queue:{self.queue}", self.job_id)
            pipeline.execute()

    def is_cancelled(self) -> bool:
        return bool(self.connection.hget(f"rq:job:{self.job_id}", "status") == b"canceled")

    def expire_stream(self) -> None:
        """The stream's time is up."""
        self.connection.delete(keys.stream_key(self.job_id))

    def _choice(self, index: int) -> Choice:
        chunks = [chunk for chunk in self.chunks if chunk.index == index]
        ended = [chunk.finish_reason for chunk in chunks if chunk.finish_reason is not None]
        return Choice(
            index=index,
            text="".join(chunk.text for chunk in chunks),
            token_ids=[token_id for chunk in chunks for token_id in chunk.token_ids],
            finish_reason=ended[-1] if ended else "error",
        )

    def _usage(self) -> Usage:
        num_tokens = sum(len(chunk.token_ids) for chunk in self.chunks)
        num_prompt = self.num_prompt_tokens
        return Usage(prompt_tokens=num_prompt, completion_tokens=num_tokens, total_tokens=num_prompt + num_tokens)

    def _append(self, field_name: Literal["m", "d"] | str, data: str, *, publish: bool) -> None:
        entry_id = f"{self.attempt}-{self.seq}"
        key = keys.stream_key(self.job_id)
        with self.connection.pipeline() as pipeline:
            pipeline.xadd(key, {field_name: data}, id=entry_id)
            if publish:
                pipeline.publish(key, f"{entry_id} {data}")
            pipeline.execute()


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


def echo(job: HeldJob) -> None:
    """The prompt back, a word a chunk, for each choice; a job whose prompt is `fail` fails behind its first word."""
    prompt = job.arguments.get("prompt")
    text = prompt if isinstance(prompt, str) else str(job.arguments["messages"][-1]["content"])
    words = [word + " " for word in text.split(" ")][: job.arguments.get("max_tokens")]
    job.begin()
    if words[0] == "fail ":
        job.write(words[0], finish_reason="error")
        job.end("failed", error=ErrorInfo(code=ErrorCode.ENGINE_ERROR, message="told to fail"))
        return
    for index in range(job.arguments.get("n", 1)):
        for word in words[:-1]:
            job.write(word, index=index)
        job.write(words[-1], index=index, finish_reason="length")
    job.end()
