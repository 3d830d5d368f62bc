"""Transactions that take effect only while a fence holds, on a real Redis."""

import pytest
import redis
from redis.client import Pipeline

from producer.contract import keys
from worker.errors import LeaseLostError
from worker.fence import FencedRedis

JOB_ID = "job"
FENCE = "1:execution"


@pytest.fixture
def connection(redis_client: redis.Redis) -> FencedRedis:
    """Of the one who holds the fence; its transactions set `epilogue` as well."""
    redis_client.set(keys.fence_key(JOB_ID), FENCE)

    def note(pipe: Pipeline) -> None:
        pipe.set("epilogue", 1)

    return FencedRedis(
        redis_client.connection_pool,
        job_id=JOB_ID,
        fence_key=keys.fence_key(JOB_ID),
        fence=FENCE,
        epilogue=note,
    )


def test_a_fenced_transaction_commits_with_its_epilogue_while_the_fence_holds(
    redis_client: redis.Redis, connection: FencedRedis
) -> None:
    with connection.pipeline() as pipe:
        pipe.set("written", 1)
        pipe.execute()
    assert redis_client.mget("written", "epilogue") == [b"1", b"1"] and connection.error is None


@pytest.mark.parametrize("fence", ["2:other", None])
def test_a_fenced_transaction_writes_nothing_once_the_fence_is_lost(
    fence: str | None, redis_client: redis.Redis, connection: FencedRedis
) -> None:
    if fence is None:
        redis_client.delete(keys.fence_key(JOB_ID))
    else:
        redis_client.set(keys.fence_key(JOB_ID), fence)
    with connection.pipeline() as pipe:
        pipe.watch("other")
        pipe.multi()
        pipe.set("written", 1)
        with pytest.raises(LeaseLostError):
            pipe.execute()
    assert redis_client.mget("written", "epilogue") == [None, None]
    assert isinstance(connection.error, LeaseLostError)


def test_a_fence_that_changes_during_the_transaction_stops_it(
    redis_client: redis.Redis, connection: FencedRedis
) -> None:
    def lose(pipe: Pipeline) -> None:
        redis_client.set(keys.fence_key(JOB_ID), "2:other")

    connection.epilogue = lose
    with connection.pipeline() as pipe:
        pipe.set("written", 1)
        with pytest.raises(redis.WatchError):
            pipe.execute()
    assert redis_client.get("written") is None
