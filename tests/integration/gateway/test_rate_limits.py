"""The buckets of one key on a real Redis, and what a job is taken to come to."""

from typing import Any

import pytest
import redis

from producer.async_transport import AsyncTransport
from producer.contract import JobRequest, Usage
from producer.gateway.api_keys import ApiKey, make_key
from producer.gateway.errors import ApiError
from producer.gateway.rate_limits import BUCKET_PREFIX, RateLimits, estimate_tokens

NOT_YET = -3600  # seconds ago: a bucket from after now is not filled, however slow the test


@pytest.fixture
def limits(transport: AsyncTransport) -> RateLimits:
    return RateLimits(transport)


def a_key(**most: int) -> ApiKey:
    return make_key(name="small", **most)[0]


def fill(client: redis.Redis, key: ApiKey, *, requests: float, tokens: float, seconds_ago: int = NOT_YET) -> None:
    now, _ = client.time()
    levels: dict[Any, Any] = {"at": now - seconds_ago, "requests": requests, "tokens": tokens}
    client.hset(BUCKET_PREFIX + key.id, mapping=levels)


def levels(client: redis.Redis, key: ApiKey) -> list[float]:
    """Requests and tokens that are left."""
    return [float(value or 0) for value in client.hmget(BUCKET_PREFIX + key.id, "requests", "tokens")]


def test_a_job_may_come_to_its_prompt_and_every_choices_most() -> None:
    assert estimate_tokens(JobRequest(prompt="x" * 40, max_tokens=10, n=3, temperature=1.0)) == 11 + 3 * 10
    assert estimate_tokens(JobRequest(prompt=[7] * 40)) == 40 + 256
    assert estimate_tokens(JobRequest(task="embed", inputs=[[7] * 5, "x" * 40])) == 5 + 11


async def test_buckets_fill_evenly_over_a_minute_and_no_further(limits: RateLimits, redis_client: redis.Redis) -> None:
    key = a_key(requests_per_minute=60, tokens_per_minute=600)
    fill(redis_client, key, requests=0, tokens=0, seconds_ago=30)
    assert await limits.take(key, 100) == 100
    num_requests, num_tokens = levels(redis_client, key)
    assert 29 <= num_requests < 50 and 200 <= num_tokens < 400
    fill(redis_client, key, requests=0, tokens=0, seconds_ago=3600)
    await limits.take(key, 100)
    assert levels(redis_client, key) == [59, 500]


@pytest.mark.parametrize(
    ("most", "num_tokens", "reached", "seconds"),
    [
        ({"requests_per_minute": 2, "tokens_per_minute": 6000}, 100, "2 requests a minute", 30),
        ({"requests_per_minute": 60, "tokens_per_minute": 600}, 300, "600 tokens a minute", 30),
        ({"requests_per_minute": 600}, 0, "600 requests a minute", 1),
    ],
)
async def test_what_is_refused_takes_nothing_and_is_told_of_the_longest_wait(
    limits: RateLimits,
    redis_client: redis.Redis,
    most: dict[str, int],
    num_tokens: int,
    reached: str,
    seconds: int,
) -> None:
    key = a_key(**most)
    fill(redis_client, key, requests=0, tokens=0)
    with pytest.raises(ApiError, match=f"limit of {reached}") as refused:
        await limits.take(key, num_tokens)
    assert refused.value.headers["retry-after"] == str(seconds)
    assert levels(redis_client, key) == [0, 0]


async def test_a_settled_request_counts_once_and_no_bucket_holds_more_than_a_minutes(
    limits: RateLimits, redis_client: redis.Redis
) -> None:
    key = a_key(requests_per_minute=60, tokens_per_minute=600)
    fill(redis_client, key, requests=10, tokens=300)
    await limits.settle(key, num_taken=100, usage=Usage(prompt_tokens=10, completion_tokens=20, total_tokens=30))
    assert levels(redis_client, key) == [10, 370]
    fill(redis_client, key, requests=10, tokens=590)
    await limits.settle(key, num_taken=100, usage=Usage())
    assert levels(redis_client, key) == [10, 600]


async def test_what_a_request_used_beyond_its_estimate_is_taken_as_well_its_prompt_included(
    limits: RateLimits, redis_client: redis.Redis
) -> None:
    key = a_key(tokens_per_minute=600)
    assert await limits.take(key, 100) == 100
    usage = Usage(prompt_tokens=1_000_000, completion_tokens=1, total_tokens=1_000_001)
    await limits.settle(key, num_taken=100, usage=usage)
    assert levels(redis_client, key)[1] < -900_000
    assert 1800 < redis_client.ttl(BUCKET_PREFIX + key.id) <= 3600, "of a key that comes no more, nothing stays"
