"""API keys: how they are made and end, and what each may see."""

from types import SimpleNamespace

import httpx2 as httpx
import openai
import pytest
import redis

from producer.async_transport import AsyncTransport
from producer.gateway import key_ring
from producer.gateway.api_keys import API_KEYS_KEY, add_key, make_key, revoke_key
from tests.fakes.command_line import Invoke, new_key
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import RunningGateway, StartGateway, open_client


def test_a_key_is_made_taken_listed_and_revoked(
    promptmill: Invoke,
    redis_url: str,
    redis_client: redis.Redis,
    start_gateway: StartGateway,
    echoing: FakeWorker,
) -> None:
    key = new_key(redis_url, "team")
    stored = redis_client.hgetall(API_KEYS_KEY)
    assert key.split("-", 2)[2] not in str(stored), "the secret is not kept"
    gateway = start_gateway()
    with open_client(gateway, api_key=key) as client:
        assert client.completions.create(model="fake", prompt="x").choices[0].text == "x "
    for wrong in ("none", key[:-1] + ("A" if key[-1] != "A" else "B"), "pm-000000000000-" + "x" * 43):
        with open_client(gateway, api_key=wrong) as client, pytest.raises(openai.AuthenticationError) as error:
            client.models.list()
        assert error.value.code == "invalid_api_key"
    assert httpx.get(f"{gateway.url}/v1/models").json()["error"]["code"] == "missing_api_key"
    listed = promptmill("keys", "list").stdout + promptmill("keys", "list", "--json").stdout
    assert "team" in listed and key not in listed
    assert "is revoked" in promptmill("keys", "revoke", key.split("-")[1]).stdout
    assert promptmill("keys", "list").stdout == "there is no key\n"
    other = start_gateway(allow_anonymous=False, http_host="0.0.0.0")  # one that has not seen the key yet
    with open_client(other, api_key=key) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_key_sees_its_own_jobs_and_models_alone(redis_url: str, gateway: RunningGateway, echoing: FakeWorker) -> None:
    mine = new_key(redis_url, "mine", "--models", "fake")
    other = new_key(redis_url, "other", "--models", "elsewhere", "--tenant", "acme")
    operator = new_key(redis_url, "ops", "--operator")
    with open_client(gateway, api_key=mine) as client:
        done = client.completions.create(model="fake", prompt="x")
    with open_client(gateway, api_key=other) as client:
        assert list(client.models.list()) == []
        with pytest.raises(openai.PermissionDeniedError) as error:
            client.completions.create(model="fake", prompt="x")
    assert error.value.code == "model_not_allowed"

    def status(path: str, key: str) -> int:
        return httpx.get(f"{gateway.url}{path}", headers={"authorization": f"bearer {key}"}).status_code

    assert [status(f"/v1/jobs/{done.id}", key) for key in (mine, other, operator)] == [200, 404, 200]
    assert [status("/metrics", key) for key in (mine, operator)] == [403, 200]
    assert httpx.get(f"{gateway.url}/health").status_code == 200


def test_a_key_sees_its_own_files_alone_and_an_operator_everybodys(redis_url: str, gateway: RunningGateway) -> None:
    names = ("mine", "other", "ops")
    keys = [new_key(redis_url, name, *["--operator"] * (name == "ops")) for name in names]
    clients = [open_client(gateway, api_key=key) for key in keys]
    mine, other, operator = clients
    kept = mine.files.create(file=("a.jsonl", b"{}\n"), purpose="batch")
    assert [len(list(client.files.list())) for client in clients] == [1, 0, 1]
    for call in (other.files.retrieve, other.files.content, other.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(kept.id)
    assert operator.files.content(kept.id).content == b"{}\n"
    assert httpx.get(f"{gateway.url}/v1/files").status_code == 401
    assert httpx.post(f"{gateway.url}/v1/files", files={"file": ("a", b"{}")}).status_code == 401
    assert mine.files.delete(kept.id).deleted and list(operator.files.list()) == []
    for client in clients:
        client.close()


def test_who_gives_no_key_is_an_operator_only_where_there_are_none(
    redis_url: str, start_gateway: StartGateway, echoing: FakeWorker
) -> None:
    def statuses() -> list[int]:
        url = start_gateway(allow_anonymous=True).url  # one that has not asked for keys yet
        return [httpx.get(url + path).status_code for path in ("/v1/models", "/metrics")]

    assert statuses() == [200, 200]
    new_key(redis_url, "mine")
    assert statuses() == [200, 403]


def test_a_keys_tenant_is_its_jobs_tenant(redis_url: str, gateway: RunningGateway, worker: FakeWorker) -> None:
    key = new_key(redis_url, "acme", "--tenant", "acme")
    with open_client(gateway, api_key=key) as client:
        with pytest.raises(openai.PermissionDeniedError):
            client.completions.create(model="fake", prompt="x", extra_body={"tenant": "rival"})
        stream = client.completions.create(model="fake", prompt="x", stream=True)
        assert worker.connection.llen("rq:queue:promptmill@acme") == 1
        stream.close()


async def test_a_key_that_was_revoked_is_taken_for_five_seconds_at_most(
    transport: AsyncTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(key_ring, "time", clock)
    ring = key_ring.KeyRing(transport)
    key, text = make_key(name="mine")
    await transport.run(add_key(key))
    assert await ring.find(text) == key and not await ring.is_empty()
    await transport.run(revoke_key(key.id))
    clock.now += 4.9
    assert await ring.find(text) == key and not await ring.is_empty()
    clock.now += 0.1
    assert await ring.find(text) is None and await ring.is_empty()
