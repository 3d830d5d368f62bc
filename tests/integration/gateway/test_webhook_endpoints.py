"""Webhook endpoints through OpenAI's client, unmodified, and through `promptmill webhooks`."""

import asyncio
import json
from typing import Any

import openai
import pytest
import redis

from producer.deliveries import BATCHES
from producer.gateway.api_keys import add_key, make_key
from producer.gateway.webhooks.endpoints import DISABLED_KEY, MAX_ENDPOINTS_A_KEY
from producer.gateway.webhooks.outbox import EVENT_TYPES, OUTBOX_KEY, Event
from producer.operations import send
from producer.transport import Transport
from tests.fakes.command_line import Invoke
from tests.fakes.gateways import RunningGateway, StartGateway, open_client
from tests.fakes.waiting import wait_until
from tests.fakes.webhook_receiver import Reply, receiving


@pytest.fixture
def gateway(start_gateway: StartGateway) -> RunningGateway:
    return start_gateway(webhook_private_targets=True)


def tell(redis_url: str, batch_id: str, key_id: str | None = None) -> Event:
    event = Event.of("batch.completed", batch_id, key_id=key_id, created_at=1_700_000_000)
    transport = Transport(redis_url)
    transport.run(send(("RPUSH", OUTBOX_KEY, event.to_wire())))
    transport.close()
    return event


def new_key(redis_url: str, **fields: object) -> tuple[str, str]:
    """Its id, and its text."""
    key, text = make_key(name="test", **fields)
    transport = Transport(redis_url)
    transport.run(add_key(key))
    transport.close()
    return key.id, text


def test_an_endpoint_made_by_openais_client_is_told(redis_url: str, client: openai.OpenAI) -> None:
    with receiving() as receiver:
        endpoint = client.webhooks.create(
            name="mine", url=receiver.url, event_types=["batch.completed", "batch.failed"]
        )
        event = tell(redis_url, "batch_1")
        got = receiver.next()
    accepted = client.webhooks.unwrap(got.body, got.headers, secret=endpoint.signing_secret)
    assert (accepted.id, accepted.type) == (event.id, "batch.completed")
    assert endpoint.id.startswith("we_") and endpoint.signing_secret.startswith("whsec_")
    assert endpoint.signing_secret_hint == f"whsec_…{endpoint.signing_secret[-4:]}"


def test_every_call_of_openais_client_has_its_answer(client: openai.OpenAI) -> None:
    with receiving(lambda number: Reply(418)) as receiver:
        made = client.webhooks.create(name="mine", url=receiver.url, event_types=["batch.completed"])
        tried = client.webhooks.test(made.id, event_type="batch.expired")
        got = receiver.next()
    assert (tried.status_code, tried.event_type, tried.webhook_endpoint_id) == (418, "batch.expired", made.id)
    assert client.webhooks.unwrap(got.body, got.headers, secret=made.signing_secret).type == "batch.expired"
    assert client.webhooks.retrieve(made.id).url == receiver.url
    changed = client.webhooks.update(made.id, name="other", event_types=["batch.failed"])
    assert (changed.name, changed.event_types, changed.url) == ("other", ["batch.failed"], receiver.url)
    rotated = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    assert rotated.signing_secret != made.signing_secret
    assert list(client.webhooks.event_types.list().data) == list(EVENT_TYPES)
    with pytest.raises(openai.BadRequestError, match="could not be reached"):
        client.webhooks.test(made.id, event_type="batch.completed")  # the receiver has stopped
    assert client.webhooks.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no webhook endpoint"):
        client.webhooks.retrieve(made.id)


def test_endpoints_are_listed_page_by_page_the_newest_first(client: openai.OpenAI) -> None:
    made = [
        client.webhooks.create(name=f"n{number}", url="http://127.0.0.1/", event_types=["batch.failed"]).id
        for number in range(5)
    ]
    page = client.webhooks.list(limit=2)
    assert len(page.data) == 2 and page.has_next_page()
    assert sorted(endpoint.id for endpoint in client.webhooks.list(limit=2)) == sorted(made)
    assert all(not hasattr(endpoint, "signing_secret") for endpoint in page.data)
    with pytest.raises(openai.BadRequestError, match="after"):
        client.webhooks.list(after="we_none")


