"""What is under way to whom: one delivery for each event and endpoint. Owns its scripts, and when to try again.

A delivery is a hash in Redis, and a member of `DUE_KEY` scored by the second of its next attempt. Whoever claims it
pushes that second behind its lease: if it dies, another takes over, under the same webhook-id. The number of attempts
is the fence: what an attempt failed with counts only while it is the last one.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from producer.gateway.webhooks.endpoints import DISABLED_KEY, ENDPOINTS_KEY, WebhookEndpoint
from producer.gateway.webhooks.outbox import OUTBOX_KEY, Event
from producer.operations import Protocol, Script, send

DUE_KEY = "promptmill:webhooks:due"  # ZSET of delivery ids, scored by the epoch second of the next attempt
DEAD_KEY = "promptmill:webhooks:dead"  # ZSET of delivery ids that came to nothing, scored by when
DELIVERY_PREFIX = "promptmill:webhooks:delivery:"  # + EVENT:ENDPOINT: HASH of event, endpoint, attempts, error

LEASE_SECONDS = 45.0  # longer than an attempt can take
MAX_TO_ENDPOINT = 8  # at a time from one process: one that does not answer leaves room for the others
MAX_LOOKED_AT = 10_000  # that are due, to find some of endpoints with room
DEAD_TTL_SECONDS = 7 * 24 * 3600
# Seconds between attempts: eleven of them within 26 hours.
RETRY_DELAYS = (5.0, 20.0, 80.0, 320.0, 1280.0, 5120.0, 20480.0, 21600.0, 21600.0, 21600.0)
MAX_RETRY_AFTER_SECONDS = 21600.0  # what a receiver may ask for
JITTER = 0.2  # of a delay, either way: receivers that were down do not get everything at once

Verdict = Literal["delivered", "retry", "dead", "gone"]


@dataclass(frozen=True, slots=True)
class ClaimedDelivery:
    id: str
    event: Event
    endpoint: WebhookEndpoint
    attempt: int  # from 1


@dataclass(frozen=True, slots=True)
class PendingDelivery:
    """One that waits for its next attempt at `at`, or died then."""

    id: str
    event: Event
    endpoint_id: str
    num_attempts: int
    error: str
    at: float  # epoch seconds
    is_dead: bool


def claim_deliveries(
    max_deliveries: int, lease_seconds: float = LEASE_SECONDS, *, under_way: Mapping[str, int] | None = None
) -> Protocol[list[ClaimedDelivery]]:
    """Events out of the outbox, and deliveries whose time has come, each under a lease.

    `under_way`: by endpoint id, how many the caller has; those of an endpoint with MAX_TO_ENDPOINT wait.
    """
    limits = [MAX_TO_ENDPOINT, MAX_LOOKED_AT, json.dumps(dict(under_way or {}))]
    call = _CLAIM.call(
        [OUTBOX_KEY, ENDPOINTS_KEY, DISABLED_KEY, DUE_KEY, DEAD_KEY],
        [DELIVERY_PREFIX, max_deliveries, lease_seconds, DEAD_TTL_SECONDS, *limits],
    )
    [_, found] = yield from send(_CLAIM.load, call)
    return [
        ClaimedDelivery(
            delivery_id.decode(),
            Event.model_validate_json(event),
            WebhookEndpoint.model_validate_json(endpoint),
            int(attempt),
        )
        for delivery_id, event, endpoint, attempt in found
    ]


def settle_delivery(
    delivery: ClaimedDelivery, verdict: Verdict, *, delay_seconds: float = 0.0, error: str = ""
) -> Protocol[None]:
    """What an attempt came to: delivered, once more after the delay, dead, or its endpoint is gone for good."""
    call = _SETTLE.call(
        [DELIVERY_PREFIX + delivery.id, DUE_KEY, DEAD_KEY, DISABLED_KEY],
        [delivery.id, delivery.endpoint.id, delivery.attempt, verdict, delay_seconds, error, DEAD_TTL_SECONDS],
    )
    yield from send(_SETTLE.load, call)


def retry_delay(attempt: int, retry_after_seconds: float | None) -> float | None:
    """Seconds before the attempt behind this one; None: it was the last."""
    if attempt > len(RETRY_DELAYS):
        return None
    delay = RETRY_DELAYS[attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)
    return max(delay, min(retry_after_seconds or 0.0, MAX_RETRY_AFTER_SECONDS))


def list_deliveries() -> Protocol[list[PendingDelivery]]:
    """What waits, the next first, and then what is dead, the latest first."""
    [due, dead] = yield from send(
        ("ZRANGE", DUE_KEY, 0, -1, "WITHSCORES"), ("ZREVRANGE", DEAD_KEY, 0, -1, "WITHSCORES")
    )
    scored = [(due[i], due[i + 1], False) for i in range(0, len(due), 2)]
    scored += [(dead[i], dead[i + 1], True) for i in range(0, len(dead), 2)]
    if not scored:
        return []
    fields = yield from send(
        *(("HMGET", DELIVERY_PREFIX + name.decode(), "event", "endpoint", "attempts", "error") for name, _, _ in scored)
    )
    return [
        PendingDelivery(
            id=name.decode(),
            event=Event.model_validate_json(event),
            endpoint_id=endpoint.decode(),
            num_attempts=int(attempts),
            error=(error or b"").decode(),
            at=float(at),
            is_dead=is_dead,
        )
        for (name, at, is_dead), (event, endpoint, attempts, error) in zip(scored, fields, strict=True)
        if event is not None  # delivered, or forgotten, in between
    ]


def revive_deliveries(delivery_ids: list[str]) -> Protocol[list[str]]:
    """Dead ones have all their attempts before them again. Those of the ids that were dead."""
    if not delivery_ids:
        return []
    calls = [_REVIVE.call([DELIVERY_PREFIX + name, DUE_KEY, DEAD_KEY], [name]) for name in delivery_ids]
    [_, *revived] = yield from send(_REVIVE.load, *calls)
    return [name for name, is_revived in zip(delivery_ids, revived, strict=True) if is_revived]


def describe(delivery: PendingDelivery) -> dict[str, object]:
    return {
        "id": delivery.id,
        "status": "dead" if delivery.is_dead else "waiting",
        "event": json.loads(delivery.event.to_body()),
        "endpoint_id": delivery.endpoint_id,
        "attempts": delivery.num_attempts,
        "error": delivery.error or None,
        "at": delivery.at,
    }


_CLAIM = Script("""
local outbox, endpoints, disabled, due, dead = unpack(KEYS, 1, 5)
local prefix, max, lease, dead_ttl = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local max_to_endpoint, max_looked_at, under_way = tonumber(ARGV[5]), tonumber(ARGV[6]), cjson.decode(ARGV[7])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6

