"""What jobs' ends owe to RQ's webhooks: the requests, as they lie in their ledger. Workers write and deliver them.

A request is written in the transaction that commits its job, with its body. Whoever delivers it compares its URL with
those that it allows itself: anybody may have written it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError

from producer.deliveries import DEAD_TTL_SECONDS, JOBS, LEDGER_SCRIPT, ClaimedDelivery, settle_delivery
from producer.operations import Command, Protocol, Script

MAX_ATTEMPT_SECONDS = 60.0  # whatever a webhook asks for
LEASE_MARGIN_SECONDS = 15.0  # of a lease beyond the attempt's time
GIVE_UP_SECONDS = 48 * 3600  # that one may be due: no worker allows its URL any more, or they cannot keep up
CLOCK_MARGIN_SECONDS = 600.0  # by which a worker's clock may be ahead of Redis' without keeping a delivery waiting


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

    def write_commands(self, delivery_id: str) -> list[Command]:
        """Owes it. For a transaction: all of them, or none."""
        lease_seconds = min(self.timeout_seconds, MAX_ATTEMPT_SECONDS) + LEASE_MARGIN_SECONDS
        fields = ("event", self.model_dump_json(), "endpoint", self.allowed, "attempts", 0)
        due_at = self.written_at - CLOCK_MARGIN_SECONDS
        return [
            ("HSET", JOBS.prefix + delivery_id, *fields, "lease_seconds", lease_seconds),
            ("ZADD", JOBS.due + self.allowed, due_at, delivery_id),
            ("ZADD", JOBS.receivers, "LT", due_at, self.allowed),
        ]

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
    arguments = [JOBS.due, JOBS.prefix, max_deliveries, json.dumps(dict(room))]
    found = yield from _CLAIM.run([JOBS.receivers], arguments)
    deliveries = []
    for receiver, delivery_id, event, attempt in found:
        claimed = ClaimedDelivery(JOBS, receiver.decode(), delivery_id.decode(), int(attempt))
        try:
            webhook = JobWebhook.model_validate_json(event)
        except ValidationError as error:  # written by a newer version, or by nobody of ours
            yield from settle_delivery(claimed, "dead", error=f"it cannot be read: {error.errors()[0]['msg']}")
        else:
            deliveries.append(JobDelivery(JOBS, claimed.receiver, claimed.id, claimed.attempt, webhook))
    return deliveries


def give_up_job_webhooks() -> Protocol[int]:
    """What has been due for GIVE_UP_SECONDS is dead. Returns how many that were."""
    problem = "no worker has taken it for 48 hours (see --webhooks)"
    arguments = [JOBS.due, JOBS.prefix, GIVE_UP_SECONDS, DEAD_TTL_SECONDS, problem]
    num_given_up = 0
    while True:
        num_found = yield from _GIVE_UP.run([JOBS.receivers, JOBS.dead], arguments)
        if not num_found:
            return num_given_up
        num_given_up += num_found


_CLAIM = Script(
    LEDGER_SCRIPT
    + """
local receivers = KEYS[1]
local due_prefix, prefix, max, rooms = ARGV[1], ARGV[2], tonumber(ARGV[3]), cjson.decode(ARGV[4])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6

return claim(receivers, due_prefix, prefix, rooms, max, 60, now)
"""
)

# A thousand at most of one call: a few milliseconds.
_GIVE_UP = Script(
    LEDGER_SCRIPT
    + """
local receivers, dead = KEYS[1], KEYS[2]
local due_prefix, prefix, give_up_seconds, dead_ttl, problem = unpack(ARGV)
local now = tonumber(redis.call('TIME')[1])
local too_old = now - tonumber(give_up_seconds)

redis.call('ZREMRANGEBYSCORE', dead, '-inf', now - tonumber(dead_ttl))
local num_given_up = 0
for _, receiver in ipairs(redis.call('ZRANGEBYSCORE', receivers, '-inf', too_old, 'LIMIT', 0, 10)) do
  local due = due_prefix .. receiver
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', due, '-inf', too_old, 'LIMIT', 0, 100)) do
    give_up(id, prefix .. id, due, dead, now, dead_ttl, problem)
    num_given_up = num_given_up + 1
  end
  note_next(receivers, due, receiver)
end
return num_given_up
"""
)
