"""Carries out the operations of `producer.operations` over redis-py, in asyncio. Knows nothing of jobs."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from producer.errors import PromptmillError
from producer.operations import Command, Emit, Operation, Protocol, ReadObject, Receive, Send, Sleep, Subscribe, T
from producer.redis_connection import CONNECTION_OPTIONS, REPLY_TIMEOUT_SECONDS, bad_url, translate
from producer.stored_results import read_object


class AsyncTransport:
    """The asyncio half: the same operations, awaited. Belongs to the event loop it is first used in."""

    def __init__(self, url: str, s3_endpoint_url: str | None = None) -> None:
        self.url = url
        self._s3_endpoint_url = s3_endpoint_url
        try:
            self._redis = redis.asyncio.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **CONNECTION_OPTIONS)
        except ValueError as error:
            raise bad_url(url, error) from error

    async def aclose(self) -> None:
        await self._redis.aclose()

    async def run(self, protocol: Protocol[T]) -> T:
        """The protocol's return value; what it emits on the way is dropped."""
        ended: list[T] = []
        async for _ in self._drive(protocol, ended):
            pass
        return ended[0]

    def iterate(self, protocol: Protocol[None]) -> AsyncGenerator[Any, None]:
        """What the protocol emits. Closing the iterator ends the protocol and its subscription."""
        return self._drive(protocol, [])

    async def _drive(self, protocol: Protocol[T], ended: list[T]) -> AsyncGenerator[Any, None]:
        session = _AsyncSession(self._redis, self.url, self._s3_endpoint_url)
        reply: Any = None
        failure: PromptmillError | None = None
        try:
            while True:
                try:
                    operation = protocol.throw(failure) if failure is not None else protocol.send(reply)
                except StopIteration as end:
                    ended.append(end.value)
                    return
                reply, failure = None, None
                if isinstance(operation, Emit):
                    yield operation.value
                    continue
                try:
                    reply = await session.perform(operation)
                except PromptmillError as error:
                    failure = error
        finally:
            protocol.close()
            await session.close()


class _AsyncSession:
    """One run of a protocol: at most one subscription."""

    def __init__(self, connection: redis.asyncio.Redis, url: str, s3_endpoint_url: str | None) -> None:
        self._redis = connection
        self._url = url
        self._s3_endpoint_url = s3_endpoint_url
        self._pubsub: redis.asyncio.client.PubSub | None = None

    async def perform(self, operation: Operation) -> Any:
        """Raises ConnectionLost where trying again may help, another PromptmillError where it will not."""
        match operation:
            case Sleep(seconds):
                return await asyncio.sleep(seconds)
            case ReadObject(url):
                return await asyncio.to_thread(read_object, url, self._s3_endpoint_url)
        try:
            match operation:
                case Send(commands):
                    return await self._send(commands)
                case Subscribe(channels):
                    return await self._subscribe(channels)
                case Receive(timeout):
                    return await self._receive(timeout)
        except (redis.RedisError, OSError) as error:
            raise translate(error, self._url) from error
        raise AssertionError(f"no operation of a transport: {operation!r}")

    async def close(self) -> None:
        if self._pubsub is not None:
            pubsub, self._pubsub = self._pubsub, None
            await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            return list(await pipeline.execute())

    async def _subscribe(self, channels: Sequence[str]) -> None:
        await self.close()
        self._pubsub = self._redis.pubsub()
        await self._pubsub.subscribe(*channels)
        num_acknowledged = 0
        while num_acknowledged < len(channels):  # messages in between are found again: whoever subscribes looks first
            message = await self._pubsub.get_message(timeout=REPLY_TIMEOUT_SECONDS)
            if message is None:
                raise redis.TimeoutError("no acknowledgement of SUBSCRIBE")
            num_acknowledged += message["type"] == "subscribe"

    async def _receive(self, timeout: float) -> bytes | None:
        assert self._pubsub is not None, "Receive comes after Subscribe"
        message = await self._pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout)
        return message["data"] if message is not None and message["type"] == "message" else None
