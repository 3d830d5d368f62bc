"""Handles on jobs: an id and the client that knows how to ask for it. They hold no connection and no state."""

from typing import TYPE_CHECKING

from producer.contract import Result
from producer.outcome import JobStatus
from producer.subscription import AsyncSubscription, Subscription

if TYPE_CHECKING:
    from producer.async_client import AsyncClient
    from producer.client import Client


class Job:
    """A job that was enqueued, here or elsewhere. `queue` is None where it is not known."""

    def __init__(self, client: "Client", job_id: str, queue: str | None = None) -> None:
        self._client = client
        self.id = job_id
        self.queue = queue

    def stream(self, timeout: float | None = None, after: str | None = None) -> Subscription:
        """The job's chunks, from its first token on, or behind the cursor `after` (a `Subscription.last_id`).

        Each chunk comes once and in order, whenever the subscription begins, and across reconnects. A chunk with
        `reset` set voids everything before it. A cancelled job ends with chunks of `finish_reason` "cancelled".
        `timeout` is the number of seconds to wait for the next chunk.

        Raises, while iterated over: JobFailedError behind the last chunk of a job that failed, JobNotFoundError,
        ResultTimeoutError, RedisUnavailableError.
        """
        return self._client.stream(self.id, timeout=timeout, after=after)

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the job's end, at most `timeout` seconds.

        Raises JobFailedError (with the partial result), JobNotFoundError, ResultTimeoutError, ResultStoreError,
        RedisUnavailableError.
        """
        return self._client.result(self, timeout=timeout)

    def cancel(self) -> bool:
        """Cancel the job, queued or running. True if it ends, or has ended, as cancelled."""
        return self._client.cancel(self.id)

    def status(self) -> JobStatus:
        """Where the job stands. Raises JobNotFoundError."""
        return self._client.status(self.id)

    def __repr__(self) -> str:
        return f"Job({self.id!r})"


class AsyncJob:
    """A job that was enqueued, here or elsewhere. `queue` is None where it is not known."""

    def __init__(self, client: "AsyncClient", job_id: str, queue: str | None = None) -> None:
        self._client = client
        self.id = job_id
        self.queue = queue

    def stream(self, timeout: float | None = None, after: str | None = None) -> AsyncSubscription:
        """As `Job.stream`, for `async for`."""
        return self._client.stream(self.id, timeout=timeout, after=after)

    async def result(self, timeout: float | None = None) -> Result:
        """As `Job.result`."""
        return await self._client.result(self, timeout=timeout)

    async def cancel(self) -> bool:
        """As `Job.cancel`."""
        return await self._client.cancel(self.id)

    async def status(self) -> JobStatus:
        """As `Job.status`."""
        return await self._client.status(self.id)

    def __repr__(self) -> str:
        return f"AsyncJob({self.id!r})"