async def test_the_asynchronous_client_gets_the_same(gateway: RunningGateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        made = await client.webhooks.create(name="mine", url="http://127.0.0.1/", event_types=["batch.completed"])
        assert [endpoint.id async for endpoint in client.webhooks.list()] == [made.id]


def test_a_key_has_its_own_endpoints_and_an_operator_sees_them_all(redis_url: str, gateway: RunningGateway) -> None:
    mine, others = new_key(redis_url), new_key(redis_url)
    _, operator = new_key(redis_url, is_operator=True)
    with receiving() as receiver, receiving() as operators:
        with open_client(gateway, api_key=mine[1]) as client:
            own = client.webhooks.create(name="mine", url=receiver.url, event_types=["batch.completed"])
        with open_client(gateway, api_key=others[1]) as client:
            assert list(client.webhooks.list()) == []
            with pytest.raises(openai.NotFoundError):
                client.webhooks.retrieve(own.id)
            with pytest.raises(openai.NotFoundError):
                client.webhooks.delete(own.id)
        with open_client(gateway, api_key=operator) as client:
            client.webhooks.create(name="all", url=operators.url, event_types=["batch.completed"])
            assert len(list(client.webhooks.list())) == 2
        tell(redis_url, "batch_others", others[0])
        tell(redis_url, "batch_mine", mine[0])
        assert {json.loads(operators.next().body)["data"]["id"] for _ in range(2)} == {"batch_mine", "batch_others"}
        assert json.loads(receiver.next().body)["data"]["id"] == "batch_mine"
    assert receiver.num_received == 1


def test_who_has_no_key_has_no_endpoints(redis_url: str, start_gateway: StartGateway) -> None:
    new_key(redis_url)
    options = {"default_headers": {"authorization": ""}}
    with (
        open_client(start_gateway(allow_anonymous=True), **options) as client,
        pytest.raises(openai.PermissionDeniedError, match="need an API key"),
    ):
        client.webhooks.list()


def test_targets_are_checked_when_an_endpoint_is_made_or_changed(start_gateway: StartGateway) -> None:
    with open_client(start_gateway()) as client:
        for url in ("http://127.0.0.1/", "http://2130706433/", "http://[::ffff:127.0.0.1]/", "http://localhost/"):
            with pytest.raises(openai.BadRequestError, match="not a public address") as refused:
                client.webhooks.create(name="x", url=url, event_types=["batch.completed"])
            assert refused.value.param == "url"
        made = client.webhooks.create(name="x", url="http://8.8.8.8/", event_types=["batch.completed"])
        with pytest.raises(openai.BadRequestError, match="not a public address"):
            client.webhooks.update(made.id, url="http://10.0.0.1/")
        assert client.webhooks.retrieve(made.id).url == "http://8.8.8.8/"


def test_bad_fields_are_named(client: openai.OpenAI) -> None:
    def refuse(**fields: Any) -> str | None:
        with pytest.raises(openai.BadRequestError) as refused:
            client.webhooks.create(
                **{"name": "x", "url": "http://127.0.0.1/", "event_types": [EVENT_TYPES[0]], **fields}
            )
        return refused.value.param

    assert refuse(event_types=["response.completed"]) == "event_types.0"
    assert refuse(event_types=[]) == "event_types"
    assert refuse(name="") == "name"
    assert refuse(extra_body={"secret": "mine"}) == "secret"


def test_a_key_has_no_more_endpoints_than_it_may(redis_url: str, gateway: RunningGateway) -> None:
    _, text = new_key(redis_url)
    with open_client(gateway, api_key=text) as client:
        for _ in range(MAX_ENDPOINTS_A_KEY):
            client.webhooks.create(name="x", url="http://127.0.0.1/", event_types=["batch.completed"])
        with pytest.raises(openai.BadRequestError, match="as many as a key may have"):
            client.webhooks.create(name="x", url="http://127.0.0.1/", event_types=["batch.completed"])


def test_the_command_line_makes_lists_rotates_and_removes(
    redis_url: str, gateway: RunningGateway, promptmill: Invoke
) -> None:
    key_id, _ = new_key(redis_url)
    with receiving() as receiver:
        arguments = ("webhooks", "add", receiver.url, "--events", "batch.completed,batch.failed", "--key", key_id)
        added = promptmill(*arguments, "--webhook-private-targets")
        endpoint_id, secret = added.stdout.split()
        tell(redis_url, "batch_1", key_id)
        got = receiver.next()
        assert openai.OpenAI(api_key="none").webhooks.unwrap(got.body, got.headers, secret=secret)
        tried = promptmill("webhooks", "test", endpoint_id, "--webhook-private-targets")
        assert tried.stdout == f"{receiver.url} answered 204\n"
    [listed] = json.loads(promptmill("webhooks", "list", "--json").stdout)
    assert (listed["id"], listed["key_id"], listed["is_disabled"]) == (endpoint_id, key_id, False)
    assert "secret" not in json.dumps(listed)
    assert f"key={key_id}" in promptmill("webhooks", "list").stdout
    assert promptmill("webhooks", "rotate", endpoint_id, "--keep-old").stdout.startswith("whsec_")
    assert promptmill("webhooks", "remove", endpoint_id).exit_code == 0
    assert json.loads(promptmill("webhooks", "list", "--json").stdout) == []
    assert promptmill("webhooks", "list").stdout == "there is no endpoint\n"


def test_the_command_line_refuses_what_is_wrong_and_says_the_remedy(promptmill: Invoke) -> None:
    def refused(*arguments: str) -> str:
        result = promptmill("webhooks", *arguments)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    assert "--webhook-private-targets" in refused("add", "http://127.0.0.1/")
    assert "promptmill keys list" in refused("add", "http://8.8.8.8/", "--key", "none")
    assert "--events" in refused("add", "http://8.8.8.8/", "--events", "batch.begun")
    for command in ("remove", "rotate", "enable", "test"):
        assert "promptmill webhooks list" in refused(command, "we_none")
    assert "promptmill webhooks deliveries" in refused("retry", "none")


def test_the_command_line_shows_and_revives_what_came_to_nothing(
    redis_url: str, gateway: RunningGateway, promptmill: Invoke, redis_client: redis.Redis
) -> None:
    with receiving(lambda number: Reply(410 if number == 1 else 200)) as receiver:
        added = promptmill("webhooks", "add", receiver.url, PROMPTMILL_WEBHOOK_PRIVATE_TARGETS="true")
        endpoint_id = added.stdout.split()[0]
        event = tell(redis_url, "batch_1")
        wait_until(lambda: redis_client.zcard(BATCHES.dead))
        assert "disabled" in promptmill("webhooks", "list").stdout
        [shown] = json.loads(promptmill("webhooks", "deliveries", "--json").stdout)
        assert (shown["status"], shown["attempts"], shown["error"]) == ("dead", 1, "answered 410")
        assert f"{event.id}:{endpoint_id}  dead  attempts=1" in promptmill("webhooks", "deliveries").stdout
        assert "is called again" in promptmill("webhooks", "enable", endpoint_id).stdout
        assert not redis_client.exists(DISABLED_KEY)
        assert promptmill("webhooks", "retry", "--all").exit_code == 0
        wait_until(lambda: receiver.num_received == 2)
        wait_until(lambda: promptmill("webhooks", "deliveries").stdout == "no delivery waits, and none was given up\n")


async def test_two_who_change_an_endpoint_at_once_do_not_lose_a_change(gateway: RunningGateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        made = await client.webhooks.create(name="n", url="http://127.0.0.1/", event_types=["batch.completed"])
        rotations = [client.webhooks.rotate_secret(made.id) for _ in range(8)]
        answers = await asyncio.gather(*rotations, return_exceptions=True)
        secrets = [answer.signing_secret for answer in answers if not isinstance(answer, BaseException)]
        assert all(isinstance(answer, openai.ConflictError) for answer in answers if isinstance(answer, BaseException))
        hint = (await client.webhooks.retrieve(made.id)).signing_secret_hint
        assert hint is not None and hint[-4:] in [secret[-4:] for secret in secrets]
