"""Carries out the operations of `producer.operations` with redis-py's blocking client. Knows nothing about jobs."""

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import redis

from producer.errors import ClientClosedError, PromptmillError
from producer.operations import Command, Emit, Operation, Protocol, ReadObjects, Receive, Send, Sleep, Subscribe, T
from producer.redis_connection import CONNECTION_OPTIONS, REPLY_TIMEOUT_SECONDS, close, connect, translate
from producer.settings import ProducerSettings
from producer.stored_results import read_objects


class Transport:
    """The blocking transport. Thread-safe: every run takes its own connections from the pool."""

    def __init__(self, url: str, s3_endpoint_url: str | None = None) -> None:
        self.url = url
        self._s3_endpoint_url = s3_endpoint_url
        self._is_closed = False
        self._redis = connect(url, CONNECTION_OPTIONS)

    def close(self) -> None:
        """Close the connections. Running and later protocols end with ClientClosedError."""
        self._is_closed = True
        close(self._redis)

    def run(self, protocol: Protocol[T]) -> T:
        """Run the protocol and return its value; what it emits is dropped."""
        runner = self._drive(protocol)
        while True:
            try:
                next(runner)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

    def iterate(self, protocol: Protocol[None]) -> Generator[Any, None, None]:
        """Iterate over what the protocol emits. Closing the iterator ends the protocol and its subscription."""
        return self._drive(protocol)

    def _drive(self, protocol: Protocol[T]) -> Generator[Any, None, T]:
        session = _Session(self._redis, self.url, self._s3_endpoint_url)
        reply: Any = None
        failure: PromptmillError | None = None
        try:
            while True:
                try:
                    operation = protocol.throw(failure) if failure is not None else protocol.send(reply)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                reply, failure = None, None
                if isinstance(operation, Emit):
                    yield operation.value
                    continue
                if self._is_closed:  # redis-py would connect again
                    raise ClientClosedError
                try:
                    reply = session.perform(operation)
                except PromptmillError as error:
                    failure = error
        finally:
            protocol.close()
            session.close()


def run_once(settings: ProducerSettings, protocol: Protocol[T]) -> T:
    """Run a single protocol on its own transport and return its value."""
    with closing(Transport(settings.redis_url, settings.s3_endpoint_url)) as transport:
        return transport.run(protocol)


class _Session:
    """One run of a protocol: at most one subscription."""

    def __init__(self, connection: redis.Redis, url: str, s3_endpoint_url: str | None) -> None:
        self._redis = connection
        self._url = url
        self._s3_endpoint_url = s3_endpoint_url
        self._pubsub: redis.client.PubSub | None = None

    def perform(self, operation: Operation) -> Any:
        """Carry out one operation and return its reply. Raises ConnectionLost if trying again may help, else another
        PromptmillError."""
        match operation:
            case Sleep(seconds):
                return time.sleep(seconds)
            case ReadObjects(urls):
                return read_objects(urls, self._s3_endpoint_url)
        try:
            match operation:
                case Send(commands):
                    return self._send(commands)
                case Subscribe(channels):
                    return self._subscribe(channels)
                case Receive(timeout):
                    return self._receive(timeout)
        except (redis.RedisError, OSError) as error:
            raise translate(error, self._url) from error
        raise AssertionError(f"no operation of a transport: {operation!r}")

    def close(self) -> None:
        if self._pubsub is not None:
            self._pubsub.close()
            self._pubsub = None

    def _send(self, commands: Sequence[Command]) -> list[Any]:
        with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            return list(pipeline.execute())

    def _subscribe(self, channels: Sequence[str]) -> None:
        self.close()
        self._pubsub = self._redis.pubsub()  # type: ignore[no-untyped-call]
        self._pubsub.subscribe(*channels)
        num_acknowledged = 0
        while num_acknowledged < len(channels):  # drops messages in between: subscribers poll next
            message = self._pubsub.get_message(timeout=REPLY_TIMEOUT_SECONDS)
            if message is None:
                raise redis.TimeoutError("no acknowledgement of SUBSCRIBE")
            num_acknowledged += message["type"] == "subscribe"

    def _receive(self, timeout: float) -> bytes | None:
        assert self._pubsub is not None, "Receive comes after Subscribe"
        message = self._pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout)
        return message["data"] if message is not None and message["type"] == "message" else None
