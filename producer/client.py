"""The blocking client: submits jobs, follows their streams, waits for their results. Threads may share one."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self, Unpack, overload

from producer.base_client import BaseClient, Messages, Prompt, Requests, gather_fields, id_and_queue, ids_of
from producer.cancel import cancel
from producer.contract import Result, WorkerInfo
from producer.dead_letters import FailedJob, read_failed, retry
from producer.deliveries import WebhookCounts, count_deliveries
from producer.dependents import DeferredJob, cancel_dependents, read_deferred
from producer.embeddings import Input, cancel_all, is_list_of_inputs, requests_for, wait_for_vectors
from producer.enqueue import PriorityClass
from producer.job import Job
from producer.outcome import JobStatus, read_status
from producer.queues import QueueStatus, read_queues
from producer.request_fields import RequestFields
from producer.results import as_completed, wait_for_result
from producer.subscription import Subscription, follow, parse_cursor
from producer.transport import Transport
from producer.workers import read_workers


class Client(BaseClient):
    """A connection to the queues. Use it as a context manager, or call `close()`.

    Every method raises RedisUnavailableError where Redis cannot be reached, after a few tries, and ClientClosedError
    once the client was closed.
    """

    def __init__(
        self, redis_url: str | None = None, *, queue: str | None = None, s3_endpoint_url: str | None = None
    ) -> None:
        """Arguments that are not given come from PROMPTMILL_REDIS_URL, PROMPTMILL_QUEUE and PROMPTMILL_S3_ENDPOINT_URL,
        or from the defaults of `ProducerSettings`. Raises SettingsError."""
        super().__init__(redis_url, queue=queue, s3_endpoint_url=s3_endpoint_url)
        self._transport = Transport(self.settings.redis_url, self.settings.s3_endpoint_url)

    def submit(
        self,
        prompt: Prompt = None,
        /,
        *,
        messages: Messages = None,
        queue: str | None = None,
        priority_class: PriorityClass | None = None,
        job_id: str | None = None,
        depends_on: Job | str | Iterable[Job | str] = (),
        durable: bool = False,
        **fields: Unpack[RequestFields],
    ) -> Job:
        """Enqueue one job; `fields` are those of `JobRequest`. Raises InvalidJobError naming the field.

        `prompt` is text or token ids. `priority_class` is claimed before ("high") or after ("low") the queue itself.
        With a `job_id` of your own, or an `idempotency_key`, a job that exists already is not enqueued again; another
        request under the same key is refused with code `idempotency_conflict`. The job waits until every job of
        `depends_on` has finished; where one of them fails or is cancelled, until that one is retried and finishes, or
        this one is cancelled (`deferred`, `cancel_dependents`). One that was cancelled already is refused. With
        `durable`, it is on Redis' disk, and on a replica where there is one, when this returns: DurabilityError
        otherwise.
        """
        request = gather_fields(prompt, messages, fields)
        protocol = self._submit_one(
            request,
            queue=queue,
            priority_class=priority_class,
            job_id=job_id,
            depends_on=ids_of(depends_on),
            durable=durable,
        )
        job = self._transport.run(protocol)
        return Job(self, job.job_id, job.queue)

    def submit_many(
        self,
        requests: Requests,
        *,
        queue: str | None = None,
        priority_class: PriorityClass | None = None,
        job_ids: Sequence[str] | None = None,
        durable: bool = False,
    ) -> list[Job]:
        """Enqueue many jobs, hundreds per round trip. Each request is a mapping of `JobRequest` fields.

        Every request is checked before any is enqueued: InvalidJobError names the item and its field.
        """
        protocol = self._submit_many(
            requests, queue=queue, priority_class=priority_class, job_ids=job_ids, durable=durable
        )
        jobs = self._transport.run(protocol)
        return [Job(self, job.job_id, job.queue) for job in jobs]

    @overload
    def embed(self, inputs: str | list[int], /, **options: Any) -> list[float]: ...

    @overload
    def embed(self, inputs: Sequence[Input], /, **options: Any) -> list[list[float]]: ...

    def embed(
        self,
        inputs: Input | Sequence[Input],
        /,
        *,
        timeout: float | None = None,
        queue: str | None = None,
        priority_class: PriorityClass | None = None,
        **fields: Any,
    ) -> list[float] | list[list[float]]:
        """The embedding of a text or of token ids, or that of each of a list of either; a list goes as jobs of some
        dozens of texts. `fields` are those of `JobRequest`, such as `model`, `dimensions` and `tenant`.

        `timeout`: seconds for all of them together. Raises JobFailedError for the first that fails, ResultTimeoutError,
        InvalidJobError; the rest is then cancelled.
        """
        jobs = self.submit_many(requests_for(inputs, fields), queue=queue, priority_class=priority_class)
        try:
            vectors = self._transport.run(wait_for_vectors({job.id: job.queue for job in jobs}, timeout))
        except BaseException:
            self._transport.run(cancel_all([job.id for job in jobs]))
            raise
        return vectors if is_list_of_inputs(inputs) else vectors[0]

    def job(self, job_id: str) -> Job:
        """A handle on the job with this id. Does not check that the job exists; the handle's methods do."""
        return Job(self, job_id)

    def stream(self, job: Job | str, *, timeout: float | None = None, after: str | None = None) -> Subscription:
        """See `Job.stream`."""
        job_id, _ = id_and_queue(job)
        protocol = follow(job_id, after=parse_cursor(after), timeout=timeout, pace=self._look_pace)
        return Subscription(self._transport.iterate(protocol), after)

    def result(self, job: Job | str, *, timeout: float | None = None) -> Result:
        """See `Job.result`."""
        job_id, queue = id_and_queue(job)
        return self._transport.run(wait_for_result(job_id, queue, timeout))

    def as_completed(self, jobs: Iterable[Job | str], timeout: float | None = None) -> Iterator[Result]:
        """Yields the result of each job as it ends, also of failed jobs: check `status`. Uses one subscription for all.

        `timeout`: seconds for all of them together; then ResultTimeoutError.
        """
        queues = dict(id_and_queue(job) for job in jobs)
        yield from self._transport.iterate(as_completed(queues, timeout))

    def cancel(self, job: Job | str) -> bool:
        """Cancel a queued or running job. True if the job ends, or had ended, as cancelled. Raises JobNotFoundError.

        A running job ends within one step of its worker, with what it has; if it ends by itself first, that stands.
        """
        job_id, _ = id_and_queue(job)
        return self._transport.run(cancel(job_id))

    def cancel_dependents(self, job: Job | str) -> list[str]:
        """Cancel the jobs that wait for this one, whatever its status, and those that wait for them. Returns their
        ids."""
        job_id, _ = id_and_queue(job)
        return self._transport.run(cancel_dependents(job_id))

    def retry(self, job: Job | str) -> bool:
        """Put a failed job back onto its queue; it starts over. False if the job has not failed.

        Raises JobNotFoundError.
        """
        job_id, _ = id_and_queue(job)
        return self._transport.run(retry(job_id))

    def failed(self, limit: int | None = None) -> list[FailedJob]:
        """The failed jobs, with the reasons, of all queues that `queues()` returns; the latest failure first, at most
        `limit`."""
        return self._transport.run(read_failed(self.settings.queue, limit))

    def deferred(self, limit: int | None = None) -> list[DeferredJob]:
        """The jobs that wait for others, and for which ones, of all queues that `queues()` returns; the longest wait
        first, at most `limit`."""
        return self._transport.run(read_deferred(self.settings.queue, limit))

    def status(self, job: Job | str) -> JobStatus:
        """See `Job.status`."""
        job_id, _ = id_and_queue(job)
        return self._transport.run(read_status(job_id))

    def workers(self) -> list[WorkerInfo]:
        """The live workers, by name: what each serves, and how busy it is."""
        return self._transport.run(read_workers())

    def queues(self) -> list[QueueStatus]:
        """The queues that the live workers and this client use, with RQ's counts."""
        return self._transport.run(read_queues(self.settings.queue))

    def webhook_counts(self) -> WebhookCounts:
        """The numbers of waiting and of dead webhook deliveries, of batches and of RQ jobs."""
        return self._transport.run(count_deliveries())

    def close(self) -> None:
        """Close the connections. Jobs continue."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
