"""What batches' ends owe to whom: one delivery for each event and endpoint. Owns the script that makes and claims them;
what becomes of a delivery is in `producer.deliveries`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from producer.deliveries import BATCHES, DEAD_TTL_SECONDS, GIVE_UP, ClaimedDelivery
from producer.gateway.webhooks.endpoints import DISABLED_KEY, ENDPOINTS_KEY, WebhookEndpoint
from producer.gateway.webhooks.outbox import OUTBOX_KEY, Event
from producer.operations import Protocol, Script, send

LEASE_SECONDS = 45.0  # longer than an attempt can take
MAX_TO_ENDPOINT = 8  # at a time from one process: one that does not answer leaves room for the others
MAX_LOOKED_AT = 10_000  # that are due, to find some of endpoints with room


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
    call = _CLAIM.call(
        [OUTBOX_KEY, ENDPOINTS_KEY, DISABLED_KEY, BATCHES.due, BATCHES.dead],
        [BATCHES.prefix, max_deliveries, lease_seconds, DEAD_TTL_SECONDS, *limits],
    )
    [_, found] = yield from send(_CLAIM.load, call)
    return [
        EventDelivery(
            BATCHES,
            delivery_id.decode(),
            int(attempt),
            Event.model_validate_json(event),
            WebhookEndpoint.model_validate_json(endpoint),
        )
        for delivery_id, event, endpoint, attempt in found
    ]


_CLAIM = Script(
    GIVE_UP
    + """
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
    give_up(id, prefix .. id, due, dead, now, dead_ttl, 'the endpoint is disabled: it answered 410')
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
"""
)
