"""Deliveries of batch events, one for each event and endpoint. Owns the script that makes and claims them;
`producer.deliveries` has their later states.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from producer.deliveries import BATCHES, DEAD_TTL_SECONDS, LEDGER_SCRIPT, ClaimedDelivery
from producer.gateway.webhooks.endpoints import DISABLED_KEY, ENDPOINTS_KEY, WebhookEndpoint
from producer.gateway.webhooks.outbox import OUTBOX_KEY, Event
from producer.operations import Protocol, Script

LEASE_SECONDS = 45.0  # longer than an attempt can take
MAX_TO_ENDPOINT = 8  # at a time from one process: one that does not answer leaves room for the others
MAX_LOOKED_AT = 1000  # due endpoints of one call; a process has far fewer without room


@dataclass(frozen=True, slots=True)
class EventDelivery(ClaimedDelivery):
    event: Event
    endpoint: WebhookEndpoint


def claim_deliveries(
    max_deliveries: int, lease_seconds: float = LEASE_SECONDS, *, under_way: Mapping[str, int] | None = None
) -> Protocol[list[EventDelivery]]:
    """Events out of the outbox, and deliveries whose time has come, each under a lease.

    `under_way`: by endpoint id, how many the caller has; those of an endpoint with MAX_TO_ENDPOINT wait.
    """
    limits = [MAX_TO_ENDPOINT, MAX_LOOKED_AT, json.dumps(dict(under_way or {}))]
    found = yield from _CLAIM.run(
        [OUTBOX_KEY, ENDPOINTS_KEY, DISABLED_KEY, BATCHES.receivers, BATCHES.dead],
        [BATCHES.due, BATCHES.prefix, max_deliveries, lease_seconds, DEAD_TTL_SECONDS, *limits],
    )
    return [
        EventDelivery(
            BATCHES,
            receiver.decode(),
            delivery_id.decode(),
            int(attempt),
            Event.model_validate_json(event),
            WebhookEndpoint.model_validate_json(endpoint),
        )
        for receiver, delivery_id, event, attempt, endpoint in found
    ]


_CLAIM = Script(
    LEDGER_SCRIPT
    + """
local outbox, endpoints, disabled, receivers, dead = unpack(KEYS, 1, 5)
local due_prefix, prefix, dead_ttl = ARGV[1], ARGV[2], tonumber(ARGV[5])
local max, lease = tonumber(ARGV[3]), tonumber(ARGV[4])
local max_to_endpoint, max_looked_at, under_way = tonumber(ARGV[6]), tonumber(ARGV[7]), cjson.decode(ARGV[8])
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
      redis.call('ZADD', due_prefix .. endpoint.id, now, id)
      redis.call('ZADD', receivers, 'LT', now, endpoint.id)
    end
  end
end

-- What is due to an endpoint that may not be called: a hundred at a time.
local function drop(endpoint_id, is_gone)
  local due = due_prefix .. endpoint_id
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, 100)) do
    if is_gone then  -- there is nobody left to tell
      redis.call('ZREM', due, id)
      redis.call('DEL', prefix .. id)
    else
      give_up(id, prefix .. id, due, dead, now, dead_ttl, 'the endpoint is disabled: it answered 410')
    end
  end
  note_next(receivers, due, endpoint_id)
end

local rooms = {}
for _, endpoint_id in ipairs(redis.call('ZRANGEBYSCORE', receivers, '-inf', now, 'LIMIT', 0, max_looked_at)) do
  local is_gone = redis.call('HEXISTS', endpoints, endpoint_id) == 0
  if is_gone or redis.call('HEXISTS', disabled, endpoint_id) == 1 then
    drop(endpoint_id, is_gone)
  else
    rooms[endpoint_id] = max_to_endpoint - (under_way[endpoint_id] or 0)
  end
end

local claimed = claim(receivers, due_prefix, prefix, rooms, max, lease, now)
for _, one in ipairs(claimed) do one[#one + 1] = redis.call('HGET', endpoints, one[1]) end
redis.call('ZREMRANGEBYSCORE', dead, '-inf', now - dead_ttl)
return claimed
"""
)
