"""The buckets of one key on a real Redis, and what a job is taken to come to."""

import redis

from producer.async_transport import AsyncTransport
from producer.contract import JobRequest, Usage
from producer.gateway.api_keys import make_key
from producer.gateway.rate_limits import BUCKET_PREFIX, RateLimits, estimate_tokens


def test_a_job_may_come_to_its_prompt_and_every_choices_most() -> None:
    assert estimate_tokens(JobRequest(prompt="x" * 40, max_tokens=10, n=3, temperature=1.0)) == 11 + 3 * 10
    assert estimate_tokens(JobRequest(task="embed", inputs=[[7] * 5, "x" * 40])) == 5 + 11


async def test_what_a_request_used_beyond_its_estimate_is_taken_as_well_its_prompt_included(
    transport: AsyncTransport, redis_client: redis.Redis
) -> None:
    key, _ = make_key(name="small", tokens_per_minute=600)
    limits = RateLimits(transport)
    assert await limits.take(key, 100) == 100
    usage = Usage(prompt_tokens=1_000_000, completion_tokens=1, total_tokens=1_000_001)
    await limits.settle(key, num_taken=100, usage=usage)
    assert float(redis_client.hget(BUCKET_PREFIX + key.id, "tokens") or 0) < -900_000
    assert 0 < redis_client.ttl(BUCKET_PREFIX + key.id) <= 3600, "of a key that comes no more, nothing stays"
