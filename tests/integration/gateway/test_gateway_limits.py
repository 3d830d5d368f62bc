"""How much is taken: requests and tokens a minute of a key, depths of queues, sizes of bodies."""

import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import httpx2 as httpx
import openai
import pytest
import redis

from producer.contract import ErrorCode, ErrorInfo
from producer.gateway import acceptance
from producer.gateway.bodies import MAX_BYTES_AT_ONCE
from producer.gateway.rate_limits import BUCKET_PREFIX
from producer.openai.request import OpenAIRequest, parse_body
from tests.fakes.command_line import new_key
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.gateways import RunningGateway, StartGateway, open_client
from tests.fakes.held_job import HeldJob
from tests.fakes.waiting import wait_until


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


def test_an_upload_and_a_batch_are_requests_too(
    redis_url: str, redis_client: redis.Redis, gateway: RunningGateway
) -> None:
    key = new_key(redis_url, "slow", "--requests-per-minute", "60")
    upload: Any = {"file": ("a.jsonl", b"{}\n"), "purpose": "batch"}
    with open_client(gateway, api_key=key) as client:
        kept = client.files.create(**upload)
        now, _ = redis_client.time()
        spent: dict[Any, Any] = {"at": now + 3600, "requests": 0}  # from after now: not filled, however slow the test
        redis_client.hset(BUCKET_PREFIX + key.split("-")[1], mapping=spent)
        with pytest.raises(openai.RateLimitError, match="60 requests a minute"):
            client.files.create(**upload)
        with pytest.raises(openai.RateLimitError, match="60 requests a minute"):
            client.batches.create(input_file_id=kept.id, endpoint="/v1/completions", completion_window="24h")
        assert len(list(client.files.list())) == 1 and not list(client.batches.list())


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


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_request_that_ended_with_one_of_its_jobs_costs_its_estimate(
    redis_url: str, redis_client: redis.Redis, gateway: RunningGateway, worker: FakeWorker, is_streamed: bool
) -> None:
    """What the other one, which is cancelled, had used by then nobody has seen."""
    key = new_key(redis_url, "small", "--tokens-per-minute", "600")

    jobs: list[HeldJob] = []

    def fail_the_bad_one(held: HeldJob) -> None:
        jobs.append(held.begin())
        if held.arguments["prompt"] == "bad":
            held.end("failed", error=ErrorInfo(code=ErrorCode.ENGINE_ERROR, message="told to fail"))

    asked: Any = {"prompt": ["good", "bad"], "max_tokens": 200, "stream": is_streamed}
    with (
        open_client(gateway, api_key=key) as client,
        worker.serving(fail_the_bad_one),
        pytest.raises(openai.APIError, match="told to fail"),
    ):
        list(client.completions.create(model="fake", **asked))
    left = float(redis_client.hget(f"promptmill:gateway:rate:{key.split('-')[1]}", "tokens") or 0)
    assert left <= 600 - 2 * 200
    assert [job.is_cancelled() for job in jobs] == [job.arguments["prompt"] == "good" for job in jobs]


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


def test_a_request_that_no_worker_would_take_for_its_size_is_refused_at_once(
    redis_url: str, redis_client: redis.Redis, gateway: RunningGateway, worker: FakeWorker
) -> None:
    sizes: list[int] = []

    def measure(held: HeldJob) -> None:
        sizes.append(len(zlib.decompress(cast(bytes, redis_client.hget(f"rq:job:{held.job_id}", "data")))))
        echo(held)

    def ask(prompt: str) -> str | None:
        asked = {"model": "fake", "messages": [{"role": "user", "content": prompt}]}
        answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=asked, timeout=30)
        if answer.status_code == 200:
            return None
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "messages") and "10000 at most" in error["message"]
        return str(error["code"])

    worker.announce("fake", max_request_bytes=10_000)
    with worker.serving(measure):
        assert ask("x" * 9_000) is None
        assert ask("x" * (9_000 + 10_000 - sizes[0])) is None and sizes[1] == 10_000
        assert ask("x" * (9_001 + 10_000 - sizes[0])) == "context_length_exceeded"
        assert ask("é" * 1_600) is None and ask("é" * 1_700) == "context_length_exceeded"
        with FakeWorker(redis_url, name="large") as other:  # whoever takes more, or does not say, may get it
            for most, code in ((None, None), (20_000, None), (9_999, "context_length_exceeded")):
                other.announce("fake", max_request_bytes=most)
                wait_until(partial(_has_limits, gateway, {10_000, most}))
                assert ask("x" * 12_000) == code
            other.announce("another", max_request_bytes=20_000)
            wait_until(lambda: 20_000 in _limits(gateway))
            assert ask("x" * 12_000) == "context_length_exceeded"
    assert len(sizes) == 5


def _limits(gateway: RunningGateway) -> set[int | None]:
    workers = httpx.get(f"{gateway.url}/stats").json()["workers"]
    return {worker["max_request_bytes"] for worker in workers}


def _has_limits(gateway: RunningGateway, limits: set[int | None]) -> bool:
    return _limits(gateway) == limits


def test_a_list_to_embed_may_be_longer_than_a_prompt(gateway: RunningGateway, worker: FakeWorker) -> None:
    asked: list[int] = []

    def refuse(held: HeldJob) -> None:
        asked.append(len(held.arguments["inputs"]))
        held.begin().end("failed", error=ErrorInfo(code=ErrorCode.ENGINE_ERROR, message="no vectors here"))

    worker.announce("fake", max_request_bytes=10_000)
    with worker.serving(refuse):
        answer = httpx.post(f"{gateway.url}/v1/embeddings", json={"model": "fake", "input": ["x" * 5_000] * 10})
    assert asked == [10] and answer.json()["error"]["code"] == "engine_error"


def test_while_a_large_body_is_read_others_are_served(
    gateway: RunningGateway, echoing: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_reading, may_go_on = threading.Event(), threading.Event()

    def read(url: str, body: dict[str, Any]) -> OpenAIRequest:
        if len(body["prompt"]) > MAX_BYTES_AT_ONCE:
            is_reading.set()
            assert may_go_on.wait(20)
        return parse_body(url, body)

    monkeypatch.setattr(acceptance, "parse_body", read)
    with open_client(gateway) as client, ThreadPoolExecutor(1) as pool:
        large = pool.submit(client.completions.create, model="fake", prompt="large " * 20_000, max_tokens=1)
        assert is_reading.wait(20)
        assert client.completions.create(model="fake", prompt="small").choices[0].text == "small "
        may_go_on.set()
        assert large.result(20).choices[0].text == "large "
