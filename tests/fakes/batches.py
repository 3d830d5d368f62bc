"""Batches on a real Redis, carried in the test's own event loop: with crashes wherever a test wants them."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import openai
import redis

from producer.async_transport import AsyncTransport
from producer.gateway.batches.batch_lease import BatchLease
from producer.gateway.batches.batch_record import BatchRecord
from producer.gateway.batches.batch_records import BatchRecords
from producer.gateway.batches.carrier import Carrier, CarrierOptions
from producer.gateway.files.base import FileStore
from producer.gateway.files.file_records import FileRecord, FileRecords, Part
from producer.gateway.files.local import LocalFileStore
from producer.gateway.webhooks.outbox import OUTBOX_KEY

LEASE_SECONDS = 15.0
URL: Final = "/v1/completions"


def line(custom_id: str, prompt: str = "one two", **changes: Any) -> dict[str, Any]:
    body = {"model": "fake", "prompt": prompt, **changes.pop("body", {})}
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": body, **changes}


def jsonl(lines: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in lines)


@dataclass
class BatchBench:
    """The gateway's parts that batches need, without a gateway."""

    redis: AsyncTransport
    store: FileStore
    files: FileRecords
    records: BatchRecords
    options: CarrierOptions

    async def put_file(self, data: bytes, *, key_id: str | None = None) -> str:
        part = f"upload-{uuid4().hex}"
        await self.files.reserve(part)
        with self.store.writer(part) as writer:
            writer.write(data)
        file_id = await self.files.new_id()
        record = FileRecord(id=file_id, filename="in.jsonl", purpose="batch", key_id=key_id)
        assert await self.files.create(record, [Part(part, len(data))])
        return file_id

    async def read_lines(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        parts = await self.files.parts(file_id)
        return [json.loads(text) for part in parts for text in b"".join(self.store.read(part.name)).splitlines()]

    async def answers(self, record: BatchRecord) -> dict[str, dict[str, Any]]:
        """Both files' lines by custom_id; each is there once."""
        lines = await self.read_lines(record.output_file_id) + await self.read_lines(record.error_file_id)
        by_id = {entry["custom_id"]: entry for entry in lines}
        assert len(by_id) == len(lines)
        return by_id

    async def create(self, lines: Iterable[Any] | bytes, **fields: Any) -> BatchRecord:
        data = lines if isinstance(lines, bytes) else jsonl(lines)
        key_id = fields.pop("key_id", None)
        given = {"tenant": None, "endpoint": URL, "metadata": None, "output_expires_after": None, **fields}
        given.setdefault("input_file_id", await self.put_file(data, key_id=key_id))
        record = await self.records.create(key_id=key_id, **given)
        assert record is not None
        return record

    async def claim(self) -> BatchLease | None:
        return await BatchLease.claim(self.redis, LEASE_SECONDS)

    def carrier(self, lease: BatchLease) -> Carrier:
        return Carrier(lease, redis=self.redis, files=self.files, store=self.store, options=self.options)

    async def start_carrying(self) -> tuple[BatchLease, "asyncio.Task[None]"]:
        """The next batch that nobody carries: its lease, and who carries it to its end."""
        lease = await self.claim()
        assert lease is not None
        return lease, asyncio.create_task(self.carrier(lease).carry())

    async def carry(self) -> None:
        """The same, to its end."""
        _, carrying = await self.start_carrying()
        await carrying

    async def get(self, batch_id: str) -> BatchRecord:
        record = await self.records.get(batch_id)
        assert record is not None
        return record

    async def when_completed(self, created: BatchRecord, num_lines: int) -> BatchRecord | None:
        """The batch, if so many of its lines are completed: for `eventually`."""
        record = await self.get(created.id)
        return record if record.num_completed == num_lines else None


@asynccontextmanager
async def batch_bench(redis_url: str, folder: Path, **options: Any) -> AsyncIterator[BatchBench]:
    store = LocalFileStore(folder)
    store.check()
    transport = AsyncTransport(redis_url)
    given: dict[str, Any] = {
        "default_queue": "promptmill",
        "max_in_flight": 100,
        "max_queue_depth": 1000,
        "max_line_bytes": 100_000,
    }
    bench = BatchBench(
        transport, store, FileRecords(transport, store), BatchRecords(transport), CarrierOptions(**given | options)
    )
    try:
        yield bench
    finally:
        await transport.aclose()


def events_owed(redis_client: redis.Redis) -> list[tuple[str, str]]:
    """Type and object of what receivers are to be told."""
    found = [json.loads(entry) for entry in redis_client.lrange(OUTBOX_KEY, 0, -1)]
    return [(event["type"], event["object_id"]) for event in found]


def counts_of(client: openai.OpenAI, batch_id: str) -> tuple[int, int]:
    """A batch's lines that were completed, and that failed."""
    counts = client.batches.retrieve(batch_id).request_counts
    assert counts is not None
    return counts.completed, counts.failed
