"""Streams of one job in an outlet, and what a reader makes of what is stored."""

import redis

from engine.outputs import RequestOutput
from producer.contract import Choice, Chunk, Done, Marker, parse_entry
from producer.contract.keys import stream_key
from tests.fakes.redis_reads import stream_rows
from worker.outlet.job_stream import JobStream
from worker.outlet.stream import StreamOutlet

JOB = "job-1"


KEY = stream_key(JOB)


def open_stream(
    outlet: StreamOutlet,
    *,
    job_id: str = JOB,
    attempt: int = 1,
    publish: bool = True,
    num_choices: int = 1,
    fence: str = "",
) -> JobStream:
    """Without a fence it writes where nobody holds the job."""
    stream = JobStream(job_id, attempt, publish=publish, num_prompt_tokens=3, num_choices=num_choices)
    marker = Marker(job_id=job_id, attempt=attempt, worker="w", reset=attempt > 1, seed=7)
    outlet.open(stream, marker, fence=fence)
    return stream


def put(stream: JobStream, text: str, *token_ids: int, index: int = 0, offset: int = 0, end: str | None = None) -> None:
    stream.add(
        RequestOutput(
            request_id=stream.job_id,
            index=index,
            token_offset=offset,
            token_ids=list(token_ids),
            text=text,
            finish_reason=end,  # type: ignore[arg-type]
        )
    )


def stored(client: redis.Redis, key: str = KEY) -> list[tuple[str, str, str]]:
    return [
        (entry_id.decode(), field.decode(), data.decode())
        for entry_id, fields in stream_rows(client, key)
        for field, data in fields.items()
    ]


def join(entries: list[tuple[str, str, str]]) -> tuple[list[Choice], Done | None]:
    """What a reader makes of a stream: chunks joined by choice, a marker with `reset` voiding what came before."""
    parts: dict[int, list[Chunk]] = {}
    done: Done | None = None
    for _, field, data in entries:
        if field == "m":
            if Marker.model_validate_json(data).reset:
                parts, done = {}, None
            continue
        assert done is None, "a reader goes away at the done entry"
        entry = parse_entry(data)
        if isinstance(entry, Done):
            done = entry
        else:
            chunks = parts.setdefault(entry.index, [])
            assert entry.token_offset == sum(len(chunk.token_ids) for chunk in chunks)
            chunks.append(entry)
    choices = [
        Choice(
            index=index,
            text="".join(chunk.text for chunk in chunks),
            token_ids=[token_id for chunk in chunks for token_id in chunk.token_ids],
            finish_reason=chunks[-1].finish_reason,
        )
        for index, chunks in sorted(parts.items())
    ]
    return choices, done


def finished(stream: JobStream) -> Done:
    return Done(job_id=stream.job_id, done=True, status="finished", usage=stream.usage)
