"""What must hold after a chaos run, and what became of each job: its history, for whoever has to find out why."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import redis
from rq import Queue
from rq.registry import FailedJobRegistry, FinishedJobRegistry
from rq.serializers import JSONSerializer

from producer.contract import Choice, Chunk, Done, EntryId, Marker, Result, keys, parse_entry
from tests.acceptance.chaos.watchers import Watched
from tests.acceptance.chaos.workload import ChaosJob
from tests.fakes.redis_reads import stream_rows

LEFTOVERS = (
    "promptmill:leases:*",
    "promptmill:leased:*",
    "promptmill:turns:*",
    "promptmill:fence:*",
    "promptmill:attempt:*",
    "rq:execution*",
    "rq:wip:*",
    "rq:queue:*",
)
"""Keys that no ended job may leave. RQ drops an empty list, set or hash by itself."""


EDGE = 3  # entries shown on both sides of a marker


@dataclass(slots=True)
class StoredStream:
    """A job's stream as it lies in Redis: each choice since the last reset, and how it came about."""

    chunks: list[Chunk] = field(default_factory=list)
    num_attempts: int = 0
    num_resets: int = 0
    num_resumed: int = 0
    """Attempts that went on behind tokens of an earlier one."""
    num_recomputed: int = 0
    """Tokens that a reset made void."""
    has_done: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    def num_tokens_of(self, index: int) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks if chunk.index == index)


def read_stream(rows: Sequence[Any]) -> StoredStream:
    stream, last = StoredStream(), EntryId(0, 0)
    for raw_id, fields in rows:
        entry_id = EntryId.parse(raw_id)
        if keys.MARKER_FIELD.encode() in fields:
            _take_marker(stream, Marker.model_validate_json(fields[keys.MARKER_FIELD.encode()]))
            if entry_id.seq != 0 or entry_id.attempt <= last.attempt:
                stream.problems.append(f"marker {entry_id} behind {last}")
        else:
            if not entry_id.follows(last):
                stream.problems.append(f"entry {entry_id} behind {last}")
            _take_entry(stream, parse_entry(fields[keys.DATA_FIELD.encode()]))
        last = entry_id
    if not stream.has_done:
        stream.problems.append("no done entry")
    return stream


def _take_marker(stream: StoredStream, marker: Marker) -> None:
    stream.num_attempts += 1
    if marker.reset:
        stream.num_resets += 1
        stream.num_recomputed += stream.num_tokens
        stream.chunks.clear()
    elif stream.num_tokens:
        stream.num_resumed += 1


def _take_entry(stream: StoredStream, entry: Chunk | Done) -> None:
    if stream.has_done:
        stream.problems.append("an entry behind the done entry")
    if isinstance(entry, Done):
        stream.has_done = True
        return
    num_tokens = stream.num_tokens_of(entry.index)
    if entry.token_offset != num_tokens:
        stream.problems.append(f"choice {entry.index}: offset {entry.token_offset} behind {num_tokens} tokens")
    stream.chunks.append(entry)


def find_problems(
    connection: redis.Redis,
    jobs: Sequence[ChaosJob],
    reference: Mapping[str, Result],
    seen: Mapping[str, Watched],
) -> dict[str, list[str]]:
    """By job id, what is wrong with it; under "system" what is wrong with the rest."""
    problems = {job.job_id: _job_problems(connection, job, reference[job.job_id], seen[job.job_id]) for job in jobs}
    problems["system"] = _system_problems(connection, jobs)
    return {name: found for name, found in problems.items() if found}


def _job_problems(connection: redis.Redis, job: ChaosJob, expected: Result, watched: Watched) -> list[str]:
    wire = connection.get(keys.result_key(job.job_id))
    if wire is None:
        return ["no result"]
    result = Result.model_validate_json(wire)
    stream = read_stream(stream_rows(connection, keys.stream_key(job.job_id)))
    found = list(stream.problems)
    if result.status != "finished":
        found.append(f"ended as {result.status}: {result.error}")
    if connection.hget(f"rq:job:{job.job_id}", "status") != b"finished":
        found.append(f"RQ says {connection.hget(f'rq:job:{job.job_id}', 'status')!r}")
    if result.prompt != expected.prompt:
        found.append(f"the echo is not as without faults: {result.prompt} instead of {expected.prompt}")
    for choice, right in zip(result.choices, expected.choices, strict=True):
        if choice != right:
            found.append(f"choice {choice.index} is not as without faults: {choice} instead of {right}")
        for who, chunks in (("the stream", stream.chunks), ("what a subscriber saw", watched.chunks)):
            if Choice.join(choice.index, chunks, cut_off="error") != choice:
                found.append(f"choice {choice.index}: {who} does not equal the result")
    if stream.num_recomputed:
        found.append(f"{stream.num_recomputed} tokens were generated again instead of resumed from")
    if result.usage.completion_tokens != expected.usage.completion_tokens:
        found.append(f"usage {result.usage} instead of {expected.usage}")
    if watched.problem is not None or not watched.has_ended:
        found.append(f"its subscriber: {watched.problem or 'saw no end'}")
    return found


def _system_problems(connection: redis.Redis, jobs: Sequence[ChaosJob]) -> list[str]:
    found = [f"left behind: {key.decode()}" for pattern in LEFTOVERS for key in connection.scan_iter(pattern)]
    lines: Counter[str] = Counter()
    finished: list[str] = []
    for key in connection.scan_iter("promptmill:results:*"):
        for _, fields in stream_rows(connection, key.decode()):
            lines[Result.model_validate_json(fields[keys.DATA_FIELD.encode()]).job_id] += 1
        queue = Queue(key.decode().split(":", 2)[2], connection=connection, serializer=JSONSerializer)
        finished += FinishedJobRegistry(queue=queue).get_job_ids(cleanup=False)
        found += [
            f"in RQ's failed registry: {job}" for job in FailedJobRegistry(queue=queue).get_job_ids(cleanup=False)
        ]
    ids = {job.job_id for job in jobs}
    found += [f"{job_id} has {lines[job_id]} results lines" for job_id in sorted(ids) if lines[job_id] != 1]
    if Counter(finished) != Counter(ids):
        found.append(f"RQ's finished registries differ: {Counter(finished) - Counter(ids)} {ids - set(finished)}")
    return found


def history(connection: redis.Redis, job_id: str, logs: Mapping[str, str]) -> str:
    """All that is known of a job: RQ's record, its stream, its result, and the log lines that name it."""
    lines = [f"history of {job_id}", f"  rq: {connection.hgetall(f'rq:job:{job_id}')}"]
    rows = stream_rows(connection, keys.stream_key(job_id))
    for at, (entry_id, fields) in enumerate(rows):
        is_edge = any(b"m" in row[1] for row in rows[max(0, at - EDGE) : at + EDGE]) or at >= len(rows) - EDGE
        if is_edge:  # what lies in the middle of an attempt tells little
            lines.append(f"  {entry_id.decode():>8} {str(fields)[:160]}")
    lines.append(f"  result: {str(connection.get(keys.result_key(job_id)))[:600]}")
    for key in connection.scan_iter("promptmill:results:*"):
        ends = [row for row in stream_rows(connection, key.decode()) if job_id.encode() in row[1][b"d"]]
        lines += [f"  line in {key.decode()}: {entry_id.decode()} {fields[b'd'].decode()}" for entry_id, fields in ends]
    for name, text in logs.items():
        lines += [f"  {name}: {line}" for line in text.splitlines() if job_id in line]
    return "\n".join(lines)
