"""Waits for many jobs of one event loop at once: one subscription receives each results line once, not once per waiting
job.

Knows who waits for which job. How results are found is in `producer.results`.
"""

import asyncio

from producer.async_transport import AsyncTransport
from producer.contract import Result
from producer.end_tasks import end_tasks
from producer.errors import ClientClosedError, PromptmillError, ResultTimeoutError
from producer.outcome import Outcome
from producer.results import ResultCollector, result_of, wait_for_result

LINGER_SECONDS = 2.0  # that a subscription outlives its last job: often another job is waited for next


class ResultWaiter:
    """Belongs to one event loop, like its transport."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._queues: dict[str, _QueueWaiter] = {}

    async def wait(self, job_id: str, queue: str, timeout: float | None) -> Result:
        """The result of one job. `timeout`: seconds. Raises as `wait_for_result` does."""
        try:
            async with asyncio.timeout(timeout):
                return result_of(job_id, await self._outcome(job_id, queue))
        except TimeoutError:
            message = f"job {job_id} has not ended within {timeout:g} s; ask again, or cancel"
            raise ResultTimeoutError(message) from None

    async def aclose(self) -> None:
        """End the waiters' tasks. The transport is closed next; those that still wait get its error."""
        await end_tasks(*(waiter.task for waiter in self._queues.values() if waiter.task is not None))
        for waiter in self._queues.values():
            waiter.fail(ClientClosedError())

    async def _outcome(self, job_id: str, queue: str) -> Outcome:
        waiter = self._queues.setdefault(queue, _QueueWaiter(self._transport))
        try:
            if not waiter.is_running:  # mostly the job's stream was read to its end: then nobody has to hear of it
                outcome = await self._peek(job_id, queue)
                if outcome is not None:
                    return outcome
            return await self._hear(waiter, job_id, queue)
        except PromptmillError:  # of Redis, or of some job's result store: each waits for itself, and hears its own
            return await self._transport.run(wait_for_result(job_id, queue, None))

    async def _hear(self, waiter: "_QueueWaiter", job_id: str, queue: str) -> Outcome:
        was_running = waiter.is_running
        future = waiter.add(job_id, queue)
        try:
            # What ended before was announced before: so, once its end would be heard, the job is looked at. One that
            # begins to listen does that itself.
            outcome = await self._peek(job_id, queue) if was_running else None
            return outcome or await future
        finally:
            waiter.discard(job_id, future)

    async def _peek(self, job_id: str, queue: str) -> Outcome | None:
        return await self._transport.run(ResultCollector({job_id: queue}, None).peek())


class _QueueWaiter:
    """The waiters for jobs of one queue. Its task starts with the first job and ends soon after the last job's end."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._collector = ResultCollector({}, None)
        self._waiting: dict[str, set[asyncio.Future[Outcome]]] = {}
        self.task: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        return self.task is not None and not self.task.done()

    def add(self, job_id: str, queue: str) -> "asyncio.Future[Outcome]":
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(job_id, set()).add(future)
        self._collector.add({job_id: queue}, may_have_ended=False)
        if not self.is_running:
            self.task = asyncio.create_task(self._run())
        return future

    def discard(self, job_id: str, future: "asyncio.Future[Outcome]") -> None:
        futures = self._waiting.get(job_id, set())
        futures.discard(future)
        if not futures:
            self._waiting.pop(job_id, None)
            self._collector.discard(job_id)

    def fail(self, error: Exception) -> None:
        """End all waits with this error."""
        waiting, self._waiting = self._waiting, {}
        self._collector = ResultCollector({}, None)
        for future in (future for futures in waiting.values() for future in futures):
            if not future.done():
                future.set_exception(error)

    async def _run(self) -> None:
        try:
            emitted = self._collector.emit_all(linger_seconds=LINGER_SECONDS)
            async for outcome in self._transport.iterate(emitted):
                for future in self._waiting.pop(outcome.job_id, ()):
                    if not future.done():
                        future.set_result(outcome)
        except Exception as error:  # of any type: otherwise the waiters would never return
            self.fail(error)