local function wants(endpoint, event)
  if endpoint.key_id ~= cjson.null and endpoint.key_id ~= event.key_id then return false end
  for _, name in ipairs(endpoint.event_types) do
    if name == event.type then return true end
  end
  return false
end

-- Each event of the outbox becomes a delivery for every endpoint that wants it: here, in one step, or not at all.
for _ = 1, math.min(100, redis.call('LLEN', outbox)) do
  local raw = redis.call('LPOP', outbox)
  local event = cjson.decode(raw)
  for _, text in ipairs(redis.call('HVALS', endpoints)) do
    local endpoint = cjson.decode(text)
    local id = event.id .. ':' .. endpoint.id
    if wants(endpoint, event) and redis.call('HEXISTS', disabled, endpoint.id) == 0
        and redis.call('HSETNX', prefix .. id, 'event', raw) == 1 then
      redis.call('HSET', prefix .. id, 'endpoint', endpoint.id, 'attempts', 0)
      redis.call('ZADD', due, now, id)
    end
  end
end

local claimed = {}
local function claim(id)
  local event, endpoint_id = unpack(redis.call('HMGET', prefix .. id, 'event', 'endpoint'))
  local endpoint = endpoint_id and redis.call('HGET', endpoints, endpoint_id)
  if not endpoint then  -- taken away: there is nobody left to tell
    redis.call('ZREM', due, id)
    redis.call('DEL', prefix .. id)
  elseif redis.call('HEXISTS', disabled, endpoint_id) == 1 then
    redis.call('ZREM', due, id)
    redis.call('ZADD', dead, now, id)
    redis.call('HSET', prefix .. id, 'error', 'the endpoint is disabled: it answered 410')
    redis.call('EXPIRE', prefix .. id, dead_ttl)
  else
    redis.call('ZADD', due, now + lease, id)
    claimed[#claimed + 1] = {id, event, endpoint, redis.call('HINCRBY', prefix .. id, 'attempts', 1)}
    under_way[endpoint_id] = (under_way[endpoint_id] or 0) + 1
  end
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, max_looked_at)) do
  if #claimed >= max then break end
  if (under_way[string.match(id, '[^:]*$')] or 0) < max_to_endpoint then claim(id) end
end
redis.call('ZREMRANGEBYSCORE', dead, '-inf', now - dead_ttl)
return claimed
""")

_SETTLE = Script("""
local delivery, due, dead, disabled = unpack(KEYS, 1, 4)
local id, endpoint_id, attempt, verdict, delay, problem, dead_ttl = unpack(ARGV, 1, 7)
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
if verdict == 'gone' then redis.call('HSET', disabled, endpoint_id, math.floor(now)) end
if verdict == 'delivered' then  -- that holds, even if another attempt is under way by now
  redis.call('ZREM', due, id)
  redis.call('DEL', delivery)
  return
end
if redis.call('HGET', delivery, 'attempts') ~= attempt then return end
redis.call('HSET', delivery, 'error', problem)
if verdict == 'retry' then
  redis.call('ZADD', due, now + tonumber(delay), id)
else
  redis.call('ZREM', due, id)
  redis.call('ZADD', dead, now, id)
  redis.call('EXPIRE', delivery, dead_ttl)
end
""")

_REVIVE = Script("""
local delivery, due, dead = KEYS[1], KEYS[2], KEYS[3]
if redis.call('ZREM', dead, ARGV[1]) == 0 then return 0 end
if redis.call('EXISTS', delivery) == 0 then return 0 end
redis.call('HSET', delivery, 'attempts', 0)
redis.call('PERSIST', delivery)
redis.call('ZADD', due, 0, ARGV[1])
return 1
""")
