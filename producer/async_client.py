"""The asyncio client: submits jobs, follows their streams, waits for their results. One event loop each."""

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Self, Unpack, overload

from producer.async_transport import AsyncTransport
from producer.base_client import BaseClient, Messages, Prompt, Requests, gather_fields, id_and_queue, ids_of
from producer.cancel import cancel
from producer.contract import Result, WorkerInfo
from producer.dead_letters import FailedJob, read_failed, retry
from producer.deliveries import WebhookCounts, count_deliveries
from producer.dependents import DeferredJob, cancel_dependents, read_deferred
from producer.embeddings import Input, cancel_all, is_list_of_inputs, requests_for, wait_for_vectors
from producer.enqueue import PriorityClass
from producer.job import AsyncJob
from producer.outcome import JobStatus, read_status
from producer.queues import QueueStatus, read_queues
from producer.request_fields import RequestFields
from producer.result_waiter import ResultWaiter
from producer.results import as_completed, wait_for_result
from producer.subscription import AsyncSubscription, follow, parse_cursor
from producer.workers import read_workers


class AsyncClient(BaseClient):
    """The names of `Client`, awaited. Use it with `async with`, or await `aclose()`.

    Every method raises RedisUnavailableError where Redis cannot be reached, after a few tries, and ClientClosedError
    once the client was closed.
    """

    def __init__(
        self, redis_url: str | None = None, *, queue: str | None = None, s3_endpoint_url: str | None = None
    ) -> None:
        """What is not given is taken from PROMPTMILL_REDIS_URL, PROMPTMILL_QUEUE and PROMPTMILL_S3_ENDPOINT_URL, else
        from the defaults of `ProducerSettings`. Raises SettingsError."""
        super().__init__(redis_url, queue=queue, s3_endpoint_url=s3_endpoint_url)
        self._transport = AsyncTransport(self.settings.redis_url, self.settings.s3_endpoint_url)
        self._results = ResultWaiter(self._transport)

    async def submit(
        self,
        prompt: Prompt = None,
        /,
        *,
        messages: Messages = None,
        queue: str | None = None,
        priority_class: PriorityClass | None = None,
        job_id: str | None = None,
        depends_on: AsyncJob | str | Iterable[AsyncJob | str] = (),
        durable: bool = False,
        **fields: Unpack[RequestFields],
    ) -> AsyncJob:
        """As `Client.submit`."""
        request = gather_fields(prompt, messages, fields)
        protocol = self._submit_one(
            request,
            queue=queue,
            priority_class=priority_class,
            job_id=job_id,
            depends_on=ids_of(depends_on),
            durable=durable,
        )
        job = await self._transport.run(protocol)
        return AsyncJob(self, job.job_id, job.queue)

    async def submit_many(
        self,
        requests: Requests,
        *,
        queue: str | None = None,
        priority_class: PriorityClass | None = None,
        job_ids: Sequence[str] | None = None,
        durable: bool = False,
    ) -> list[AsyncJob]:
        """As `Client.submit_many`."""
        protocol = self._submit_many(
            requests, queue=queue, priority_class=priority_class, job_ids=job_ids, durable=durable
        )
        jobs = await self._transport.run(protocol)
        return [AsyncJob(self, job.job_id, job.queue) for job in jobs]

    @overload
    async def embed(self, inputs: str | list[int], /, **options: Any) -> list[float]: ...

    @overload
    async def embed(self, inputs: Sequence[Input], /, **options: Any) -> list[list[float]]: ...

    async def embed(
        self,
        inputs: Input | Sequence[Input],
        /,
        *,
        timeout: float | None = None,
        queue: str | None = None,
        priority_class: PriorityClass | None = None,
        **fields: Any,
    ) -> list[float] | list[list[float]]:
        """As `Client.embed`."""
        jobs = await self.submit_many(requests_for(inputs, fields), queue=queue, priority_class=priority_class)
        try:
            vectors = await self._transport.run(wait_for_vectors({job.id: job.queue for job in jobs}, timeout))
        except BaseException:
            await self._transport.run(cancel_all([job.id for job in jobs]))
            raise
        return vectors if is_list_of_inputs(inputs) else vectors[0]

    def job(self, job_id: str) -> AsyncJob:
        """A handle on a job by its id. Whether there is one shows when it is asked for."""
        return AsyncJob(self, job_id)

    def stream(
        self, job: AsyncJob | str, *, timeout: float | None = None, after: str | None = None
    ) -> AsyncSubscription:
        """As `Job.stream`."""
        job_id, _ = id_and_queue(job)
        protocol = follow(job_id, after=parse_cursor(after), timeout=timeout, pace=self._look_pace)
        return AsyncSubscription(self._transport.iterate(protocol), after)

    async def result(self, job: AsyncJob | str, *, timeout: float | None = None) -> Result:
        """As `Job.result`. Any number that wait at once share one subscription."""
        job_id, queue = id_and_queue(job)
        if queue is None:
            return await self._transport.run(wait_for_result(job_id, None, timeout))
        return await self._results.wait(job_id, queue, timeout)

    async def as_completed(self, jobs: Iterable[AsyncJob | str], timeout: float | None = None) -> AsyncIterator[Result]:
        """As `Client.as_completed`."""
        queues = dict(id_and_queue(job) for job in jobs)
        async for result in self._transport.iterate(as_completed(queues, timeout)):
            yield result

    async def cancel(self, job: AsyncJob | str) -> bool:
        """As `Client.cancel`."""
        job_id, _ = id_and_queue(job)
        return await self._transport.run(cancel(job_id))

    async def cancel_dependents(self, job: AsyncJob | str) -> list[str]:
        """As `Client.cancel_dependents`."""
        job_id, _ = id_and_queue(job)
        return await self._transport.run(cancel_dependents(job_id))

    async def retry(self, job: AsyncJob | str) -> bool:
        """As `Client.retry`."""
        job_id, _ = id_and_queue(job)
        return await self._transport.run(retry(job_id))

    async def failed(self, limit: int | None = None) -> list[FailedJob]:
        """As `Client.failed`."""
        return await self._transport.run(read_failed(self.settings.queue, limit))

    async def status(self, job: AsyncJob | str) -> JobStatus:
        """As `Job.status`."""
        job_id, _ = id_and_queue(job)
        return await self._transport.run(read_status(job_id))

    async def workers(self) -> list[WorkerInfo]:
        """As `Client.workers`."""
        return await self._transport.run(read_workers())

    async def queues(self) -> list[QueueStatus]:
        """As `Client.queues`."""
        return await self._transport.run(read_queues(self.settings.queue))

    async def deferred(self, limit: int | None = None) -> list[DeferredJob]:
        """As `Client.deferred`."""
        return await self._transport.run(read_deferred(self.settings.queue, limit))

    async def webhook_counts(self) -> WebhookCounts:
        """As `Client.webhook_counts`."""
        return await self._transport.run(count_deliveries())

    async def aclose(self) -> None:
        """As `Client.close`."""
        await self._results.aclose()
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
