"""Creates, reads, lists and cancels batches, for the routes. Carriers run them."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from producer.async_transport import AsyncTransport
from producer.gateway.batches.batch_keys import (
    ENDED_KEY,
    ID_PREFIX,
    OPEN_KEY,
    RECORD_TTL_SECONDS,
    WINDOW_SECONDS,
    asked_key,
    batch_key,
    hash_json,
    index_key,
)
from producer.gateway.batches.batch_record import BatchRecord, BatchStatus
from producer.gateway.batches.batch_scripts import CANCEL, CREATE
from producer.gateway.files.file_keys import EVERYBODYS, NOBODYS, created_at, make_id
from producer.operations import send

PAGE_AT_ONCE = 200  # records read in one round trip
UNCARRIED_SECONDS = 10  # before a batch is shown as one without a carrier: carriers look every second


@dataclass(frozen=True, slots=True)
class BatchPage:
    records: list[BatchRecord]
    has_more: bool


class KeyConflictError(Exception):
    """The idempotency key was used for another batch."""


class BatchRecords:
    """Every method raises RedisUnavailableError where Redis cannot be reached, after a few tries."""

    def __init__(self, redis: AsyncTransport) -> None:
        self._redis = redis

    async def create(
        self, *, key_id: str | None, idempotency_key: str | None = None, **fields: Any
    ) -> BatchRecord | None:
        """`fields`: those of a `BatchRecord` that the request gives. None: the input file does not exist (any more).

        With an idempotency key: the batch that this API key has already created with it, as it is now. Raises
        KeyConflictError.
        """
        [(seconds, microseconds)] = await self._redis.run(send(("TIME",)))
        batch_id = make_id(ID_PREFIX, int(seconds), int(microseconds))
        now = created_at(batch_id)
        record = BatchRecord(
            id=batch_id,
            key_id=key_id,
            created_at=now,
            expires_at=now + WINDOW_SECONDS,
            status=BatchStatus.VALIDATING,
            **fields,
        )
        oldest = make_id(ID_PREFIX, int(seconds) - 2 * RECORD_TTL_SECONDS, 0)  # long ended, and forgotten
        whose = key_id or NOBODYS
        name = asked_key(whose, idempotency_key) if idempotency_key is not None else ""
        arguments = [record.id, record.input_file_id, whose, EVERYBODYS, oldest, name, hash_json(fields)]
        made = await self._redis.run(CREATE.run([], [*arguments, *record.new_fields]))
        if made == b"conflict":
            raise KeyConflictError
        if made is None:
            return None
        return record if made.decode() == record.id else await self.get(made.decode())

    async def get(self, batch_id: str) -> BatchRecord | None:
        [record] = await self._read([batch_id])
        return record

    async def cancel(self, batch_id: str) -> BatchStatus:
        """Ask its carrier to end it; one that has ended, or is about to, stays as it is. Returns its status now."""
        status = await self._redis.run(CANCEL.run([], [batch_id]))
        return BatchStatus(status.decode())

    async def page(self, *, whose: str, after: str | None, limit: int) -> BatchPage:
        """The newest first. `whose`: a key's id, EVERYBODYS or NOBODYS. `after`: an id, perhaps forgotten."""
        found: list[BatchRecord] = []
        index, behind = index_key(whose), f"({after}" if after is not None else "+"
        while len(found) <= limit:
            command = ("ZREVRANGEBYLEX", index, behind, "-", "LIMIT", 0, PAGE_AT_ONCE)
            ids = [value.decode() for value in (await self._redis.run(send(command)))[0]]
            records = await self._read(ids)
            forgotten = [batch_id for batch_id, record in zip(ids, records, strict=True) if record is None]
            if forgotten:
                await self._redis.run(send(("ZREM", index, *forgotten)))
            found += [record for record in records if record is not None]
            if len(ids) < PAGE_AT_ONCE:
                break
            behind = f"({ids[-1]}"
        return BatchPage(found[:limit], len(found) > limit)

    async def count_by_status(self) -> dict[str, int]:
        """How many are under way, and how many have ever ended, by status."""
        ids, ended = await self._redis.run(send(("ZRANGE", OPEN_KEY, 0, -1), ("HGETALL", ENDED_KEY)))
        counts = Counter({status.value: 0 for status in BatchStatus})
        counts.update({name.decode(): int(value) for name, value in ended.items()})
        if ids:
            statuses = await self._redis.run(send(*(("HGET", batch_key(name.decode()), "status") for name in ids)))
            counts.update(status.decode() for status in statuses if status is not None)
        return dict(counts)

    async def num_without_carrier(self) -> int:
        [(seconds, _)] = await self._redis.run(send(("TIME",)))
        [num_batches] = await self._redis.run(send(("ZCOUNT", OPEN_KEY, "-inf", int(seconds))))
        return int(num_batches)

    async def _read(self, ids: list[str]) -> list[BatchRecord | None]:
        if not ids:
            return []
        reads = [("HGETALL", batch_key(batch_id)) for batch_id in ids]
        free_from = [("ZSCORE", OPEN_KEY, batch_id) for batch_id in ids]
        (seconds, _), *replies = await self._redis.run(send(("TIME",), *reads, *free_from))
        hashes, scores = replies[: len(ids)], replies[len(ids) :]
        records = (BatchRecord.parse(name, found) if found else None for name, found in zip(ids, hashes, strict=True))
        return [
            record and _note_uncarried(record, score, int(seconds))
            for record, score in zip(records, scores, strict=True)
        ]


def _note_uncarried(record: BatchRecord, free_from: bytes | None, now: int) -> BatchRecord:
    """`free_from`: when its last lease ends; 0 where there was none, None where the batch has ended. By Redis'
    clock."""
    if free_from is None:
        return record
    since = max(record.created_at, int(float(free_from)))
    return record.model_copy(update={"uncarried_since": since}) if now - since >= UNCARRIED_SECONDS else record
