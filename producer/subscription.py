"""Follows one job's stream: first the stored chunks, then the published ones, each once and in order, to the end.

Owns the protocol (subscribe, catch up, listen, poll every few seconds) and the two iterators over it. How entries
become chunks is in `producer.stream_reader`; how a job's end is found that was never published is in
`producer.outcome`.
"""

import re
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any, NamedTuple, Self, cast

from producer.contract import NO_REASON, Chunk, Done, EntryId, JobOutcome, Result, Usage, keys
from producer.errors import InvalidJobError, JobFailedError, ResultTimeoutError
from producer.operations import ConnectionLost, Emit, Protocol, Receive, Reconnect, Subscribe, send
from producer.outcome import OutcomeWatch, look_commands, parse_look
from producer.stream_reader import BEGINNING, MAX_ENTRIES_A_READ, Delivery, StreamReader

LOOK_SECONDS = 2.0  # of silence before the stream and the job's status are polled; less often for many streams
LOOKS_A_SECOND = 100  # at most, over all streams of one client: each takes four commands
CURSOR_PATTERN = r"[0-9]{1,9}-[0-9]{1,9}"


class StreamEnd(NamedTuple):
    """Emitted after the last chunk."""

    status: JobOutcome
    usage: Usage
    generation: int = 0


class _Cursor:
    def __init__(self, after: str | None) -> None:
        self._last: EntryId | str = after or BEGINNING
        self.end: StreamEnd | None = None
        """What the stream said behind the last chunk; None before."""
        self.generation = 0
        """Of the last chunk: the attempt in which the job began anew; 0, if it never did."""

    @property
    def last_id(self) -> str:
        """The cursor after the last chunk that was returned."""
        return str(self._last)

    def _hand_out(self, delivery: Delivery) -> Chunk:
        self._last, chunk, self.generation = delivery
        return chunk


class Subscription(_Cursor):
    """The chunks of one job, as an iterator."""

    def __init__(self, chunks: Generator[Delivery | StreamEnd, None, None], after: str | None) -> None:
        super().__init__(after)
        self._deliveries = chunks

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        delivery = next(self._deliveries)
        if isinstance(delivery, StreamEnd):
            self.end = delivery
            delivery = cast(Delivery, next(self._deliveries))  # which raises: nothing follows the end
        return self._hand_out(delivery)

    def close(self) -> None:
        """End the subscription early. The job goes on."""
        self._deliveries.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncSubscription(_Cursor):
    """As `Subscription`, for `async for`."""

    def __init__(self, chunks: AsyncGenerator[Delivery | StreamEnd, None], after: str | None) -> None:
        super().__init__(after)
        self._deliveries = chunks

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        delivery = await anext(self._deliveries)
        if isinstance(delivery, StreamEnd):
            self.end = delivery
            delivery = cast(Delivery, await anext(self._deliveries))  # which raises: nothing follows the end
        return self._hand_out(delivery)

    async def aclose(self) -> None:
        """End the subscription early. The job goes on."""
        await self._deliveries.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def parse_cursor(after: str | None) -> EntryId:
    """The entry id of a `Subscription.last_id`. Raises InvalidJobError."""
    if after is None:
        return BEGINNING
    if not re.fullmatch(CURSOR_PATTERN, after):
        message = f"after: must be the last_id of a subscription, such as '1-17'; got {after!r:.60}"
        raise InvalidJobError(message, param="after")
    return EntryId.parse(after)


class LookPace:
    """How often a client polls each silent stream, depending on how many it follows. Thread-safe."""

    def __init__(self) -> None:
        self.followers: set[object] = set()

    @property
    def seconds(self) -> float:
        return max(LOOK_SECONDS, len(self.followers) / LOOKS_A_SECOND)


