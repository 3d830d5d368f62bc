"""What the gateway must know of a job later, on any replica: whose it is, and how its stream is to look.

One small key a job in Redis, written before the job is enqueued; it outlives the job's result. And the last jobs of
each API key by name, so that a key can be shown its own.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from producer.async_transport import AsyncTransport
from producer.operations import Command, send

RECORD_TTL_SECONDS = 7 * 24 * 3600
RECORD_PREFIX = "promptmill:gateway:job:"
KEY_JOBS_PREFIX = "promptmill:gateway:key_jobs:"  # ZSET of a key's last job ids, scored by when they were asked for
MAX_KEY_JOBS = 500


class JobRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    key_id: str | None  # of the API key that asked for it; None: no key was needed
    url: str
    response_id: str
    model: str
    created: int  # epoch seconds
    first_index: int = 0  # of this job's choices among those of its request
    num_choices: int = 1
    callers_names: dict[str, str] = {}  # of the job's fields, as `producer.openai_request` has them


class JobRecords:
    def __init__(self, redis: AsyncTransport) -> None:
        self._redis = redis

    async def write(self, records: dict[str, JobRecord]) -> None:
        """Records by job id, of one request; one that is there already stays."""
        commands: list[Command] = [
            ("SET", RECORD_PREFIX + job_id, record.model_dump_json(), "NX", "EX", RECORD_TTL_SECONDS)
            for job_id, record in records.items()
        ]
        first = next(iter(records.values()), None)
        if first is not None and first.key_id is not None:
            name = KEY_JOBS_PREFIX + first.key_id
            scored = [part for job_id, record in records.items() for part in (record.created, job_id)]
            commands += [
                ("ZADD", name, "NX", *scored),
                ("ZREMRANGEBYRANK", name, 0, -MAX_KEY_JOBS - 1),
                ("EXPIRE", name, RECORD_TTL_SECONDS),
            ]
        await self._redis.run(send(*commands))

    async def read(self, job_id: str) -> JobRecord | None:
        return (await self.read_many([job_id]))[0]

    async def read_many(self, job_ids: Sequence[str]) -> list[JobRecord | None]:
        """In the order of the ids; None for a job that did not come through a gateway, or long ago."""
        if not job_ids:
            return []
        [values] = await self._redis.run(send(("MGET", *(RECORD_PREFIX + job_id for job_id in job_ids))))
        return [JobRecord.model_validate_json(value) if value is not None else None for value in values]

    async def newest_of(self, key_id: str) -> list[str]:
        """The ids of the last `MAX_KEY_JOBS` jobs that the key asked for, the newest first."""
        [ids] = await self._redis.run(send(("ZREVRANGE", KEY_JOBS_PREFIX + key_id, 0, -1)))
        return [job_id.decode() for job_id in ids]
