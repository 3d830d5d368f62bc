"""A batch's answers on their way into its output and error file: gathered, written as parts, recorded.

A part is written first and recorded after, together with what it answers, so that nothing is ever answered twice and
what a dying process had written is never seen. The longer a batch runs, the more time passes between two parts: a day's
batch has a few thousand.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import uuid4

from producer.batch.line_index import LineIndex
from producer.batch.lines import encode_line
from producer.batch.protocol import Answer
from producer.errors import FileStoreError
from producer.gateway.batches.batch_lease import BatchLease, LeaseLostError, NewPart, Order
from producer.gateway.batches.batch_record import BatchUsage
from producer.gateway.files.base import FileStore
from producer.gateway.files.file_records import FileRecord, FileRecords, Part

MIN_SECONDS_A_PART = 1.0
MAX_SECONDS_A_PART = 30.0
SHARE_OF_AGE = 0.02  # of the time since the batch began to be answered
MAX_BYTES_A_PART = 4 << 20  # gathered in memory
STORE_AWAY_SECONDS = 2.0

_FILES = {"output_file_id": "output", "error_file_id": "error"}

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Gathered:
    data: dict[str, bytearray] = field(default_factory=dict)  # by field of the batch's record
    positions: list[int] = field(default_factory=list)
    num_failed: int = 0
    usage: BatchUsage = field(default_factory=BatchUsage)

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.data.values()))


class AnswerFile:
    """Methods that write raise LeaseLostError and RedisUnavailableError."""

    def __init__(self, lease: BatchLease, files: FileRecords, store: FileStore, index: LineIndex) -> None:
        self._lease = lease
        self._files = files
        self._store = store
        self._index = index
        self._began_at = float(lease.record.in_progress_at or time.time())
        self._file_ids: dict[str, str] = {}
        self._gathered = _Gathered()
        self._last_part_at = time.monotonic()
        self._is_store_away = False

    @property
    def unrecorded(self) -> list[int]:
        """Positions of the lines whose answers are gathered, and not written yet."""
        return list(self._gathered.positions)

    async def add(self, answers: Sequence[Answer]) -> None:
        """Gather answers, and write a part when it is due. Waits for an unavailable store, unless the batch is to end
        early: its jobs must end first."""
        gathered = self._gathered
        for answer in answers:
            name = "error_file_id" if answer.is_failed else "output_file_id"
            gathered.data.setdefault(name, bytearray()).extend(encode_line(answer.line))
            gathered.positions.append(self._index.position(answer.number))
            gathered.num_failed += answer.is_failed
            usage = answer.usage
            gathered.usage = BatchUsage(
                input_tokens=gathered.usage.input_tokens + usage.prompt_tokens,
                cached_tokens=gathered.usage.cached_tokens + usage.cached_tokens,
                output_tokens=gathered.usage.output_tokens + usage.completion_tokens,
                reasoning_tokens=gathered.usage.reasoning_tokens + usage.reasoning_tokens,
            )
        is_large = gathered.num_bytes >= MAX_BYTES_A_PART and not self._is_store_away
        if is_large or time.monotonic() - self._last_part_at >= self._seconds_a_part():
            await self._write_out(waits_for_store=False)

    async def flush(self) -> None:
        """Record all that was gathered. Waits for an unavailable store as long as the lease is ours and the process
        does not stop."""
        await self._write_out(waits_for_store=True)

    async def _write_out(self, *, waits_for_store: bool) -> None:
        """`waits_for_store`: even if the batch is to end early."""
        if not self._gathered.positions:
            return
        while not await self._try_to_write():
            if self._lease.order in (Order.LOST, Order.STOP):
                raise LeaseLostError(self._lease.record.id)
            if not waits_for_store and self._lease.order is not Order.GO_ON:
                self._last_part_at = time.monotonic()
                return
            await asyncio.sleep(STORE_AWAY_SECONDS)
        self._gathered = _Gathered()
        self._last_part_at = time.monotonic()

    async def _try_to_write(self) -> bool:
        gathered = self._gathered
        try:
            parts = [await self._write(name, bytes(data)) for name, data in gathered.data.items()]
        except FileStoreError as error:
            _log.warning("action=batch_part_failed batch=%s error=%s", self._lease.record.id, error)
            self._is_store_away = True
            await self._lease.note_unwritable()
            return False
        self._is_store_away = False
        return await self._lease.add_answers(
            parts, gathered.positions, num_failed=gathered.num_failed, usage=gathered.usage
        )

    async def _write(self, name: str, data: bytes) -> NewPart:
        record = self._lease.record
        part = f"{record.id}-{uuid4().hex}"
        await self._files.reserve(part)
        await asyncio.to_thread(self._write_part, part, data)
        if name not in self._file_ids:
            self._file_ids[name] = await self._files.new_id()
        file = FileRecord(
            id=self._file_ids[name],
            filename=f"{record.id}_{_FILES[name]}.jsonl",
            purpose="batch_output",
            key_id=record.key_id,
            status="uploaded",
        )
        return NewPart(name, file, Part(part, len(data)))

    def _write_part(self, part: str, data: bytes) -> None:
        with self._store.writer(part) as writer:
            writer.write(data)

    def _seconds_a_part(self) -> float:
        return min(MAX_SECONDS_A_PART, max(MIN_SECONDS_A_PART, SHARE_OF_AGE * (time.time() - self._began_at)))
