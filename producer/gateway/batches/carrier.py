"""Runs one batch from where it stands to its end. If it dies, another carrier continues from what is recorded.

It holds in memory an index of the input's lines, and the batch's jobs that are on the queue.
"""

import asyncio
import logging
import tempfile
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import BinaryIO

from producer.async_transport import AsyncTransport
from producer.batch.line_index import IndexedLines, LineIndex
from producer.batch.protocol import BatchOptions, BatchProtocol, QueueLimit
from producer.contract import JobRequest, keys
from producer.errors import FileStoreError, InvalidJobError
from producer.gateway.api_keys import read_key
from producer.gateway.batches.answer_file import AnswerFile
from producer.gateway.batches.batch_lease import AnsweredLines, BatchLease, LeaseLostError, Order
from producer.gateway.batches.batch_record import BatchProblem, BatchRecord, BatchStatus
from producer.gateway.batches.input_check import (
    EndOfCheckError,
    InputCheck,
    choose_batch_queue,
    model_problem,
)
from producer.gateway.batches.leftovers import Leftovers
from producer.gateway.files.base import FileStore
from producer.gateway.files.file_records import FileRecords
from producer.operations import Protocol
from producer.workers import max_request_bytes, read_workers, was_served

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CarrierOptions:
    default_queue: str
    max_in_flight: int
    max_queue_depth: int
    max_line_bytes: int
    retry_seconds: float = 15.0  # before an input that cannot be read is read again, or its model looked for
    unreadable_seconds: float = 600.0  # until a batch fails whose input cannot be read
    unserved_seconds: float = 600.0  # until one fails whose model no worker serves any more: one may be restarting


