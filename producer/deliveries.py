"""Webhook deliveries as Redis keeps them: when one is tried again, how it ends, what is seen of it. Sends nothing.

There are two ledgers: what batches' ends owe, which gateways deliver, and what jobs' ends owe, which workers do. A
delivery is a hash, and a member of its receiver's ZSET, scored by the second of its next attempt; `receivers` holds who
is owed anything, scored by the first such second. So what one receiver is owed is never looked through for another.
Whoever claims a delivery pushes its second behind its lease: if it dies, another takes over, under the same webhook-id.
The number of attempts is the fence: what an attempt failed with counts only while it is the last one.
"""

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

from producer.operations import Protocol, Script, send

DEAD_TTL_SECONDS = 7 * 24 * 3600
# Seconds between attempts: eleven of them within 26 hours.
RETRY_DELAYS = (5.0, 20.0, 80.0, 320.0, 1280.0, 5120.0, 20480.0, 21600.0, 21600.0, 21600.0)
MAX_RETRY_AFTER_SECONDS = 21600.0  # what a receiver may ask for
JITTER = 0.2  # of a delay, either way: receivers that were down do not get everything at once
GONE = 410  # the status of a receiver that wants nothing more

Verdict = Literal["delivered", "retry", "dead"]
LOG_LEVELS: dict[Verdict, int] = {"delivered": logging.INFO, "retry": logging.WARNING, "dead": logging.ERROR}
RetryDelay = Callable[[int, float | None], float | None]


@dataclass(frozen=True, slots=True)
class Ledger:
    """Names in Redis."""

    name: str

    @property
    def receivers(self) -> str:
        """ZSET of those that are owed a delivery, scored by the epoch second of the first attempt."""
        return f"{self.name}:receivers"

    @property
    def due(self) -> str:
        """+ receiver: ZSET of delivery ids, scored by the epoch second of the next attempt."""
        return f"{self.name}:due:"

    @property
    def dead(self) -> str:
        """ZSET of delivery ids that came to nothing, scored by when."""
        return f"{self.name}:dead"

    @property
    def prefix(self) -> str:
        """+ delivery id: HASH of event, endpoint (its receiver), attempts, error."""
        return f"{self.name}:delivery:"


BATCHES = Ledger("promptmill:webhooks")
JOBS = Ledger("promptmill:job_webhooks")
LEDGERS = (BATCHES, JOBS)


@dataclass(frozen=True, slots=True)
class ClaimedDelivery:
    """An attempt that somebody makes."""

    ledger: Ledger
    receiver: str
    id: str
    attempt: int  # from 1


@dataclass(frozen=True, slots=True)
class Answer:
    """A receiver's. `status` is None where no response came."""

    status: int | None
    problem: str = ""
    retry_after_seconds: float | None = None

    @classmethod
    def of(cls, status: int, retry_after: str | None) -> Self:
        """Of a response; `retry_after`: that header, where a date counts as none."""
        answer = cls(status)
        if answer.is_delivered:
            return answer
        is_number = retry_after is not None and retry_after.isdecimal() and len(retry_after) < 8
        return cls(status, f"answered {status}", float(retry_after) if retry_after and is_number else None)

    @property
    def is_delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class PendingDelivery:
    """One that waits for its next attempt at `at`, or died then. `event` and `endpoint` are the ledger's affair."""

    ledger: Ledger
    id: str
    event: bytes
    endpoint: str
    num_attempts: int
    error: str
    at: float  # epoch seconds
    is_dead: bool


@dataclass(frozen=True, slots=True)
class WebhookCounts:
    """Deliveries that wait for an attempt (or have one under way), and those that came to nothing within seven days."""

    waiting: int = 0
    dead: int = 0


def settle_answer(delivery: ClaimedDelivery, answer: Answer, delay_after: RetryDelay) -> Protocol[Verdict]:
    """Settle it as the answer to its attempt has it."""
    delay: float | None = None
    if not answer.is_delivered and answer.status != GONE:
        delay = delay_after(delivery.attempt, answer.retry_after_seconds)
    verdict: Verdict = "delivered" if answer.is_delivered else "dead" if delay is None else "retry"
    yield from settle_delivery(delivery, verdict, delay_seconds=delay or 0.0, error=answer.problem)
    return verdict


def settle_delivery(
    delivery: ClaimedDelivery, verdict: Verdict, *, delay_seconds: float = 0.0, error: str = ""
) -> Protocol[None]:
    """It is delivered, dead, or tried once more after the delay."""
    ledger, arguments = delivery.ledger, [delivery.id, delivery.attempt, verdict, delay_seconds, error]
    yield from _SETTLE.run(
        [ledger.prefix + delivery.id, ledger.receivers, ledger.due + delivery.receiver, ledger.dead],
        [*arguments, DEAD_TTL_SECONDS, delivery.receiver],
    )


def retry_delay(attempt: int, retry_after_seconds: float | None) -> float | None:
    """Seconds before the attempt behind this one; None: it was the last."""
    if attempt > len(RETRY_DELAYS):
        return None
    delay = RETRY_DELAYS[attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)
    return max(delay, min(retry_after_seconds or 0.0, MAX_RETRY_AFTER_SECONDS))


def count_deliveries() -> Protocol[WebhookCounts]:
    """Of both ledgers."""
    receivers = yield from send(*(("ZRANGE", ledger.receivers, 0, -1) for ledger in LEDGERS))
    due = [ledger.due + name.decode() for ledger, names in zip(LEDGERS, receivers, strict=True) for name in names]
    counts = yield from send(*(("ZCARD", name) for name in (*(ledger.dead for ledger in LEDGERS), *due)))
    return WebhookCounts(waiting=sum(counts[len(LEDGERS) :]), dead=sum(counts[: len(LEDGERS)]))


