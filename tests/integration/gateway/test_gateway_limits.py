"""How much is taken: requests and tokens a minute of a key, depths of queues, sizes of bodies."""

import httpx2 as httpx
import openai
import pytest
import redis

from tests.fakes.command_line import new_key
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import RunningGateway, StartGateway, open_client


def test_requests_a_minute_are_limited_for_all_replicas_together(
    redis_url: str, start_gateway: StartGateway, echoing: FakeWorker
) -> None:
    key = new_key(redis_url, "slow", "--requests-per-minute", "2")
    replicas = [start_gateway(), start_gateway()]
    for replica in replicas:
        with open_client(replica, api_key=key) as client:
            client.completions.create(model="fake", prompt="x")
    with open_client(replicas[0], api_key=key) as client, pytest.raises(openai.RateLimitError) as error:
        client.completions.create(model="fake", prompt="x")
    assert error.value.code == "rate_limit_exceeded" and 1 <= int(error.value.response.headers["retry-after"]) <= 31


def test_tokens_a_minute_are_those_that_were_used(
    redis_url: str, redis_client: redis.Redis, gateway: RunningGateway, echoing: FakeWorker
) -> None:
    key = new_key(redis_url, "small", "--tokens-per-minute", "600")
    with open_client(gateway, api_key=key) as client:
        client.completions.create(model="fake", prompt="four", max_tokens=400)  # reserves 402, uses 2 + 5
        left = float(redis_client.hget(f"promptmill:gateway:rate:{key.split('-')[1]}", "tokens") or 0)
        assert 590 <= left <= 600
        list(client.completions.create(model="fake", prompt="four", max_tokens=500, stream=True))
        with pytest.raises(openai.RateLimitError):
            for _ in range(4):
                client.completions.create(model="fake", prompt="w " * 180, max_tokens=600)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_request_that_failed_costs_what_it_has_used(
    redis_url: str, redis_client: redis.Redis, gateway: RunningGateway, echoing: FakeWorker, is_streamed: bool
) -> None:
    key = new_key(redis_url, "small", "--tokens-per-minute", "600")
    with open_client(gateway, api_key=key) as client, pytest.raises(openai.APIError, match="told to fail"):
        list(client.completions.create(model="fake", prompt="fail", max_tokens=9000, stream=is_streamed))
    left = float(redis_client.hget(f"promptmill:gateway:rate:{key.split('-')[1]}", "tokens") or 0)
    assert 580 <= left <= 600


def test_a_request_that_nobody_waits_for_costs_a_minutes_tokens_at_most(
    redis_url: str, redis_client: redis.Redis, gateway: RunningGateway, worker: FakeWorker
) -> None:
    key = new_key(redis_url, "small", "--tokens-per-minute", "600")
    with open_client(gateway, api_key=key, timeout=0.5) as client, pytest.raises(openai.APITimeoutError):
        client.completions.create(model="fake", prompt="x", max_tokens=9000)
    assert float(redis_client.hget(f"promptmill:gateway:rate:{key.split('-')[1]}", "tokens") or 0) >= 0


def test_a_deep_queue_takes_no_more(start_gateway: StartGateway, worker: FakeWorker) -> None:
    gateway = start_gateway(max_queue_depth=2)
    worker.connection.rpush("rq:queue:promptmill", "a", "b")
    with open_client(gateway) as client, pytest.raises(openai.RateLimitError) as error:
        client.completions.create(model="fake", prompt="x")
    assert error.value.code == "queue_full" and error.value.response.headers["retry-after"] == "5"


def test_large_bodies_are_refused_whole_and_chunked(start_gateway: StartGateway) -> None:
    url = f"{start_gateway(max_body_bytes=2048).url}/v1/completions"
    json = {"content-type": "application/json"}
    assert httpx.post(url, content=b'"' + b"x" * 4096, headers=json).status_code == 413
    pieces = (b"x" * 512 for _ in range(8))
    assert httpx.post(url, content=pieces, headers=json).json()["error"]["code"] == "request_too_large"