class Carrier:
    """Raises LeaseLostError, AnswersLostError, RedisUnavailableError, FileStoreError; then another carrier has the
    batch, or will."""

    def __init__(
        self,
        lease: BatchLease,
        *,
        redis: AsyncTransport,
        files: FileRecords,
        store: FileStore,
        options: CarrierOptions,
    ) -> None:
        self._lease = lease
        self._redis = redis
        self._files = files
        self._store = store
        self._options = options

    async def carry(self) -> None:
        """Run the batch until it has ended or is released to another carrier."""
        record = self._lease.record
        _log.info("action=batch_carried batch=%s status=%s", record.id, record.status)
        if record.status is BatchStatus.FINALIZING:
            await self._finish(BatchStatus.COMPLETED, num_lines=record.num_lines)
        elif self._lease.order in (Order.CANCEL, Order.EXPIRE) and not self._has_begun:
            await self._finish_early()
        else:
            await self._carry_lines()

    async def _carry_lines(self) -> None:
        record = self._lease.record
        awaited = None if self._has_begun else record.awaited_model
        if awaited is not None and await self._find_queue(awaited) is None:  # else the whole input would be read first
            return
        with tempfile.TemporaryFile(prefix="promptmill-batch-") as file:
            index = LineIndex(file, self._options.max_line_bytes)
            check = InputCheck(record, lambda: self._lease.order is not Order.GO_ON and not self._has_begun)
            try:
                await asyncio.to_thread(self._read_input, await self._parts(), file, index, check)
            except FileStoreError as error:
                await self._give_up_later(error)
                return
            if self._lease.order is Order.STOP:
                await self._lease.release()
            elif await self._begin(check, len(index)):
                await self._answer(index)

    @property
    def _has_begun(self) -> bool:
        """Whether the input is known to be valid."""
        return self._lease.record.model is not None

    async def _parts(self) -> list[str]:
        return [part.name for part in await self._files.parts(self._lease.record.input_file_id)]

    def _read_input(self, parts: list[str], file: BinaryIO, index: LineIndex, check: InputCheck) -> None:
        """Copy the input to a file here: its lines are read in any order, which can be slow in a store."""
        if not parts:
            raise FileStoreError("nothing is left of the input file")
        for part in parts:
            for chunk in self._store.read(part):
                file.write(chunk)
        file.seek(0)
        try:
            index.scan(None if self._has_begun else check.see)
        except EndOfCheckError:
            return

    async def _begin(self, check: InputCheck, num_lines: int) -> bool:
        """Whether the batch's lines are to be answered now. False: it has ended, or waits."""
        record = self._lease.record
        if self._has_begun:
            if record.unreadable_since is not None:  # that is over: the next outage counts from its own beginning
                await self._lease.begin(model=record.model or "", queue=record.queue or "", num_lines=num_lines)
            return True
        if self._lease.order in (Order.CANCEL, Order.EXPIRE):
            await self._finish_early()
            return False
        if check.problems:
            await self._finish(BatchStatus.FAILED, check.problems)
            return False
        if check.was_broken_off:  # for an order that is void: a fail-over may lose a cancel, or give a lease back
            await self._lease.release()
            return False
        assert check.model is not None
        queue = await self._find_queue(check.model)
        if queue is None:
            return False
        await self._lease.begin(model=check.model, queue=queue, num_lines=num_lines)
        return True

    async def _find_queue(self, model: str) -> str | None:
        """None: the batch has failed, or waits for a worker that serves the model."""
        record = self._lease.record
        if record.key_id is not None and (problem := await self._key_problem(record.key_id, model)) is not None:
            await self._finish(BatchStatus.FAILED, [problem])
            return None
        workers = await self._redis.run(read_workers())
        queue = choose_batch_queue(workers, model, self._options.default_queue, record.tenant)
        if queue is not None:
            return queue
        problem = model_problem(model, workers)
        may_come_back = await self._redis.run(was_served(model))
        if not may_come_back or await self._lease.note_unserved(model) >= self._options.unserved_seconds:
            await self._finish(BatchStatus.FAILED, [problem])
        else:
            _log.info("action=batch_waits batch=%s reason=%s", record.id, problem.message)
            await self._lease.release(self._options.retry_seconds)
        return None

    async def _key_problem(self, key_id: str, model: str) -> BatchProblem | None:
        key = await self._redis.run(read_key(key_id))
        if key is None:
            return BatchProblem(code="invalid_api_key", message="the batch's API key was revoked")
        if key.allows(model):
            return None
        rule = f"body.model: the API key may not use {model!r}"
        return BatchProblem(code="model_not_allowed", message=rule, param="body.model")

    async def _answer(self, index: LineIndex) -> None:
        """Answer every line, or as many as there is time for."""
        answers = AnswerFile(self._lease, self._files, self._store, index)
        if self._lease.order is Order.GO_ON:
            await self._run_lines(index, await self._lease.read_answered(), answers)
            if self._lease.order not in (Order.CANCEL, Order.EXPIRE):  # their jobs end first, with a store or without
                await answers.flush()
        order = self._lease.order  # read once: while the rest is settled it may change to STOP
        if order is Order.LOST:  # the jobs are another carrier's
            raise LeaseLostError(self._lease.record.id)
        if order is Order.STOP:
            await self._lease.release()
        elif order is Order.GO_ON and await self._lease.finalize(len(index)) is BatchStatus.FINALIZING:
            await self._finish(BatchStatus.COMPLETED, num_lines=len(index))
        else:
            status = _early_end(order)
            await self._settle_the_rest(index, answers, status)
            await self._finish(status, num_lines=len(index))

    async def _run_lines(self, index: LineIndex, answered: AnsweredLines, answers: AnswerFile) -> None:
        record = self._lease.record
        queue = record.queue or ""
        workers = await self._redis.run(read_workers())
        options = BatchOptions(
            max_in_flight=self._options.max_in_flight,
            runs_failed_anew=False,
            queue_limit=QueueLimit(queue, self._options.max_queue_depth),
            max_request_bytes=max_request_bytes(workers, record.model or ""),
        )
        unanswered = (number for number in index.numbers() if index.position(number) not in answered)
        lines = IndexedLines(index, index.entries(unanswered))
        protocol = BatchProtocol(lines, self._queue_for, batch_id=record.id, options=options)
        async with aclosing(self._redis.iterate(protocol.run())) as rounds:
            async for some in rounds:
                await answers.add(some)
                if self._lease.order is not Order.GO_ON:
                    return

    def _queue_for(self, request: JobRequest) -> Protocol[str]:
        """The batch's own queue, whichever workers are alive. Raises InvalidJobError."""
        queue = self._lease.record.queue or ""
        if request.tenant not in (None, keys.split_tenant(queue)[1]):
            raise InvalidJobError(f"tenant: the batch is not {request.tenant!r}'s; leave it out", param="tenant")
        return queue
        yield  # a protocol without operations

    async def _settle_the_rest(self, index: LineIndex, answers: AnswerFile, status: BatchStatus) -> None:
        """The lines without an answer get the error that says why there is none."""
        is_cancelled = status is BatchStatus.CANCELLED
        code = "batch_cancelled" if is_cancelled else "batch_expired"
        message = "the batch was cancelled" if is_cancelled else "the batch's completion window ended"
        answered = await self._lease.read_answered()
        answered.add(answers.unrecorded)
        unanswered: Iterator[int] = (number for number in index.numbers() if index.position(number) not in answered)
        leftovers = Leftovers(self._lease.record.id, code, f"{message} before this request was answered")
        async with aclosing(self._redis.iterate(leftovers.settle(index.entries(unanswered)))) as rounds:
            async for some in rounds:
                await answers.add(some)
        await answers.flush()

    async def _finish_early(self) -> None:
        await self._finish(_early_end(self._lease.order))

    async def _give_up_later(self, error: FileStoreError) -> None:
        """The store may come back: the batch is released for a later try, and ended only after a time limit."""
        record = self._lease.record
        _log.warning("action=batch_input_unreadable batch=%s error=%s", record.id, error)
        problems = [_unreadable(record)]
        ends_early = self._lease.order in (Order.CANCEL, Order.EXPIRE)
        needs_lines = self._has_begun or not ends_early  # only the lines say which jobs must be ended
        if needs_lines and await self._lease.note_unreadable() < self._options.unreadable_seconds:
            await self._lease.release(self._options.retry_seconds)
        else:
            await self._finish(_early_end(self._lease.order) if ends_early else BatchStatus.FAILED, problems)

    async def _finish(
        self, status: BatchStatus, problems: list[BatchProblem] | None = None, *, num_lines: int | None = None
    ) -> None:
        await self._lease.finish(status, problems or [], num_lines=num_lines)
        _log.info("action=batch_ended batch=%s status=%s", self._lease.record.id, status)


def _early_end(order: Order) -> BatchStatus:
    return BatchStatus.EXPIRED if order is Order.EXPIRE else BatchStatus.CANCELLED


def _unreadable(record: BatchRecord) -> BatchProblem:
    """Says what the batch's owner can do. Where the file was stored is in the log, for operators."""
    num_answered = record.num_completed + record.num_failed
    message = (
        f"the input file cannot be read any more: upload it again, and make a batch of it ({record.input_file_id})"
    )
    if record.model is not None:
        message = (
            f"the input file ({record.input_file_id}) cannot be read any more, and {num_answered} of its "
            f"{record.num_lines} requests were answered before: make a batch of the others"
        )
    return BatchProblem(code="input_file_unreadable", message=message, param="input_file_id")
