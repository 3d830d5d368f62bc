"""Cancels jobs. Owns the one script that decides between a producer that cancels and a worker that claims or ends.

The race rules, all decided inside Redis in one step:
- A job that nobody holds becomes `canceled` and gets its outcome (marker, chunks, done entry, result, results line)
  here; no worker can claim it any more, because a claim requires status `queued`.
- A job that a worker holds becomes `canceled`, and the worker is told; it writes the outcome with what it has.
- A job whose stream has its done entry is decided, even if RQ does not show it yet: the cancel comes too late.
"""

from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from producer.contract import Choice, Chunk, Done, EntryId, Marker, Result, Usage, keys
from producer.contract.job import MAX_CHOICES
from producer.contract.rules import JsonObject
from producer.errors import JobNotFoundError
from producer.operations import Protocol, Script, send
from producer.rq_names import (
    dependencies_key,
    dependents_key,
    execution_key_prefix,
    executions_key,
    job_key,
    queue_key,
    registry_key,
)
from producer.stored_request import read_fields
from producer.stream_reader import BEGINNING, StreamReader

Verdict = Literal["cancelled", "requested", "ended", "moved", "gone"]

ABANDONED_SECONDS = 60.0  # a lease that ended this long ago has neither a holder nor a worker that sweeps it
WRITER = "producer"  # the marker's `worker`, when a producer writes the outcome


def cancel(job_id: str) -> Protocol[bool]:
    """Cancel the job. True if it ends, or has ended, as cancelled; False if it ended otherwise before.

    Raises JobNotFoundError if the job is not known, or was forgotten.
    """
    while True:
        verdict = yield from _cancel_once(job_id)
        if verdict == "gone":
            raise JobNotFoundError.unknown(job_id, "; nothing to cancel")
        if verdict != "moved":  # moved: entries were written while we composed the outcome
            return verdict in ("cancelled", "requested")


def settle_cancelled(job_id: str) -> Protocol[None]:
    """Give a job that was cancelled by other means (plain RQ) its outcome, unless a worker holds it and will."""
    yield from _cancel_once(job_id)


def _cancel_once(job_id: str) -> Protocol[Verdict]:
    fields, entries, stored = yield from send(
        ("HMGET", job_key(job_id), "origin", "data"),
        ("XRANGE", keys.stream_key(job_id), "-", "+"),
        ("GET", keys.result_key(job_id)),
    )
    origin, data = fields
    was_cancelled = stored is not None and _is_cancelled(stored)
    if origin is None:
        if stored is None:
            return "gone"
        return "cancelled" if was_cancelled else "ended"
    outcome = _compose(job_id, entries, read_fields(data))
    verdict = yield from _write(job_id, origin.decode(), entries, outcome, was_cancelled=was_cancelled)
    return verdict.decode()  # type: ignore[no-any-return]


def _is_cancelled(result: bytes) -> bool:
    try:
        return Result.model_validate_json(result).status == "cancelled"
    except ValidationError:
        return False


def _compose(job_id: str, entries: list[Any], request: dict[str, Any]) -> tuple[list[tuple[str, str, str]], Result]:
    """The entries that end the stream as cancelled, behind what it holds, and the result that agrees with them."""
    reader = StreamReader(job_id)
    deliveries = reader.take_range(entries)
    has_ended = reader.done is not None  # yet the job came back (RQ's requeue): what it had is void
    chunks = [] if has_ended else [delivery.chunk for delivery in deliveries]
    choices = [Choice.join(index, chunks, cut_off="cancelled") for index in range(_num_choices(request))]
    attempt = reader.last_id.attempt + 1
    usage = _usage(entries, chunks)
    marker = Marker(job_id=job_id, attempt=attempt, worker=WRITER, reset=has_ended)
    lines = [(str(EntryId(attempt, 0)), keys.MARKER_FIELD, marker.to_wire())]
    open_chunks: list[Chunk | Done] = [
        Chunk(job_id=job_id, index=choice.index, token_offset=len(choice.token_ids), finish_reason="cancelled")
        for choice in choices
        if choice.finish_reason == "cancelled"
    ]
    done = Done(job_id=job_id, done=True, status="cancelled", usage=usage)
    for seq, entry in enumerate([*open_chunks, done], start=1):
        lines.append((str(EntryId(attempt, seq)), keys.DATA_FIELD, entry.to_wire()))
    result = Result(
        job_id=job_id,
        status="cancelled",
        choices=choices,
        usage=usage,
        attempts=reader.last_id.attempt,
        metadata=_metadata(request),
    )
    return lines, result


def _metadata(request: dict[str, Any]) -> dict[str, Any]:
    """None where it is nothing that can be written down."""
    try:
        return _METADATA.validate_python(request.get("metadata", {}))
    except ValidationError:
        return {}


_METADATA: TypeAdapter[dict[str, Any]] = TypeAdapter(JsonObject)


def _num_choices(request: dict[str, Any]) -> int:
    """Of what no worker would take, one: anybody may have written it."""
    if request.get("task") == "embed":
        return 0
    wanted = request.get("n", 1)
    return wanted if isinstance(wanted, int) and 1 <= wanted <= MAX_CHOICES else 1


