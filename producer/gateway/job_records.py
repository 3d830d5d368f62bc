"""What the gateway must know of a job later, on any replica: whose it is, and how its stream is to look.

One small key a job in Redis, written before the job is enqueued; it outlives the job's result.
"""

from pydantic import BaseModel, ConfigDict

from producer.async_transport import AsyncTransport
from producer.operations import send

RECORD_TTL_SECONDS = 7 * 24 * 3600
RECORD_PREFIX = "promptmill:gateway:job:"


class JobRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    key_id: str | None  # of the API key that asked for it; None: no key was needed
    url: str
    response_id: str
    model: str
    created: int  # epoch seconds
    first_index: int = 0  # of this job's choices among those of its request
    num_choices: int = 1


class JobRecords:
    def __init__(self, redis: AsyncTransport) -> None:
        self._redis = redis

    async def write(self, records: dict[str, JobRecord]) -> None:
        """Records by job id; one that is there already stays."""
        commands = [
            ("SET", RECORD_PREFIX + job_id, record.model_dump_json(), "NX", "EX", RECORD_TTL_SECONDS)
            for job_id, record in records.items()
        ]
        await self._redis.run(send(*commands))

    async def read(self, job_id: str) -> JobRecord | None:
        [value] = await self._redis.run(send(("GET", RECORD_PREFIX + job_id)))
        return JobRecord.model_validate_json(value) if value is not None else None
