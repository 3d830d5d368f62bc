"""Which jobs a caller is shown: those that run, wait, have ended or failed.

An operator sees all jobs that leases, queues, results streams and RQ's failed registries name. A key sees the last five
hundred that it asked for. A caller without a key who is not an operator sees none.
"""

from collections.abc import Sequence
from itertools import chain, zip_longest

from producer.async_client import AsyncClient
from producer.async_transport import AsyncTransport
from producer.contract import ErrorCode, ErrorInfo, keys
from producer.dead_letters import FailedJob, read_failed_of
from producer.gateway.auth import Caller
from producer.gateway.console.bodies import JobRow, JobState, Scope
from producer.gateway.console.ended_jobs import EndedJobs
from producer.gateway.console.job_rows import JobRows
from producer.gateway.job_records import JobRecords
from producer.operations import send
from producer.queues import read_queue_names
from producer.rq_names import queue_key

_STATUSES: dict[JobState, tuple[str, ...]] = {
    "running": ("running",),
    "waiting": ("queued", "waiting"),
    "ended": ("finished", "cancelled", "stopped", "failed"),
    "failed": ("failed",),
}


def scope_of(caller: Caller) -> Scope:
    if caller.is_operator:
        return "all"
    return "own" if caller.key_id is not None else "none"


class JobLists:
    def __init__(self, client: AsyncClient, redis: AsyncTransport, records: JobRecords, ended: EndedJobs) -> None:
        self._client = client
        self._redis = redis
        self._records = records
        self._ended = ended
        self.rows = JobRows(redis, records, ended)

    async def read(self, caller: Caller, state: JobState, limit: int) -> list[JobRow]:
        """The newest first; of those that wait, the next to run. Raises RedisUnavailableError."""
        match scope_of(caller):
            case "all":
                return await self._read_all(state, limit)
            case "own":
                assert caller.key_id is not None
                return await self._read_own(caller.key_id, state, limit)
        return []

    async def _read_all(self, state: JobState, limit: int) -> list[JobRow]:
        if state == "failed":
            return await self._failed_rows(await self._client.failed(limit))
        if state == "ended":
            rows = await self.rows.read([job.job_id for job in self._ended.newest(limit)])
            return [row for row in rows if row.status in _STATUSES["ended"]]
        names = await self._redis.run(read_queue_names(self._client.settings.queue))
        if state == "running":
            found = await self._redis.run(send(*(("ZRANGE", keys.leases_key(name), 0, limit - 1) for name in names)))
            return _newest_first(await self.rows.read([job_id.decode() for job_id in chain(*found)]))[:limit]
        found = await self._redis.run(send(*(("LRANGE", queue_key(name), 0, limit - 1) for name in names)))
        in_turn = [job_id.decode() for at in zip_longest(*found) for job_id in at if job_id is not None]
        return await self.rows.read(in_turn[:limit])

    async def _read_own(self, key_id: str, state: JobState, limit: int) -> list[JobRow]:
        job_ids = await self._records.newest_of(key_id)
        if state == "failed":
            return await self._failed_rows(await self._redis.run(read_failed_of(job_ids, limit)))
        rows = [row for row in await self.rows.read(job_ids) if row.status in _STATUSES[state]]
        return (rows[::-1] if state == "waiting" else _newest_first(rows))[:limit]

    async def _failed_rows(self, failed: Sequence[FailedJob]) -> list[JobRow]:
        reasons = {job.job_id: job for job in failed}
        rows = await self.rows.read(list(reasons))
        return [
            row.model_copy(update={"error": _error_of(reasons[row.id]), "attempts": reasons[row.id].attempts or None})
            for row in rows
        ]


def _newest_first(rows: list[JobRow]) -> list[JobRow]:
    return sorted(rows, key=lambda row: row.ended_at or row.started_at or row.enqueued_at or 0.0, reverse=True)


def _error_of(job: FailedJob) -> ErrorInfo:
    return ErrorInfo(code=ErrorCode(job.code), message=job.message)
