"""What a ledger of webhooks holds, and the passing of time in it."""

from typing import cast

import redis

from producer.deliveries import Ledger
from tests.fakes.redis_reads import sorted_set_names, sorted_set_scores


def owed(client: redis.Redis, ledger: Ledger) -> dict[str, float]:
    """Ids of the deliveries that wait, or are under way, and when each is due."""
    found: dict[str, float] = {}
    for receiver in sorted_set_names(client, ledger.receivers):
        found |= sorted_set_scores(client, ledger.due + receiver)
    return found


def make_due(client: redis.Redis, ledger: Ledger, delivery_id: str, at: float = 0.0) -> None:
    """Of one that is owed: its lease's time, or its delay, has passed."""
    receiver = cast("bytes | None", client.hget(ledger.prefix + delivery_id, "endpoint"))
    if receiver is not None:
        owe(client, ledger, receiver.decode(), delivery_id, at)


def owe(client: redis.Redis, ledger: Ledger, receiver: str, delivery_id: str, at: float = 0.0) -> None:
    client.zadd(ledger.due + receiver, {delivery_id: at})
    client.zadd(ledger.receivers, {receiver: at})
