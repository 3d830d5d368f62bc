"""What the client's protocols ask of the outside world, so that one protocol serves `Client` and `AsyncClient`.

A protocol is a generator: it yields an operation and is sent its reply. It never blocks and knows no socket; the
transports (`producer.transport`) carry the operations out. Everything the client writes may be sent twice without
harm, which is why a lost reply is answered by sending again. (What the gateway counts against a key's limit is counted
twice then; `producer.gateway.rate_limits` says why that may be.)
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
CONNECT_PATIENCE_SECONDS = 4.0  # where nobody answers: each try to connect takes seconds
RECONNECT_MAX_DELAY_SECONDS = 2.0
RECONNECT_SECONDS = 60.0  # how long a waiting client tries to reach a Redis that went away


class ConnectionLost(RedisUnavailableError):
    """The exchange may or may not have happened; trying again may help. Protocols catch it, and give up in the end."""


class NoConnection(ConnectionLost):
    """Nobody answered while a connection was being made: nothing has happened."""


@dataclass(frozen=True, slots=True)
class Send:
    """Commands in one round trip. Reply: the list of their replies; an error reply is raised."""

    commands: Sequence[Command]


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Subscribe to these channels instead of any others. Reply: None, once Redis has acknowledged every one."""

    channels: Sequence[str]


@dataclass(slots=True)  # not frozen, as Emit: there is one for each token
class Receive:
    """Wait up to `timeout` seconds for a published message. Reply: its payload as bytes, or None."""

    timeout: float


@dataclass(frozen=True, slots=True)
class Sleep:
    seconds: float


@dataclass(frozen=True, slots=True)
class ReadObjects:
    """Read objects of the result store, side by side. Reply: an `ObjectRead` (`producer.stored_results`) of each, in
    the same order."""

    urls: Sequence[str]


@dataclass(slots=True)
class Emit:
    """Hand `value` to whoever iterates over the protocol. Reply: None, once the next value is asked for."""

    value: Any


Operation = Send | Subscribe | Receive | Sleep | ReadObjects | Emit
Protocol = Generator[Operation, Any, T]


class Script:
    """A Lua script, as commands: the first of a round trip loads it, so that it is always known."""

    def __init__(self, body: str) -> None:
        self.load: Command = ("SCRIPT LOAD", body)
        self._sha = hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str], arguments: Sequence[Any]) -> Command:
        return ("EVALSHA", self._sha, len(keys), *keys, *arguments)

    def run(self, keys: Sequence[str], arguments: Sequence[Any]) -> Protocol[Any]:
        """Its reply. Raises RedisUnavailableError as `send` does."""
        [_, reply] = yield from send(self.load, self.call(keys, arguments))
        return reply


def slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """So many at a time, where all of them would be too much for one exchange."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def send(*commands: Command) -> Protocol[list[Any]]:
    """Send commands that may run twice, and again when the reply is lost. Raises RedisUnavailableError in the end."""
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
    """Growing delays while Redis is away, and the end of patience: short until it was reached once, then long."""

    def __init__(self) -> None:
        self._patience_seconds = sum(SEND_RETRY_DELAYS)
        self._delay_seconds = SEND_RETRY_DELAYS[0]
        self._away_since: float | None = None

    def succeed(self) -> None:
        self._patience_seconds = RECONNECT_SECONDS
        self._delay_seconds = SEND_RETRY_DELAYS[0]
        self._away_since = None

    def wait(self, lost: ConnectionLost) -> Protocol[None]:
        """Sleep before the next try. Raises `lost` once patience has run out."""
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
        if now - self._away_since >= self._patience_seconds:
            raise lost
        yield Sleep(self._delay_seconds)
        self._delay_seconds = min(self._delay_seconds * 2, RECONNECT_MAX_DELAY_SECONDS)
