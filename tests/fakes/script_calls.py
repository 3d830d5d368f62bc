"""Calls of the worker's scripts as a worker makes them."""

import time
from collections.abc import Sequence
from typing import Any

import redis

from producer.contract import keys
from tests.fakes.redis_reads import sorted_set_names
from worker.claim import Claim
from worker.scripts import Scripts

QUEUE = keys.DEFAULT_QUEUE
LEASE_SECONDS = 30.0


def claim(
    client: redis.Redis, scripts: Scripts, max_jobs: int = 100, *, request_id: str = "request", **options: Any
) -> list[Claim]:
    arguments: dict[str, Any] = {"worker": "w", "queues": [QUEUE], "lease_seconds": LEASE_SECONDS, **options}
    reply = scripts.claim(client, request_id=request_id, max_jobs=max_jobs, **arguments)
    assert reply is not None
    return [Claim.parse(entry, time.time()) for entry in reply[0]]


def beat(
    client: redis.Redis,
    scripts: Scripts,
    *claims: Claim,
    models: Sequence[str] = ("m",),
    is_committing: bool = False,
    was_away: bool = False,
) -> list[bytes]:
    flat = [part for held in claims for part in (held.queue, held.job_id, held.fence, "1" if is_committing else "0")]
    entry: dict[str, Any] = {"worker": "w", "entry_seconds": 15, "models": models, "was_away": was_away}
    return list(scripts.beat(client, **entry, lease_seconds=LEASE_SECONDS, jobs=flat))


def sweep(client: redis.Redis, scripts: Scripts) -> tuple[list[str], list[Claim]]:
    given, orphans = scripts.sweep(client, queue=QUEUE, lease_seconds=LEASE_SECONDS, max_jobs=100, execution_id="s")
    return [job_id.decode() for job_id in given], [Claim.parse(orphan, time.time()) for orphan in orphans]


def end_leases(client: redis.Redis) -> None:
    for job_id in sorted_set_names(client, keys.leases_key(QUEUE)):
        client.zadd(keys.leases_key(QUEUE), {job_id: 1})
