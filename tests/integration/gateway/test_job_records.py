"""What gateways keep of jobs: whose each is, and the last ones of every API key."""

import pytest
import redis

from producer.async_transport import AsyncTransport
from producer.gateway import job_records
from producer.gateway.job_records import KEY_JOBS_PREFIX, RECORD_TTL_SECONDS, JobRecord, JobRecords
from producer.rq_names import job_key

MINE = JobRecord(key_id="mine", url="/v1/completions", response_id="cmpl-1", model="fake", created=1)


def asked_at(created: int) -> JobRecord:
    return MINE.model_copy(update={"created": created})


async def test_a_keys_jobs_are_listed_by_when_they_were_asked_for_first(
    transport: AsyncTransport, redis_client: redis.Redis
) -> None:
    records = JobRecords(transport)
    for job_id, created in (("old", 1), ("new", 2)):
        assert await records.write({job_id: asked_at(created)}) == [asked_at(created)]
        redis_client.hset(job_key(job_id), "status", "queued")
    assert await records.write({"old": asked_at(3)}) == [asked_at(1)]
    assert await records.newest_of("mine") == ["new", "old"]
    redis_client.delete(job_key("old"))  # it was forgotten: what is asked for now is another
    assert await records.write({"old": asked_at(3)}) == [asked_at(3)]
    assert await records.newest_of("mine") == ["old", "new"] and await records.newest_of("other") == []
    await records.forget("old")
    assert await records.newest_of("mine") == ["new"]
    assert await records.read_many(["old", "new"]) == [None, asked_at(2)]


async def test_of_a_keys_jobs_the_last_ones_are_listed_for_as_long_as_records_are_kept(
    transport: AsyncTransport, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_records, "MAX_KEY_JOBS", 3)
    records = JobRecords(transport)
    await records.write({f"job-{at}": asked_at(at) for at in range(5)})
    assert await records.newest_of("mine") == ["job-4", "job-3", "job-2"]
    assert RECORD_TTL_SECONDS - 60 < redis_client.ttl(f"{KEY_JOBS_PREFIX}mine") <= RECORD_TTL_SECONDS


async def test_records_are_anothers_where_the_key_or_the_path_is_another(transport: AsyncTransport) -> None:
    records = JobRecords(transport)
    await records.write({"job": MINE})
    for changed in ({"url": "/v1/responses"}, {"key_id": "other"}, {"key_id": None}):
        assert not await records.confirm(dict.fromkeys(("gone", "job"), MINE.model_copy(update=changed)))
    assert await records.read_many(["gone", "job"]) == [None, MINE]
    assert await records.confirm({"job": asked_at(5)})
    assert await records.read("job") == asked_at(5)
