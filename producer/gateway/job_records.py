"""What the gateway must know of a job later, on any replica: whose it is, and how its stream is to look.

One small key a job in Redis, written before the job is enqueued, and kept for a week after the job was last asked for:
longer than the result of any that is asked after, however long it waits. And the last jobs of each API key by name, so
that a key can be shown its own.
"""

from collections.abc import Collection, Sequence

from pydantic import BaseModel, ConfigDict

from producer.async_transport import AsyncTransport
from producer.contract import JobRequest
from producer.operations import Command, send
from producer.responses.body import ResponseFrame
from producer.responses.request import AskedResponse

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
    response: AskedResponse | None = None  # of /v1/responses

    def frame(self, job_id: str, request: JobRequest) -> ResponseFrame:
        """What is told of the response. `request`: the job's."""
        assert self.response is not None, "of a job that is a response"
        return ResponseFrame(job_id, self.response_id, self.created, self.model, self.response, request)


class JobRecords:
    def __init__(self, redis: AsyncTransport) -> None:
        self._redis = redis

    async def write(self, records: dict[str, JobRecord], *, known: Collection[str] = ()) -> list[JobRecord]:
        """Records by job id, of one request. Of jobs that are `known` those that are there stay, and are returned; what
        is there of others is of a job that is no more."""
        commands: list[Command] = []
        for job_id, record in records.items():
            is_first = ("NX",) if job_id in known else ()
            name, value = RECORD_PREFIX + job_id, record.model_dump_json()
            commands.append(("SET", name, value, *is_first, "EX", RECORD_TTL_SECONDS))
            commands.append(("GETEX", name, "EX", RECORD_TTL_SECONDS))
        first = next(iter(records.values()))
        if first.key_id is not None:
            name = KEY_JOBS_PREFIX + first.key_id
            commands += [
                ("ZADD", name, *(("NX",) if job_id in known else ()), record.created, job_id)
                for job_id, record in records.items()
            ]
            commands += [
                ("ZREMRANGEBYRANK", name, 0, -MAX_KEY_JOBS - 1),
                ("EXPIRE", name, RECORD_TTL_SECONDS),
            ]
        replies = await self._redis.run(send(*commands))
        return [JobRecord.model_validate_json(value) for value in replies[1 : 2 * len(records) : 2]]

    async def read(self, job_id: str) -> JobRecord | None:
        """Of a job that is asked after."""
        [value] = await self._redis.run(send(("GETEX", RECORD_PREFIX + job_id, "EX", RECORD_TTL_SECONDS)))
        return JobRecord.model_validate_json(value) if value is not None else None

    async def read_many(self, job_ids: Sequence[str]) -> list[JobRecord | None]:
        """In the order of the ids; None for a job that did not come through a gateway, or long ago."""
        if not job_ids:
            return []
        [values] = await self._redis.run(send(("MGET", *(RECORD_PREFIX + job_id for job_id in job_ids))))
        return [JobRecord.model_validate_json(value) if value is not None else None for value in values]

    async def forget(self, job_id: str) -> None:
        """None but operators are shown the job any more."""
        [value] = await self._redis.run(send(("GETDEL", RECORD_PREFIX + job_id)))
        if value is not None and (key_id := JobRecord.model_validate_json(value).key_id) is not None:
            await self._redis.run(send(("ZREM", KEY_JOBS_PREFIX + key_id, job_id)))

    async def newest_of(self, key_id: str) -> list[str]:
        """The ids of the last `MAX_KEY_JOBS` jobs that the key asked for, the newest first."""
        [ids] = await self._redis.run(send(("ZREVRANGE", KEY_JOBS_PREFIX + key_id, 0, -1)))
        return [job_id.decode() for job_id in ids]
