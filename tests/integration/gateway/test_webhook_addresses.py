"""Webhooks and the addresses they go to: checked when they are sent, whatever a name said before."""

import redis

from producer.async_transport import AsyncTransport
from producer.deliveries import BATCHES, list_deliveries
from producer.gateway.webhooks.targets import TargetRules
from tests.fakes.waiting import eventually
from tests.fakes.webhook_dispatching import add, dispatching, next_of, tell
from tests.fakes.webhook_receiver import receiving

Redis = redis.Redis


async def test_a_private_address_is_refused_when_it_is_called(transport: AsyncTransport, redis_client: Redis) -> None:
    with receiving() as receiver:
        await add(transport, receiver.url)  # registered while private targets were allowed
        await tell(transport, "batch_1")
        async with dispatching(transport, allows_private=False, delay_after=lambda attempt, _: None):
            await eventually(lambda: redis_client.zcard(BATCHES.dead))
    [dead] = await transport.run(list_deliveries())
    assert "not a public address" in dead.error and receiver.num_received == 0


async def test_a_name_that_turns_private_after_its_registration_is_refused(
    transport: AsyncTransport, redis_client: Redis
) -> None:
    answers = [["93.184.216.34"], ["127.0.0.1"], ["93.184.216.34", "127.0.0.1"]]

    async def rebind(host: str, port: int) -> list[str]:
        return answers.pop(0)

    rules = TargetRules(allows_private=False, resolve=rebind)
    with receiving() as receiver:
        url = f"http://rebinding.example:{receiver.port}/"
        await rules.check(url)
        await add(transport, url)
        await tell(transport, "batch_1")
        last = {1: 0.0}
        async with dispatching(transport, allows_private=False, resolve=rebind, delay_after=lambda n, _: last.get(n)):
            await eventually(lambda: redis_client.zcard(BATCHES.dead))
    assert answers == [] and receiver.num_received == 0


async def test_a_request_goes_to_the_address_that_was_checked(transport: AsyncTransport) -> None:
    asked: list[str] = []

    async def resolve_once(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]  # the system itself has no address for this name

    with receiving() as receiver:
        await add(transport, f"http://receiver.invalid:{receiver.port}/deep/path?x=1")
        await tell(transport, "batch_1")
        async with dispatching(transport, resolve=resolve_once):
            got = await next_of(receiver)
    assert asked == ["receiver.invalid"]
    assert got.headers["host"] == f"receiver.invalid:{receiver.port}"
    assert got.path == "/deep/path?x=1"


async def test_the_next_address_is_tried_where_one_does_not_answer(transport: AsyncTransport) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.99", "127.0.0.1"]  # nobody listens at the first

    with receiving() as receiver:
        await add(transport, f"http://receiver.invalid:{receiver.port}/")
        await tell(transport, "batch_1")
        async with dispatching(transport, resolve=resolve):
            await next_of(receiver)
