"""One pub/sub connection for all subscriptions of an asyncio client. Knows nothing about jobs.

Each subscriber has a mailbox, which it gets once Redis has acknowledged its channels: a subscriber that reads the
stored entries after that misses nothing. Messages are dropped when a subscriber is slow, and a lost connection loses
messages of all subscribers. Subscribers notice both, by a gap in the entries' ids or by polling, and subscribe again.
"""

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import redis
import redis.asyncio

from producer.end_tasks import end_tasks
from producer.redis_replies import replies_at_hand

MAX_WAITING_MESSAGES = 1024  # of one subscriber; the oldest are dropped first
SILENCE_SECONDS = 30.0  # then the connection is asked whether it still lives
LEAVE_SECONDS = 0.5  # in which closed mailboxes share one UNSUBSCRIBE: most of their channels are silent by then


class Mailbox:
    """The messages published on the channels of one subscription. `close()` ends it at once, without awaiting."""

    def __init__(self, hub: "ChannelHub", channels: Sequence[bytes]) -> None:
        self._hub = hub
        self.channels = channels
        self._messages: deque[bytes] = deque(maxlen=MAX_WAITING_MESSAGES)
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waits_until = 0.0  # on the loop's clock
        self._lost: str | None = None

    async def get(self, timeout: float) -> bytes | None:
        """The next message, or None after `timeout` seconds. Raises redis.ConnectionError after a lost connection."""
        if not self._messages and self._lost is None and timeout > 0:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            self._wait_until(loop, loop.time() + timeout)
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._messages:
            return self._messages.popleft()
        if self._lost is not None:
            raise redis.ConnectionError(self._lost)
        return None

    def put(self, message: bytes) -> None:
        self._messages.append(message)
        self._wake()

    def lose(self, reason: str) -> None:
        self._lost = reason
        self._wake()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._hub.leave(self)

    def _wait_until(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        """Set the timer of a wait. Most messages come long before it, so the timer of one wait is kept for the next
        ones."""
        self._waits_until = at
        if self._timer is None or self._timer.when() > at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_at(at, self._on_timer, loop)

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._waiter is None:
            return
        if loop.time() < self._waits_until:
            self._wait_until(loop, self._waits_until)
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Channel:
    """A channel with subscribers. `acknowledged` is done once Redis has confirmed the subscription."""

    def __init__(self) -> None:
        self.mailboxes: set[Mailbox] = set()
        self.acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class ChannelHub:
    """Belongs to the event loop it is first used in. Connects with the first subscription, and again after a loss."""

    def __init__(self, pool: redis.asyncio.ConnectionPool, *, reply_timeout_seconds: float) -> None:
        self._pool = pool
        self._reply_timeout_seconds = reply_timeout_seconds
        self._channels: dict[bytes, _Channel] = {}
        self._unacknowledged: dict[bytes, deque[asyncio.Future[None]]] = {}  # in the order of the SUBSCRIBEs sent
        self._outgoing: list[tuple[str, bytes]] = []
        self._has_outgoing = asyncio.Event()
        self._leaving: asyncio.TimerHandle | None = None
        self._num_received = 0
        self._task: asyncio.Task[None] | None = None

    async def subscribe(self, names: Sequence[str]) -> Mailbox:
        """Returns once Redis has acknowledged every channel. Raises redis.RedisError or OSError."""
        mailbox = Mailbox(self, [name.encode() for name in names])
        channels = [self._join(name, mailbox) for name in mailbox.channels]
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="channel-hub")
        try:
            async with asyncio.timeout(self._reply_timeout_seconds):
                for channel in channels:
                    await asyncio.shield(channel.acknowledged)
        except TimeoutError as error:
            mailbox.close()
            raise redis.TimeoutError("no acknowledgement of SUBSCRIBE") from error
        except BaseException:
            mailbox.close()
            raise
        return mailbox

    def leave(self, mailbox: Mailbox) -> None:
        for name in mailbox.channels:
            channel = self._channels.get(name)
            if channel is not None and mailbox in channel.mailboxes:
                channel.mailboxes.discard(mailbox)
                if not channel.mailboxes:
                    del self._channels[name]
                    self._outgoing.append(("UNSUBSCRIBE", name))
                    if self._leaving is None:
                        self._leaving = asyncio.get_running_loop().call_later(LEAVE_SECONDS, self._has_outgoing.set)

    def _end_leaving(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    async def aclose(self) -> None:
        self._end_leaving()
        if self._task is not None:
            await end_tasks(self._task)
            self._task = None

    def _join(self, name: bytes, mailbox: Mailbox) -> _Channel:
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = _Channel()
            self._unacknowledged.setdefault(name, deque()).append(channel.acknowledged)
            self._outgoing.append(("SUBSCRIBE", name))
            self._has_outgoing.set()
        channel.mailboxes.add(mailbox)
        return channel

    async def _run(self) -> None:
        """One connection, from its opening to its loss."""
        connection = None
        reason = "the client was closed"
        try:
            connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write(connection))
                tasks.create_task(self._read(connection))
                tasks.create_task(self._break_silence(connection))
        except* (redis.RedisError, OSError, AttributeError) as lost:  # the last where redis-py sends on what it closed
            reason = str(lost.exceptions[0])
        finally:
            try:
                if connection is not None:
                    with suppress(redis.RedisError):  # over TLS, a peer that is gone takes no leave
                        await connection.disconnect()
                    await self._pool.release(connection)
            finally:
                self._lose_all(reason)  # last: whoever subscribes from here on begins anew

    async def _write(self, connection: Any) -> None:
        """Send the waiting SUBSCRIBEs and UNSUBSCRIBEs in order; neighbours of one kind share a command."""
        while not num_cancels():
            await self._has_outgoing.wait()
            self._has_outgoing.clear()
            self._end_leaving()
            outgoing, self._outgoing = self._outgoing, []
            while outgoing:
                command = outgoing[0][0]
                size = next((at for at, (other, _) in enumerate(outgoing) if other != command), len(outgoing))
                await connection.send_command(command, *(name for _, name in outgoing[:size]), check_health=False)
                del outgoing[:size]

    async def _read(self, connection: Any) -> None:
        while not num_cancels():
            self._take(await connection.read_response(timeout=math.inf))  # a timeout for each message would cost more
            for message in replies_at_hand(connection):
                self._take(message)
            self._num_received += 1

    async def _break_silence(self, connection: Any) -> None:
        """Ping a silent connection. Raises redis.TimeoutError if it is dead, which reading alone does not show."""
        while not num_cancels():
            num_before = self._num_received
            await asyncio.sleep(SILENCE_SECONDS)
            if self._num_received != num_before:
                continue
            await connection.send_command("PING", check_health=False)
            await asyncio.sleep(self._reply_timeout_seconds)
            if self._num_received == num_before:
                raise redis.TimeoutError("no answer to PING")

    def _take(self, message: list[Any]) -> None:
        kind, name, payload = message[0], message[1], message[-1]
        if kind == b"message":
            channel = self._channels.get(name)
            for mailbox in channel.mailboxes if channel is not None else ():
                mailbox.put(payload)
        elif kind == b"subscribe":
            waiting = self._unacknowledged[name]
            acknowledged = waiting.popleft()
            if not waiting:
                del self._unacknowledged[name]
            if not acknowledged.done():
                acknowledged.set_result(None)

    def _lose_all(self, reason: str) -> None:
        """Tell all subscribers that the connection is lost; the next one opens a new connection."""
        channels, self._channels = self._channels, {}
        unacknowledged, self._unacknowledged = self._unacknowledged, {}
        self._outgoing.clear()
        for waiting in unacknowledged.values():
            for acknowledged in waiting:
                if not acknowledged.done():
                    acknowledged.set_exception(redis.ConnectionError(reason))
                    acknowledged.exception()  # marks it as retrieved: its waiter may be gone
        for channel in channels.values():
            for mailbox in channel.mailboxes:
                mailbox.lose(reason)


def num_cancels() -> int:
    """How often this task was cancelled. redis-py sends under `asyncio.wait_for`, which before Python 3.12 may swallow
    a cancellation: then nothing is raised, and only this number shows it."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()
