"""A batch as its carrier holds it: a lease, which its pool renews, and a fence, which every write checks."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import uuid4

from producer.async_transport import AsyncTransport
from producer.gateway.batches.batch_keys import answered_key
from producer.gateway.batches.batch_record import BatchProblem, BatchRecord, BatchStatus, BatchUsage
from producer.gateway.batches.batch_scripts import BEGIN, CLAIM, FINALIZE, FINISH, RECORD, RELEASE, RENEW, WAIT
from producer.gateway.files.file_records import FileRecord, Part
from producer.gateway.webhooks.outbox import OUTBOX_KEY, Event
from producer.operations import Script, send


class Order(StrEnum):
    """What a carrier is to do with its batch, as of the last renewal of its lease."""

    GO_ON = "go_on"
    CANCEL = "cancel"
    EXPIRE = "expire"
    LOST = "lost"  # another carrier has the batch
    STOP = "stop"  # this process is ending: release the batch to another carrier


class LeaseLostError(Exception):
    """Another carrier has the batch: nothing that this one writes counts any more."""


class AnswersLostError(Exception):
    """Redis has lost answers that it had acknowledged, as in a fail-over. What is still recorded says where to
    continue."""


@dataclass(frozen=True, slots=True)
class NewPart:
    """Bytes for one of a batch's files, written and reserved. `file` is created if the batch has no such file yet."""

    field: str  # output_file_id or error_file_id
    file: FileRecord
    part: Part


class BatchLease:
    """Every method that writes raises LeaseLostError, or RedisUnavailableError after a few tries."""

    def __init__(self, redis: AsyncTransport, record: BatchRecord, fence: str) -> None:
        self._redis = redis
        self._fence = fence
        self.record = record
        self.order = Order.GO_ON

    @classmethod
    async def claim(cls, redis: AsyncTransport, lease_seconds: float) -> "BatchLease | None":
        """Claim a batch that has no carrier, and read the order for it. None: there is no such batch."""
        fence = uuid4().hex
        claimed = await redis.run(CLAIM.run([], [lease_seconds, fence]))
        if not claimed:
            return None
        batch_id, flat = claimed
        values = dict(zip(flat[::2], flat[1::2], strict=True))
        lease = cls(redis, BatchRecord.parse(batch_id.decode(), values), fence)
        await cls.renew(redis, [lease], lease_seconds)
        return lease

    @staticmethod
    async def renew(redis: AsyncTransport, leases: Sequence["BatchLease"], lease_seconds: float) -> None:
        """Renew all leases in one call; each is given its order."""
        pairs = [part for lease in leases for part in (lease.record.id, lease._fence)]
        orders = await redis.run(RENEW.run([], [lease_seconds, *pairs]))
        for lease, order in zip(leases, orders, strict=True):
            lease.give(Order(order.decode()))

    def give(self, order: Order) -> None:
        """STOP and LOST are final."""
        if self.order not in (Order.STOP, Order.LOST):
            self.order = order

    async def release(self, after_seconds: float = 0.0) -> None:
        """Another carrier may claim the batch after this time."""
        await self._redis.run(RELEASE.run([], [self.record.id, self._fence, after_seconds]))

    async def begin(self, *, model: str, queue: str, num_lines: int) -> BatchStatus:
        """Note that the input is valid."""
        status = BatchStatus(await self._call(BEGIN, model, queue, num_lines))
        fields = {"model": model, "queue": queue, "num_lines": num_lines, "status": status}
        self.record = self.record.model_copy(update=fields)
        return status

    async def note_unreadable(self) -> int:
        """Note that the input cannot be read. Returns for how many seconds this has been so."""
        return int(await self._call(WAIT, "unreadable_since"))

    async def note_unwritable(self) -> None:
        """Note that answers cannot be written. The batch shows this until some are."""
        await self._call(WAIT, "unwritable_since")

    async def note_unserved(self, model: str) -> int:
        """Note that no live worker serves the input's model. Returns for how many seconds this has been so."""
        return int(await self._call(WAIT, "unserved_since", "awaited_model", model))

    async def read_answered(self) -> "AnsweredLines":
        [bits] = await self._redis.run(send(("GET", answered_key(self.record.id))))
        return AnsweredLines(bytearray(bits or b""))

    async def add_answers(
        self, parts: Sequence[NewPart], positions: Sequence[int], *, num_failed: int, usage: BatchUsage
    ) -> bool:
        """Append the parts to the files and mark their lines as answered, in one step. False: a part came too late and
        is being deleted; write it again under another name. Raises AnswersLostError."""
        tokens = [usage.input_tokens, usage.cached_tokens, usage.output_tokens, usage.reasoning_tokens]
        arguments: list[Any] = [len(positions) - num_failed, num_failed, *tokens, len(parts)]
        for new in parts:
            fields = new.file.fields
            arguments += [new.field, new.file.id, new.part.name, new.part.num_bytes, len(fields), *fields]
        return await self._call(RECORD, *arguments, *positions) == "recorded"

    async def finalize(self, num_lines: int) -> BatchStatus:
        """Note that every line is answered. Returns `cancelling` if a cancel came first. Raises AnswersLostError."""
        return BatchStatus(await self._call(FINALIZE, num_lines))

    async def finish(
        self, status: BatchStatus, problems: Sequence[BatchProblem] = (), *, num_lines: int | None = None
    ) -> None:
        """End the batch and its files, and queue its webhook event. `num_lines`: how many lines must have an answer;
        raises AnswersLostError if one has none."""
        event = Event.of(
            f"batch.{status.value}",  # type: ignore[arg-type]
            self.record.id,
            key_id=self.record.key_id,
            created_at=int(time.time()),
        )
        listed = json.dumps([problem.model_dump() for problem in problems]) if problems else ""
        expected = "" if num_lines is None else num_lines
        await self._call(FINISH, status.value, listed, expected, OUTBOX_KEY, event.to_wire())

    async def _call(self, script: Script, *arguments: Any) -> str:
        reply = await self._redis.run(script.run([], [self.record.id, self._fence, *arguments]))
        word = str(reply.decode())
        if word == "lost":
            self.give(Order.LOST)
            raise LeaseLostError(self.record.id)
        if word == "unanswered":
            raise AnswersLostError(self.record.id)
        return word


class AnsweredLines:
    """Which lines are answered: one bit per position, as in Redis."""

    def __init__(self, bits: bytearray) -> None:
        self._bits = bits

    def __contains__(self, position: int) -> bool:
        byte = position // 8
        return byte < len(self._bits) and bool(self._bits[byte] & (0x80 >> position % 8))

    def add(self, positions: Sequence[int]) -> None:
        for position in positions:
            byte = position // 8
            self._bits.extend(b"\0" * (byte + 1 - len(self._bits)))
            self._bits[byte] |= 0x80 >> position % 8