def _usage(entries: list[Any], chunks: list[Chunk]) -> Usage:
    """The prompt's tokens are known once a worker has begun: its first marker lists them."""
    markers = [fields[keys.MARKER_FIELD.encode()] for _, fields in entries if keys.MARKER_FIELD.encode() in fields]
    prompts = [len(Marker.model_validate_json(marker).prompt_token_ids or []) for marker in markers]
    num_prompt, num_output = max(prompts, default=0), sum(len(chunk.token_ids) for chunk in chunks)
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_output,
        total_tokens=num_prompt + num_output,
        reasoning_tokens=sum(chunk.reasoning_tokens or 0 for chunk in chunks),
    )


def _write(
    job_id: str,
    queue: str,
    entries: list[Any],
    outcome: tuple[list[tuple[str, str, str]], Result],
    *,
    was_cancelled: bool,
) -> Protocol[Any]:
    """`was_cancelled`: the job has a result already, which says so."""
    lines, result = outcome
    last_id = entries[-1][0].decode() if entries else str(BEGINNING)
    return _SCRIPT.run(
        keys=[
            job_key(job_id),
            keys.stream_key(job_id),
            keys.result_key(job_id),
            keys.leases_key(queue),
            keys.fence_key(job_id),
            keys.attempt_key(job_id),
            keys.results_channel(queue),
            queue_key(queue),
            registry_key("deferred", queue),
            registry_key("scheduled", queue),
            registry_key("started", queue),
            registry_key("cancelled", queue),
            executions_key(job_id),
            dependencies_key(job_id),
            dependents_key(job_id),
        ],
        arguments=[
            job_id,
            last_id,
            ABANDONED_SECONDS,
            keys.CANCEL_CHANNEL,
            execution_key_prefix(job_id),
            keys.RESULT_TTL_SECONDS,
            keys.STREAM_TTL_SECONDS,
            keys.RESULTS_STREAM_MAX_ENTRIES,
            result.to_wire(),
            result.without_output().to_wire(),
            int(was_cancelled),
            *(part for line in lines for part in line),
        ],
    )


_SCRIPT = Script("""
local job, stream, result, leases, fence, attempt, results = unpack(KEYS, 1, 7)
local queue, deferred, scheduled, started, cancelled, executions, dependencies, dependents = unpack(KEYS, 8, 15)
local id, expected, abandoned, channel, execution_prefix = unpack(ARGV, 1, 5)
local result_ttl, stream_ttl, results_max, whole, line, was_cancelled = unpack(ARGV, 6, 11)

local status = redis.call('HGET', job, 'status')
if not status then return 'gone' end
if status == 'finished' or status == 'failed' or status == 'stopped' then return 'ended' end

local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local lease = redis.call('ZSCORE', leases, id)
local held = lease and tonumber(lease) + tonumber(abandoned) > now
local last = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]

-- A done entry decides, if it is this run's: a job that is on its queue again, or was claimed anew, came back after it;
-- but for one that was claimed to go on where a dead worker left it.
local claimed = tonumber(redis.call('GET', attempt) or 0)
local waits = status ~= 'started' and status ~= 'canceled'
local execution = string.match(redis.call('GET', fence) or '', ':(.+)')
local goes_on = execution and redis.call('HGET', execution_prefix .. execution, 'resumable') == '1'
local decides = last and not waits and (goes_on or claimed <= tonumber(string.match(last[1], '^(%d+)-')))
if decides and last[2][1] == 'd' then
  local entry = cjson.decode(last[2][2])
  if entry.done then return entry.status == 'cancelled' and 'cancelled' or 'ended' end
end
-- Its outcome was written, and a fail-over lost the done entry alone. Another result is that of a run before.
if status == 'canceled' and not held and claimed == 0 and was_cancelled == '1' then return 'cancelled' end
if not held and (last and last[1] or '0-0') ~= expected then return 'moved' end

if status ~= 'canceled' then
  redis.call('HSET', job, 'status', 'canceled')
  redis.call('LREM', queue, 1, id)
  redis.call('ZREM', deferred, id)
  redis.call('ZREM', scheduled, id)
  for _, execution in ipairs(redis.call('ZRANGE', executions, 0, -1)) do
    redis.call('ZREM', started, id .. ':' .. execution)
  end
  -- RQ never cleans this registry up; its scores are the times of the cancels.
  redis.call('ZREMRANGEBYSCORE', cancelled, '-inf', now - tonumber(result_ttl))
  redis.call('ZADD', cancelled, math.floor(now), id)
end
for _, key in ipairs({job, dependencies, dependents}) do redis.call('EXPIRE', key, result_ttl) end
if held then
  redis.call('PUBLISH', channel, id)
  return 'requested'
end

-- Nobody holds it. Whoever held it once is fenced out, here and by the entry ids of the next attempt.
for _, execution in ipairs(redis.call('ZRANGE', executions, 0, -1)) do
  redis.call('DEL', execution_prefix .. execution)
end
if execution then redis.call('DEL', execution_prefix .. execution) end
redis.call('DEL', fence, attempt, executions)
redis.call('ZREM', leases, id)
for i = 12, #ARGV, 3 do
  redis.call('XADD', stream, ARGV[i], ARGV[i + 1], ARGV[i + 2])
  if ARGV[i + 1] == 'd' then redis.call('PUBLISH', stream, ARGV[i] .. ' ' .. ARGV[i + 2]) end
end
redis.call('EXPIRE', stream, stream_ttl)
redis.call('SET', result, whole, 'EX', result_ttl)
redis.call('XADD', results, 'MAXLEN', '~', results_max, '*', 'd', line)
redis.call('EXPIRE', results, result_ttl)
redis.call('PUBLISH', results, line)
redis.call('PUBLISH', channel, id)
return 'cancelled'
""")
