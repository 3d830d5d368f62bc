"""What jobs' ends owe to RQ's webhooks: the requests, as they lie in their ledger. Workers write and deliver them.

A request is written in the transaction that commits its job, with its body. Whoever delivers it compares its URL with
those that it allows itself: anybody may have written it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError

from producer.deliveries import DEAD_TTL_SECONDS, GIVE_UP, JOBS, ClaimedDelivery, settle_delivery
from producer.operations import Protocol, Script, send

MAX_ATTEMPT_SECONDS = 60.0  # whatever a webhook asks for
LEASE_MARGIN_SECONDS = 15.0  # of a lease beyond the attempt's time
MAX_LOOKED_AT = 10_000  # that are due, to find some for receivers with room
GIVE_UP_SECONDS = 48 * 3600  # for what no worker allows any more; all attempts at another are over by then


class JobWebhook(BaseModel):
    """`allowed`: the URL of a worker's allow-list that `url` is at or below."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    job_id: str
    url: str
    method: Literal["GET", "POST"]
    headers: dict[str, str]
    timeout_seconds: PositiveFloat
    body: str | None
    allowed: str
    written_at: float  # epoch seconds

    def to_fields(self) -> dict[Any, Any]:
        """Of its delivery's hash."""
        seconds = min(self.timeout_seconds, MAX_ATTEMPT_SECONDS) + LEASE_MARGIN_SECONDS
        fields = {"event": self.model_dump_json(), "endpoint": self.allowed, "attempts": 0}
        return {**fields, "lease_seconds": seconds, "written_at": self.written_at}

    @classmethod
    def describe(cls, event: bytes) -> dict[str, object]:
        """Whose it is and where it goes, for people; None where it cannot be read."""
        try:
            webhook = cls.model_validate_json(event)
        except ValidationError:
            return {"job_id": None, "url": None}
        return {"job_id": webhook.job_id, "url": webhook.url}


@dataclass(frozen=True, slots=True)
class JobDelivery(ClaimedDelivery):
    webhook: JobWebhook


def claim_job_webhooks(max_deliveries: int, room: Mapping[str, int]) -> Protocol[list[JobDelivery]]:
    """Deliveries whose time has come, each under a lease. `room`: how many at most by `allowed`; those of others are
    left to the workers that allow them."""
    limits = [max_deliveries, MAX_LOOKED_AT, GIVE_UP_SECONDS, DEAD_TTL_SECONDS]
    call = _CLAIM.call([JOBS.due, JOBS.dead], [JOBS.prefix, json.dumps(dict(room)), *limits])
    [_, found] = yield from send(_CLAIM.load, call)
    deliveries = []
    for delivery_id, event, attempt in found:
        claimed = ClaimedDelivery(JOBS, delivery_id.decode(), int(attempt))
        try:
            webhook = JobWebhook.model_validate_json(event)
        except ValidationError as error:  # written by a newer version, or by nobody of ours
            yield from settle_delivery(claimed, "dead", error=f"it cannot be read: {error.errors()[0]['msg']}")
        else:
            deliveries.append(JobDelivery(JOBS, claimed.id, claimed.attempt, webhook))
    return deliveries


_CLAIM = Script(
    GIVE_UP
    + """
local due, dead, prefix, room = KEYS[1], KEYS[2], ARGV[1], cjson.decode(ARGV[2])
local max, max_looked_at, give_up_seconds, dead_ttl = unpack(ARGV, 3, 6)
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6

local claimed = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, max_looked_at)) do
  if #claimed >= tonumber(max) then break end
  local event, allowed, lease, written_at =
    unpack(redis.call('HMGET', prefix .. id, 'event', 'endpoint', 'lease_seconds', 'written_at'))
  if not (event and allowed) then
    redis.call('ZREM', due, id)
  elseif not room[allowed] then
    if now - (tonumber(written_at) or 0) > tonumber(give_up_seconds) then
      give_up(id, prefix .. id, due, dead, now, dead_ttl, 'no worker allows its URL any more (see --webhooks)')
    end
  elseif room[allowed] > 0 then
    room[allowed] = room[allowed] - 1
    redis.call('ZADD', due, now + (tonumber(lease) or 60), id)
    claimed[#claimed + 1] = {id, event, redis.call('HINCRBY', prefix .. id, 'attempts', 1)}
  end
end
redis.call('ZREMRANGEBYSCORE', dead, '-inf', now - dead_ttl)
return claimed
"""
)
