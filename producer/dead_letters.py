"""Jobs that failed: why, and back onto their queues.

A retry starts over: it is a new arrival, so that the next attempt resets what the failed one had put out.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from producer.contract import NO_REASON, keys
from producer.contract.turns import TURNS_SCRIPT
from producer.errors import JobNotFoundError
from producer.operations import Protocol, Script, send, slices
from producer.outcome import parse_line, read_failure_of_rq
from producer.queues import MAX_JOBS_A_READ, read_queues
from producer.rq_names import QUEUES_KEY, format_time, job_key, queue_key, registry_key


@dataclass(frozen=True, slots=True)
class FailedJob:
    """A job in RQ's failed registry, and the reason. `code` is one of ErrorCode; `attempts` 0: not known."""

    job_id: str
    queue: str
    code: str
    message: str
    failed_at: str
    """UTC, ISO 8601; empty if RQ did not note it."""
    attempts: int
    description: str


def read_failed(default_queue: str, limit: int | None = None) -> Protocol[list[FailedJob]]:
    """The failed jobs of the queues that `read_queues` lists, the last failed first; `limit` of them at most."""
    queues = yield from read_queues(default_queue)
    ids: list[str] = []
    for queue in queues:
        if queue.registries["failed"]:
            [members] = yield from send(("ZRANGE", registry_key("failed", queue.name), 0, -1))
            ids += [member.decode() for member in members]
    return (yield from read_failed_of(ids, limit))


def read_failed_of(ids: Sequence[str], limit: int | None = None) -> Protocol[list[FailedJob]]:
    """Those of these jobs that have failed, the last failed first; of all but `limit` only the time is read."""
    found: list[tuple[str, str]] = []  # when, id
    for some in slices(ids, MAX_JOBS_A_READ):
        replies = yield from send(*(("HMGET", job_key(job_id), "status", "ended_at") for job_id in some))
        for job_id, (status, at) in zip(some, replies, strict=True):
            if status == b"failed":  # else it expired, or was put back
                found.append((_text(at), job_id))
    failed: list[FailedJob] = []
    for shown in slices(sorted(found, reverse=True)[:limit], MAX_JOBS_A_READ):
        fields = yield from send(*(("HMGET", job_key(job_id), "origin", "description") for _, job_id in shown))
        wires = yield from send(*(("GET", keys.result_key(job_id)) for _, job_id in shown))
        for (when, job_id), (queue, description), wire in zip(shown, fields, wires, strict=True):
            result = parse_line(job_id, wire) if wire else (yield from read_failure_of_rq(job_id))
            error = result.error or NO_REASON
            what = error.code, error.message, when, result.attempts
            failed.append(FailedJob(job_id, _text(queue), *what, _text(description)))
    return failed


def _text(value: bytes | None) -> str:
    return (value or b"").decode(errors="replace")


def retry(job_id: str) -> Protocol[bool]:
    """Put a failed job back onto its queue. False if it has not failed. Raises JobNotFoundError."""
    [origin] = yield from send(("HGET", job_key(job_id), "origin"))
    if origin is None:
        raise JobNotFoundError.unknown(job_id, "; submit it again")
    queue = origin.decode()
    names = [
        job_key(job_id),
        registry_key("failed", queue),
        keys.result_key(job_id),
        keys.stream_key(job_id),
        queue_key(queue),
        QUEUES_KEY,
        keys.turns_key(keys.split_tenant(queue)[0]),
    ]
    arguments: list[Any] = [job_id, queue, format_time(time.time()), uuid.uuid4().hex, keys.WAITING_STREAM_TTL_SECONDS]
    is_back = yield from _SCRIPT.run(names, arguments)
    return bool(is_back)


# What is sent again because its reply was lost finds its own mark.
_SCRIPT = Script(
    TURNS_SCRIPT
    + """
local job, failed, result, stream, queue, queues, turns = unpack(KEYS)
local id, queue_name, now, request, stream_ttl = unpack(ARGV)
local status, last_request = unpack(redis.call('HMGET', job, 'status', 'promptmill_retry'))
if last_request == request then return 1 end
if status ~= 'failed' then return 0 end
redis.call('ZREM', failed, id)
redis.call('DEL', result)
redis.call('EXPIRE', stream, stream_ttl)  -- the next attempt's marker ends that
redis.call('PERSIST', job)
redis.call('HDEL', job, 'started_at', 'ended_at', 'worker_name', 'exc_info', 'promptmill_resume')
redis.call('HSET', job, 'status', 'queued', 'enqueued_at', now, 'promptmill_retry', request)
redis.call('SADD', queues, queue)
redis.call('RPUSH', queue, id)
join_turns(turns, queue_name)
return 1
"""
)
