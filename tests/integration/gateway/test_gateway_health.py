"""What a gateway says of itself to who watches it: whether it serves, is to be sent requests, and answers at all."""

from contextlib import closing
from typing import Any

import httpx2 as httpx
import pytest

from producer.gateway import key_ring
from producer.gateway.api_keys import add_key, make_key
from producer.transport import Transport
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import RunningGateway, running_gateway
from worker.embedded_redis import EmbeddedRedis


def answers(gateway: RunningGateway) -> dict[str, tuple[int, Any]]:
    paths = ("/health", "/health/ready", "/health/live")
    responses = {path: httpx.get(f"{gateway.url}{path}", timeout=30) for path in paths}
    return {path: (response.status_code, response.json()) for path, response in responses.items()}


def test_a_gateway_without_a_worker_serves_nothing_but_is_sent_requests(gateway: RunningGateway) -> None:
    said = answers(gateway)
    assert {path: status for path, (status, _) in said.items()} == {
        "/health": 503,
        "/health/ready": 200,
        "/health/live": 200,
    }
    assert said["/health/ready"][1] == {
        "status": "healthy",
        "redis": "reachable",
        "num_workers": 0,
        "is_draining": False,
    }


def test_a_monitor_may_ask_for_the_head_alone(gateway: RunningGateway) -> None:
    with httpx.Client(base_url=gateway.url, timeout=30) as client:
        responses = [client.head(path) for path in ("/health", "/health/ready", "/health/live")]
    assert [response.status_code for response in responses] == [503, 200, 200]
    assert all(response.content == b"" for response in responses)


def test_a_gateway_that_drains_is_sent_nothing_more(gateway: RunningGateway, worker: FakeWorker) -> None:
    assert [status for status, _ in answers(gateway).values()] == [200, 200, 200]
    assert gateway.context is not None
    gateway.context.drain.is_draining = True
    said = answers(gateway)
    assert [status for status, _ in said.values()] == [503, 503, 200]
    assert said["/health/ready"][1]["is_draining"] is True


def test_a_gateway_whose_redis_is_away_is_sent_nothing_and_lives() -> None:
    with running_gateway("redis://127.0.0.1:1") as gateway:
        said = answers(gateway)
    assert [status for status, _ in said.values()] == [503, 503, 200]
    assert said["/health"][1]["redis"] == said["/health/ready"][1]["redis"] == "unreachable"


def test_a_prometheus_whose_key_is_known_is_told_that_redis_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_ring, "CACHE_SECONDS", 0.0)
    key, text = make_key(name="prometheus", is_operator=True)
    with EmbeddedRedis() as server:
        with closing(Transport(server.url)) as transport:
            transport.run(add_key(key))
        with running_gateway(server.url) as gateway:
            assert "promptmill_redis_up 1.0" in metrics(gateway, text).text
            server.stop()
            away = metrics(gateway, text)
            assert (away.status_code, "promptmill_redis_up 0.0" in away.text) == (200, True)
            for other in (f"{text}x", make_key(name="other")[1]):
                assert metrics(gateway, other).status_code == 503, "nobody can say whose that is"


def test_where_there_are_no_keys_anybody_is_told_that_redis_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_ring, "CACHE_SECONDS", 0.0)
    with EmbeddedRedis() as server, running_gateway(server.url) as gateway:
        assert "promptmill_redis_up 1.0" in metrics(gateway).text
        server.stop()
        away = metrics(gateway)
        assert (away.status_code, "promptmill_redis_up 0.0" in away.text) == (200, True)


def metrics(gateway: RunningGateway, key: str | None = None) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key is not None else {}
    return httpx.get(f"{gateway.url}/metrics", headers=headers, timeout=30)
