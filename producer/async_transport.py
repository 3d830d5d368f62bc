"""Carries out the operations of `producer.operations` with redis-py's asyncio client. Knows nothing about jobs."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import redis
import redis.asyncio

from producer.channel_hub import ChannelHub, Mailbox, num_cancels
from producer.errors import ClientClosedError, PromptmillError
from producer.operations import Command, Emit, Operation, Protocol, ReadObjects, Receive, Send, Sleep, Subscribe, T
from producer.redis_connection import CONNECTION_OPTIONS, REPLY_TIMEOUT_SECONDS, make_async_pool, translate
from producer.stored_results import read_objects


class AsyncTransport:
    """The asyncio transport. Belongs to the event loop in which it is first used."""

    def __init__(self, url: str, s3_endpoint_url: str | None = None) -> None:
        self.url = url
        self._s3_endpoint_url = s3_endpoint_url
        self._is_closed = False
        pool = make_async_pool(url, CONNECTION_OPTIONS)
        self._redis = redis.asyncio.Redis.from_pool(pool)
        self._hub = ChannelHub(pool, reply_timeout_seconds=REPLY_TIMEOUT_SECONDS)

    async def aclose(self) -> None:
        """Close the connections. Running and later protocols end with ClientClosedError."""
        self._is_closed = True
        await self._hub.aclose()
        await self._redis.aclose()
        manager = getattr(self._redis.connection_pool, "sentinel_manager", None)
        for sentinel in manager.sentinels if manager is not None else ():
            await sentinel.aclose()

    async def run(self, protocol: Protocol[T]) -> T:
        """Run the protocol and return its value; what it emits is dropped."""
        ended: list[T] = []
        async for _ in self._drive(protocol, ended):
            pass
        return ended[0]

    def iterate(self, protocol: Protocol[None]) -> AsyncGenerator[Any, None]:
        """Iterate over what the protocol emits. Closing the iterator ends the protocol and its subscription."""
        return self._drive(protocol, [])

    async def _drive(self, protocol: Protocol[T], ended: list[T]) -> AsyncGenerator[Any, None]:
        session = _AsyncSession(self._redis, self._hub, self.url, self._s3_endpoint_url)
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
                if self._is_closed:  # redis-py would connect again
                    raise ClientClosedError
                try:
                    if isinstance(operation, Receive):  # the most frequent operation: one for each token
                        reply = await session.receive(operation.timeout)
                    else:
                        reply = await session.perform(operation)
                except PromptmillError as error:
                    failure = error
        finally:
            protocol.close()
            session.close()


class _AsyncSession:
    """One run of a protocol: at most one subscription."""

    def __init__(self, connection: redis.asyncio.Redis, hub: ChannelHub, url: str, s3_endpoint_url: str | None) -> None:
        self._redis = connection
        self._hub = hub
        self._url = url
        self._s3_endpoint_url = s3_endpoint_url
        self._mailbox: Mailbox | None = None

    async def perform(self, operation: Operation) -> Any:
        """Carry out one operation and return its reply. Raises ConnectionLost if trying again may help, else another
        PromptmillError."""
        cancels = num_cancels()
        try:
            return await self._carry_out(operation)
        finally:
            if num_cancels() > cancels:  # swallowed by redis-py; an earlier one is the caller's own, who cleans up
                raise asyncio.CancelledError

    async def receive(self, timeout: float) -> bytes | None:
        """Raises ConnectionLost."""
        assert self._mailbox is not None, "Receive comes after Subscribe"
        try:
            return await self._mailbox.get(timeout)
        except redis.ConnectionError as error:
            raise translate(error, self._url) from error

    def close(self) -> None:
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None

    async def _carry_out(self, operation: Operation) -> Any:
        match operation:
            case Sleep(seconds):
                return await asyncio.sleep(seconds)
            case ReadObjects(urls):
                return await asyncio.to_thread(read_objects, urls, self._s3_endpoint_url)
        try:
            match operation:
                case Send(commands):
                    return await self._send(commands)
                case Subscribe(channels):
                    return await self._subscribe(channels)
        except (redis.RedisError, OSError) as error:
            raise translate(error, self._url) from error
        raise AssertionError(f"no operation of a session: {operation!r}")

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            return list(await pipeline.execute())

    async def _subscribe(self, channels: Sequence[str]) -> None:
        self.close()
        self._mailbox = await self._hub.subscribe(channels)
