"""A job in the hands of a worker that generates nothing: a test decides each of its steps (`fake_worker.py`)."""

from dataclasses import dataclass, field
from typing import Any, Literal

import redis

from producer.contract import (
    Choice,
    Chunk,
    Done,
    ErrorInfo,
    FinishReason,
    JobOutcome,
    Marker,
    Result,
    Timings,
    Usage,
    keys,
    parse_entry,
)
from tests.fakes.redis_reads import stream_rows

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
    num_cached_tokens: int = 0

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
        **others: Any,
    ) -> None:
        """One chunk, a token a character unless it is said how many. Without `publish` it is stored only, as if the
        message was lost. `others`: more of a chunk's fields."""
        offset = sum(len(chunk.token_ids) for chunk in self.chunks if chunk.index == index)
        chunk = Chunk(
            job_id=self.job_id,
            index=index,
            token_offset=offset,
            text=text,
            token_ids=[ord(character) for character in text] if num_tokens is None else list(range(num_tokens)),
            finish_reason=finish_reason,
            **others,
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
            pipeline.delete(keys.attempt_key(self.job_id))
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
            choices=[Choice.join(index, self.chunks, cut_off="error") for index in range(num_choices)],
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

    def _usage(self) -> Usage:
        num_tokens = sum(len(chunk.token_ids) for chunk in self.chunks)
        num_prompt = self.num_prompt_tokens
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_tokens,
            total_tokens=num_prompt + num_tokens,
            cached_tokens=self.num_cached_tokens,
            reasoning_tokens=sum(chunk.reasoning_tokens or 0 for chunk in self.chunks),
        )

    def _append(self, field_name: Literal["m", "d"] | str, data: str, *, publish: bool) -> None:
        entry_id = f"{self.attempt}-{self.seq}"
        key = keys.stream_key(self.job_id)
        with self.connection.pipeline() as pipeline:
            pipeline.xadd(key, {field_name: data}, id=entry_id)
            if publish:
                pipeline.publish(key, f"{entry_id} {data}")
            pipeline.execute()
