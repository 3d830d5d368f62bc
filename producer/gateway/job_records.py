"""What the gateway must know of a job later, on any replica: its owner, and the form of its stream.

One small key per job in Redis, written before the job is enqueued and kept for a week after it was last read: longer
than a result, however long the job waits. Also the last jobs of each API key, so that a key can list its own.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from producer.async_transport import AsyncTransport
from producer.contract import JobRequest
from producer.openai.responses.body import ResponseFrame
from producer.openai.responses.request import AskedResponse
from producer.operations import Script, send
from producer.rq_names import job_key

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
    callers_names: dict[str, str] = {}  # of the job's fields, as `producer.openai.request` has them
    response: AskedResponse | None = None  # of /v1/responses

    def frame(self, job_id: str, request: JobRequest) -> ResponseFrame:
        """What is told of the response. `request`: the job's."""
        assert self.response is not None, "of a job that is a response"
        return ResponseFrame(job_id, self.response_id, self.created, self.model, self.response, request)


class JobRecords:
    def __init__(self, redis: AsyncTransport) -> None:
        self._redis = redis

    async def write(self, records: dict[str, JobRecord]) -> list[JobRecord]:
        """Write the records of one request, by job id, and return those that count. The record of a job that exists
        is kept. Any other record is replaced: its job is gone, or its request comes at the same time (see
        `confirm`)."""
        key_id = next(iter(records.values())).key_id
        names = [name for job_id in records for name in (RECORD_PREFIX + job_id, job_key(job_id))]
        arguments: list[str | int] = [RECORD_TTL_SECONDS, MAX_KEY_JOBS]
        for job_id, record in records.items():
            arguments += (job_id, record.created, record.model_dump_json())
        listed = [KEY_JOBS_PREFIX + key_id] if key_id is not None else []
        found = await self._redis.run(_WRITE.run([*names, *listed], arguments))
        return [JobRecord.model_validate_json(value) for value in found]

    async def confirm(self, records: dict[str, JobRecord]) -> bool:
        """Whether the enqueued jobs belong to these records' request. Another request with the same idempotency key may
        have come in between. If it asked in another form, the jobs are its own; else it was refused for its body, or
        asked for the same, and its records are replaced."""
        found = await self.read_many(list(records))
        others = [now for now in found if now is not None]
        if any((now.url, now.key_id) != (mine.url, mine.key_id) for now in others for mine in records.values()):
            return False
        if found != list(records.values()):
            values = ((RECORD_PREFIX + job_id, record.model_dump_json()) for job_id, record in records.items())
            await self._redis.run(send(*(("SET", name, value, "EX", RECORD_TTL_SECONDS) for name, value in values)))
        return True

    async def read(self, job_id: str) -> JobRecord | None:
        """Read the record of a job, and keep it for another week."""
        [value] = await self._redis.run(send(("GETEX", RECORD_PREFIX + job_id, "EX", RECORD_TTL_SECONDS)))
        return JobRecord.model_validate_json(value) if value is not None else None

    async def read_many(self, job_ids: Sequence[str]) -> list[JobRecord | None]:
        """In the order of the ids; None for a job that did not come through a gateway, or long ago."""
        if not job_ids:
            return []
        [values] = await self._redis.run(send(("MGET", *(RECORD_PREFIX + job_id for job_id in job_ids))))
        return [JobRecord.model_validate_json(value) if value is not None else None for value in values]

    async def forget(self, job_id: str) -> None:
        """From now on only operators are shown the job."""
        [value] = await self._redis.run(send(("GETDEL", RECORD_PREFIX + job_id)))
        if value is not None and (key_id := JobRecord.model_validate_json(value).key_id) is not None:
            await self._redis.run(send(("ZREM", KEY_JOBS_PREFIX + key_id, job_id)))

    async def newest_of(self, key_id: str) -> list[str]:
        """The ids of the last `MAX_KEY_JOBS` jobs that the key asked for, the newest first."""
        [ids] = await self._redis.run(send(("ZREVRANGE", KEY_JOBS_PREFIX + key_id, 0, -1)))
        return [job_id.decode() for job_id in ids]


_WRITE = Script("""
-- KEYS: of each job its record and RQ's, then perhaps the list of the API key's jobs. ARGV: how long records are kept,
-- how many jobs are listed, then of each job: id, when it was asked for, record → the records that count
local ttl, max_listed, found = ARGV[1], tonumber(ARGV[2]), {}
local listed = #KEYS % 2 == 1 and KEYS[#KEYS]
for i = 1, (#ARGV - 2) / 3 do
  local record, job = KEYS[2 * i - 1], KEYS[2 * i]
  local id, created, value = unpack(ARGV, 3 * i, 3 * i + 2)
  local is_known = redis.call('EXISTS', job) == 1
  if is_known and redis.call('EXISTS', record) == 1 then
    redis.call('EXPIRE', record, ttl)
  else
    redis.call('SET', record, value, 'EX', ttl)
  end
  found[i] = redis.call('GET', record)
  if listed and not (is_known and redis.call('ZSCORE', listed, id)) then redis.call('ZADD', listed, created, id) end
end
if listed then
  redis.call('ZREMRANGEBYRANK', listed, 0, -max_listed - 1)
  redis.call('EXPIRE', listed, ttl)
end
return found
""")
