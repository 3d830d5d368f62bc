"""The I/O operations of the client's protocols, so that one protocol serves both `Client` and `AsyncClient`.

A protocol is a generator: it yields an operation and is sent its reply. It does no I/O itself; the transports
(`producer.transport`, `producer.async_transport`) carry the operations out. All writes of the client are idempotent, so
when a reply is lost they are sent again. (The exception is what the gateway counts against a key's limit, which is
counted twice then; see `producer.gateway.rate_limits`.)
"""

import hashlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from producer.errors import RedisUnavailableError

Command = tuple[Any, ...]  # a Redis command and its arguments
T = TypeVar("T")

SEND_RETRY_DELAYS = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds before each new try of one exchange
CONNECT_PATIENCE_SECONDS = 4.0  # when nothing answers: each try to connect takes seconds
RECONNECT_MAX_DELAY_SECONDS = 2.0
RECONNECT_SECONDS = 60.0  # how long a waiting client tries to reconnect


class ConnectionLost(RedisUnavailableError):
    """The exchange may or may not have happened; trying again may help. Protocols catch it, and give up after a
    while."""


class NoConnection(ConnectionLost):
    """No connection could be made, so nothing was sent."""


@dataclass(frozen=True, slots=True)
class Send:
    """Commands in one round trip. Reply: the list of their replies; an error reply is raised."""

    commands: Sequence[Command]


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Subscribe to these channels instead of any others. Reply: None, once Redis has acknowledged every one."""

    channels: Sequence[str]


@dataclass(slots=True)  # not frozen, like Emit: one is made for each token
class Receive:
    """Wait up to `timeout` seconds for a published message. Reply: its payload as bytes, or None."""

    timeout: float


@dataclass(frozen=True, slots=True)
class Sleep:
    seconds: float


@dataclass(frozen=True, slots=True)
class ReadObjects:
    """Read objects of the result store in parallel. Reply: an `ObjectRead` (`producer.stored_results`) for each, in the
    same order."""

    urls: Sequence[str]


@dataclass(slots=True)
class Emit:
    """Give `value` to the caller that iterates over the protocol. Reply: None, once the next value is asked for."""

    value: Any


Operation = Send | Subscribe | Receive | Sleep | ReadObjects | Emit
Protocol = Generator[Operation, Any, T]


class Script:
    """A Lua script as commands: each round trip loads it first, so Redis always knows it."""

    def __init__(self, body: str) -> None:
        self.load: Command = ("SCRIPT LOAD", body)
        self._sha = hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str], arguments: Sequence[Any]) -> Command:
        return ("EVALSHA", self._sha, len(keys), *keys, *arguments)

    def run(self, keys: Sequence[str], arguments: Sequence[Any]) -> Protocol[Any]:
        """Run the script and return its reply. Raises RedisUnavailableError as `send` does."""
        [_, reply] = yield from send(self.load, self.call(keys, arguments))
        return reply


def slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Slices of at most `size` items, for when all would be too much for one exchange."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def send(*commands: Command) -> Protocol[list[Any]]:
    """Send idempotent commands, again when the reply is lost. Raises RedisUnavailableError after the last try."""
    gives_up_at = time.monotonic() + CONNECT_PATIENCE_SECONDS
    for delay in SEND_RETRY_DELAYS:
        try:
            return (yield Send(commands))  # type: ignore[no-any-return]
        except ConnectionLost as lost:
            if isinstance(lost, NoConnection) and time.monotonic() >= gives_up_at:
                raise
            yield Sleep(delay)
    return (yield Send(commands))  # type: ignore[no-any-return]


class Reconnect:
    """Growing delays while Redis is unreachable, up to a limit that is short until it was reached once, then long."""

    def __init__(self) -> None:
        self._patience_seconds = sum(SEND_RETRY_DELAYS)
        self._delay_seconds = SEND_RETRY_DELAYS[0]
        self._away_since: float | None = None

    def succeed(self) -> None:
        self._patience_seconds = RECONNECT_SECONDS
        self._delay_seconds = SEND_RETRY_DELAYS[0]
        self._away_since = None

    def wait(self, lost: ConnectionLost) -> Protocol[None]:
        """Sleep before the next try. Raises `lost` once the limit is reached."""
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
        if now - self._away_since >= self._patience_seconds:
            raise lost
        yield Sleep(self._delay_seconds)
        self._delay_seconds = min(self._delay_seconds * 2, RECONNECT_MAX_DELAY_SECONDS)