def list_deliveries() -> Protocol[list[PendingDelivery]]:
    """Of each ledger what waits, the next first, and then what is dead, the latest first."""
    found: list[PendingDelivery] = []
    for ledger in LEDGERS:
        found += yield from _list_ledger(ledger)
    return found


def _list_ledger(ledger: Ledger) -> Protocol[list[PendingDelivery]]:
    [receivers] = yield from send(("ZRANGE", ledger.receivers, 0, -1))
    [dead, *waiting] = yield from send(
        ("ZREVRANGE", ledger.dead, 0, -1, "WITHSCORES"),
        *(("ZRANGE", ledger.due + receiver.decode(), 0, -1, "WITHSCORES") for receiver in receivers),
    )
    scored = [(due[i], due[i + 1], False) for due in waiting for i in range(0, len(due), 2)]
    scored.sort(key=lambda one: float(one[1]))
    scored += [(dead[i], dead[i + 1], True) for i in range(0, len(dead), 2)]
    if not scored:
        return []
    fields = yield from send(
        *(("HMGET", ledger.prefix + name.decode(), "event", "endpoint", "attempts", "error") for name, _, _ in scored)
    )
    return [
        PendingDelivery(
            ledger=ledger,
            id=name.decode(),
            event=event,
            endpoint=endpoint.decode(),
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
    calls = [
        _REVIVE.call([ledger.prefix + name, ledger.receivers, ledger.dead], [name, ledger.due])
        for name in delivery_ids
        for ledger in LEDGERS
    ]
    [_, *revived] = yield from send(_REVIVE.load, *calls)
    return [name for name, *found in zip(delivery_ids, revived[::2], revived[1::2], strict=True) if any(found)]


# A part of the scripts on a ledger. `claim` takes the first due ones of each receiver in `rooms`, within its room,
# whoever has most room first: who takes all its room keeps nobody else from a turn. Each is taken for its own lease, or
# for the one that is given. Returns {receiver, id, event, attempt} of each.
LEDGER_SCRIPT = """
local function note_next(receivers, due, receiver)
  local first = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')
  if first[1] then
    redis.call('ZADD', receivers, first[2], receiver)
  else
    redis.call('ZREM', receivers, receiver)
  end
end

local function give_up(id, delivery, due, dead, now, dead_ttl, problem)
  redis.call('ZREM', due, id)
  redis.call('ZADD', dead, now, id)
  redis.call('HSET', delivery, 'error', problem)
  redis.call('EXPIRE', delivery, dead_ttl)
end

local function choose(due_prefix, rooms, now)
  local chosen = {}
  for receiver, room in pairs(rooms) do
    if room > 0 then
      local due = redis.call('ZRANGEBYSCORE', due_prefix .. receiver, '-inf', now, 'WITHSCORES', 'LIMIT', 0, room)
      for at = 1, #due, 2 do
        local place = (at - 1) / 2 - room
        chosen[#chosen + 1] = {receiver = receiver, id = due[at], place = place, since = tonumber(due[at + 1])}
      end
    end
  end
  table.sort(chosen, function(a, b)
    if a.place ~= b.place then return a.place < b.place end
    return a.since < b.since
  end)
  return chosen
end

local function claim(receivers, due_prefix, prefix, rooms, max, lease, now)
  local claimed, touched = {}, {}
  for _, one in ipairs(choose(due_prefix, rooms, now)) do
    if #claimed >= max then break end
    local due, delivery = due_prefix .. one.receiver, prefix .. one.id
    local event, own_lease = unpack(redis.call('HMGET', delivery, 'event', 'lease_seconds'))
    touched[one.receiver] = true
    if event then
      redis.call('ZADD', due, now + (tonumber(own_lease) or lease), one.id)
      claimed[#claimed + 1] = {one.receiver, one.id, event, redis.call('HINCRBY', delivery, 'attempts', 1)}
    else
      redis.call('ZREM', due, one.id)
    end
  end
  for receiver in pairs(touched) do note_next(receivers, due_prefix .. receiver, receiver) end
  return claimed
end
"""

_SETTLE = Script(
    LEDGER_SCRIPT
    + """
local delivery, receivers, due, dead = unpack(KEYS)
local id, attempt, verdict, delay, problem, dead_ttl, receiver = unpack(ARGV)
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
if verdict == 'delivered' then  -- that holds, even if another attempt is under way by now, or was the last
  redis.call('ZREM', due, id)
  redis.call('ZREM', dead, id)
  redis.call('DEL', delivery)
elseif redis.call('HGET', delivery, 'attempts') ~= attempt then
  return
elseif verdict == 'retry' then
  redis.call('HSET', delivery, 'error', problem)
  redis.call('ZADD', due, now + tonumber(delay), id)
else
  give_up(id, delivery, due, dead, now, dead_ttl, problem)
end
note_next(receivers, due, receiver)
"""
)

_REVIVE = Script("""
local delivery, receivers, dead = unpack(KEYS)
local id, due_prefix = unpack(ARGV)
if redis.call('ZREM', dead, id) == 0 then return 0 end
local receiver = redis.call('HGET', delivery, 'endpoint')
if not receiver then return 0 end
redis.call('HSET', delivery, 'attempts', 0)
redis.call('PERSIST', delivery)
local clock = redis.call('TIME')
redis.call('ZADD', due_prefix .. receiver, clock[1], id)
redis.call('ZADD', receivers, 'LT', clock[1], receiver)
return 1
""")
