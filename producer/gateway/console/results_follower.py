"""Follows the results streams of all queues: every job that ended in the last hour, then each as it ends.

Each replica reads the same streams into its own memory, so that none has to ask another. While Redis is away, what was
read stays; what ends meanwhile is read afterwards.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from pydantic import ValidationError

from producer.async_transport import AsyncTransport
from producer.contract import Result, keys
from producer.errors import RedisUnavailableError
from producer.gateway.background_loop import BackgroundLoop
from producer.gateway.console.ended_jobs import EndedJob, EndedJobs
from producer.gateway.console.result_series import WINDOW_SECONDS, ResultSeries
from producer.operations import send
from producer.queues import read_queue_names

READ_SECONDS = 1.0  # between reads
NAMES_SECONDS = 10.0  # between looks for new queues
MAX_LINES_A_READ = 200  # of one stream: a few milliseconds of work, between which requests are served
MAX_STREAMS_A_READ = 200
_LINE_SECONDS = 0.001  # a line's id is cut to milliseconds

_log = logging.getLogger(__name__)


class ResultsFollower(BackgroundLoop):
    """`series` and `ended` hold what was read. `on_end` is called for each job that ended after this object was made: a
    gateway serves before its first read is done."""

    def __init__(self, redis: AsyncTransport, default_queue: str, *, on_end: Callable[[EndedJob], None]) -> None:
        super().__init__("results", retry_seconds=READ_SECONDS)
        self._redis = redis
        self._default_queue = default_queue
        self._on_end = on_end
        self._made_at = time.monotonic()
        self._names_at = 0.0  # monotonic seconds
        self._positions: dict[str, str] = {}  # queue → id of the last line read
        self._clock_offset = time.time() - time.monotonic()  # of Redis' epoch seconds, once it was read
        self.has_caught_up = False
        self.series = ResultSeries()
        self.ended = EndedJobs()

    async def _turn(self) -> float:
        try:
            if time.monotonic() >= self._names_at:
                await self.look_for_queues()
                self._names_at = time.monotonic() + NAMES_SECONDS
            await self.read()
        except RedisUnavailableError as error:  # others warn of that
            _log.debug("action=results_unread error=%s", error)
        return READ_SECONDS

    async def look_for_queues(self) -> None:
        """A new queue is read from an hour ago on. A queue that is no longer listed, because it has no worker, is still
        read for an hour: else its lines would be counted twice when it is back."""
        names = await self._redis.run(read_queue_names(self._default_queue))
        [[seconds, _]] = await self._redis.run(send(("TIME",)))
        begin_ms = (int(seconds) - WINDOW_SECONDS) * 1000
        known = {name: at for name, at in self._positions.items() if int(at.partition("-")[0]) >= begin_ms}
        self._positions = {name: self._positions.get(name, f"{begin_ms}-0") for name in names} | known

    async def read(self) -> None:
        """Everything that is new. Raises RedisUnavailableError; then the rest is read the next time."""
        queues = list(self._positions)
        for start in range(0, len(queues), MAX_STREAMS_A_READ):
            while await self._read_some(queues[start : start + MAX_STREAMS_A_READ]):
                await asyncio.sleep(0)  # requests are served between the pages of a busy hour
        self.series.forget(self.now())
        self.has_caught_up = True

    def now(self) -> float:
        """Epoch seconds by Redis' clock, which the lines' ids follow."""
        return time.monotonic() + self._clock_offset

    async def _read_some(self, queues: Sequence[str]) -> bool:
        """Whether there may be more."""
        streams = [keys.results_channel(queue) for queue in queues]
        positions = [self._positions[queue] for queue in queues]
        [seconds, microseconds], found = await self._redis.run(
            send(("TIME",), ("XREAD", "COUNT", MAX_LINES_A_READ, "STREAMS", *streams, *positions))
        )
        self._clock_offset = int(seconds) + int(microseconds) / 1e6 - time.monotonic()
        has_more = False
        names = dict(zip(streams, queues, strict=True))
        for stream, lines in found or ():
            queue = names[stream.decode()]
            for line_id, fields in lines:
                self._take(queue, line_id, fields)
            self._positions[queue] = lines[-1][0].decode()
            has_more |= len(lines) == MAX_LINES_A_READ
        return has_more

    def _take(self, queue: str, line_id: bytes, fields: dict[bytes, bytes]) -> None:
        try:
            result = Result.model_validate_json(fields.get(keys.DATA_FIELD.encode(), b""))
        except ValidationError:
            return  # not written by a worker, or by one of a newer contract
        job = EndedJob.from_line(result, queue, int(line_id.partition(b"-")[0]) / 1000)
        self.series.add(job)
        self.ended.add(job)
        if job.ended_at - self._clock_offset >= self._made_at - _LINE_SECONDS:
            self._on_end(job)
