"""The one script that puts a job on its queue: once, whatever is sent twice, and behind the jobs it depends on.

It writes what RQ's own enqueueing writes. RQ forbids `unique` together with `depends_on`; here both are one step.
"""

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from producer.contract import keys
from producer.contract.turns import TURNS_SCRIPT
from producer.operations import Command, Script
from producer.rq_names import (
    QUEUES_KEY,
    dependencies_key,
    dependents_key,
    format_time,
    job_key,
    queue_key,
    registry_key,
)

NO_TIMEOUT = -1  # RQ's: how long a job may run is up to its max_tokens and to the worker
BODY_FIELD = "promptmill_body"  # of RQ's job hash: the fingerprint of what an idempotency key was first used for

NEW, CONFLICT, NO_DEPENDENCY = b"new", b"conflict", b"no dependency"
"""The script's verdicts, beside `known`; each comes with a word: the job's queue, or the dependency that never ends."""


def enqueue_call(
    job_id: str,
    queue: str,
    *,
    arguments: str,
    description: str,
    body: str | None,
    depends_on: Sequence[str],
    is_durable: bool,
) -> Command:
    """`body`: the fingerprint that a job of this id must have, if there is one. Send `SCRIPT.load` before."""
    now = format_time(time.time())
    fields: dict[str, Any] = {
        "origin": queue,
        "created_at": now,
        "description": description,
        "timeout": NO_TIMEOUT,
        "result_ttl": keys.RESULT_TTL_SECONDS,
        "failure_ttl": keys.FAILURE_TTL_SECONDS,
        "data": zlib.compress(arguments.encode()),
        **({BODY_FIELD: body} if body is not None else {}),
        **_dependency_fields(depends_on),
    }
    names = [
        job_key(job_id),
        queue_key(queue),
        QUEUES_KEY,
        keys.turns_key(keys.split_tenant(queue)[0]),
        registry_key("deferred", queue),
        dependencies_key(job_id),
    ]
    for dependency in depends_on:
        names += [job_key(dependency), dependents_key(dependency)]
    flat = [part for field in fields.items() for part in field]
    return SCRIPT.call(names, [job_id, queue, body or "", now, int(is_durable), len(depends_on), *depends_on, *flat])


def _dependency_fields(depends_on: Sequence[str]) -> Mapping[str, str]:
    if not depends_on:
        return {}
    return {"dependency_id": depends_on[0], "dependency_ids": json.dumps(list(depends_on))}


SCRIPT = Script(
    TURNS_SCRIPT
    + """
local job, queue, queues, turns, deferred, dependencies = unpack(KEYS, 1, 6)
local id, queue_name, body, now, durable, num_dependencies = unpack(ARGV, 1, 6)

if redis.call('EXISTS', job) == 1 then
  local known = redis.call('HMGET', job, 'origin', 'promptmill_body', 'created_at')
  if body ~= '' and known[2] ~= body then return {'conflict', known[1] or ''} end
  -- WAIT and WAITAOF look at what their own connection has written: so it writes something
  if durable == '1' then redis.call('HSET', job, 'created_at', known[3] or now) end
  return {'known', known[1] or ''}
end

local is_met = true
for i = 1, num_dependencies do
  local status = redis.call('HGET', KEYS[5 + 2 * i], 'status')
  if not status or status == 'canceled' then return {'no dependency', ARGV[6 + i]} end
  is_met = is_met and status == 'finished'
end

redis.call('HSET', job, unpack(ARGV, 7 + num_dependencies))
redis.call('SADD', queues, queue)
if not is_met then
  redis.call('HSET', job, 'status', 'deferred')
  redis.call('ZADD', deferred, redis.call('TIME')[1], id)
  for i = 1, num_dependencies do
    redis.call('SADD', KEYS[6 + 2 * i], id)
    redis.call('SADD', dependencies, ARGV[6 + i])
  end
  return {'new', queue_name}
end
redis.call('HSET', job, 'status', 'queued', 'enqueued_at', now)
redis.call('RPUSH', queue, id)
join_turns(turns, queue_name)
return {'new', queue_name}
"""
)