def follow(job_id: str, *, after: EntryId, timeout: float | None, pace: LookPace) -> Protocol[None]:
    """Emit a `Delivery` for each chunk after `after`, then a `StreamEnd`. `timeout`: seconds to wait for each chunk.

    Raises JobFailedError after the last chunk of a failed job, JobNotFoundError, ResultTimeoutError, and
    RedisUnavailableError when Redis stays unreachable for too long.
    """
    return _Follower(job_id, after, timeout, pace).run()


class _Follower:
    def __init__(self, job_id: str, after: EntryId, timeout: float | None, pace: LookPace) -> None:
        self._job_id = job_id
        self._key = keys.stream_key(job_id)
        self._timeout = timeout
        self._pace = pace
        self._reader = StreamReader(job_id, after)
        self._watch = OutcomeWatch(job_id)
        self._reconnect = Reconnect()
        self._has_ended = False
        self._waiting_since = time.monotonic()

    def run(self) -> Protocol[None]:
        self._pace.followers.add(self)
        try:
            yield from self._run()
        finally:
            self._pace.followers.discard(self)

    def _run(self) -> Protocol[None]:
        while not self._has_ended:
            try:
                yield Subscribe([self._key])
                yield from self._look()
                self._reconnect.succeed()
                yield from self._listen()
            except ConnectionLost as lost:
                self._check_timeout()
                yield from self._reconnect.wait(lost)

    def _listen(self) -> Protocol[None]:
        """Listen until the stream ends. Most messages are one token, so the work for each message must be small."""
        reader = self._reader
        while not self._has_ended:
            payload = yield Receive(self._check_timeout())
            if payload is None:
                yield from self._look()
                continue
            deliveries = reader.take_published(payload)
            if deliveries is None:
                [entries] = yield from send(self._range_command())
                yield from self._take_range(entries)
            else:
                for delivery in deliveries:
                    yield Emit(delivery)
                    self._waiting_since = time.monotonic()
            if reader.done is not None:
                yield from self._end(reader.done)

    def _look(self) -> Protocol[None]:
        """Read the job's status before the stream: an end that the status shows is already in the stream."""
        *replies, entries = yield from send(*look_commands(self._job_id), self._range_command())
        look, last_id = parse_look(self._job_id, replies), self._reader.last_id
        yield from self._take_range(entries)
        if self._reader.done is not None:
            if not look.has_come_back(self._reader.last_id.attempt):  # else a reset will follow
                yield from self._end(self._reader.done)
        elif self._reader.last_id == last_id:
            result = yield from self._watch.conclude(look)
            if result is not None:
                yield from self._emit(self._reader.take_result(result))
                yield from self._end(result)

    def _take_range(self, entries: Sequence[Any]) -> Protocol[None]:
        yield from self._emit(self._reader.take_range(entries))
        while self._reader.must_read_on:
            [entries] = yield from send(self._range_command())
            yield from self._emit(self._reader.take_range(entries))

    def _range_command(self) -> tuple[Any, ...]:
        return ("XRANGE", self._key, str(self._reader.last_id), "+", "COUNT", MAX_ENTRIES_A_READ)

    def _emit(self, deliveries: Sequence[Delivery]) -> Protocol[None]:
        for delivery in deliveries:
            yield Emit(delivery)
        if deliveries:
            self._waiting_since = time.monotonic()

    def _end(self, end: Done | Result) -> Protocol[None]:
        self._has_ended = True
        yield Emit(StreamEnd(end.status, end.usage, self._reader.generation))
        if end.status == "failed":
            result = end if isinstance(end, Result) else None
            raise JobFailedError(self._job_id, end.error or NO_REASON, result)

    def _check_timeout(self) -> float:
        """Seconds to listen before the next look. Raises ResultTimeoutError."""
        if self._timeout is None:
            return self._pace.seconds
        left = self._waiting_since + self._timeout - time.monotonic()
        if left <= 0:
            raise ResultTimeoutError(f"job {self._job_id}: no chunk within {self._timeout:g} s; the job continues")
        return min(self._pace.seconds, left)
