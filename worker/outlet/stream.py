"""The streams of all running jobs: appends them to Redis, one script call per flush. Knows nothing of RQ or results.

Every append carries its attempt's fence, the ids of its entries and the id of the entry before them (`Scripts.append`).
So a repeated append stores nothing twice; after a gap the missing entries are sent again; and an attempt that has lost
its job writes nothing and finds out.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import redis
from redis.exceptions import NoScriptError, ResponseError

from producer.contract import EntryId, Marker
from producer.contract.keys import fence_key, stream_key
from worker.outlet.job_stream import MAX_ENTRIES_PER_APPEND, JobStream
from worker.redis_client import REDIS_AWAY
from worker.scripts import Append, Scripts

MIN_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 2.0
MAX_UNSENT_BYTES = 256 << 20  # of all jobs together, while Redis is unavailable
MAX_ROUNDS = 3  # of one flush: after a round that found a gap, the next one sends the missing entries

_logger = logging.getLogger(__name__)


class StreamOutlet:
    """Used from one thread. Its methods raise no connection errors of Redis: they keep the entries and try again."""

    def __init__(self, client: redis.Redis, scripts: Scripts, *, max_unsent_bytes: int = MAX_UNSENT_BYTES) -> None:
        self._client = client
        self._scripts = scripts
        self._max_unsent_bytes = max_unsent_bytes
        self._streams: dict[str, JobStream] = {}
        self._names: dict[str, tuple[str, str, str]] = {}  # by job id: stream key, fence key, fence
        self._retry_at = 0.0  # on the caller's clock
        self._backoff_seconds = 0.0  # 0: Redis answered last time

    @property
    def is_redis_away(self) -> bool:
        return self._backoff_seconds > 0

    def open(self, stream: JobStream, marker: Marker, *, fence: str) -> None:
        """Add a job's stream, with `marker` as its first entry. The next flush stores it."""
        stream.mark(marker)
        self._streams[stream.job_id] = stream
        self._names[stream.job_id] = (stream_key(stream.job_id), fence_key(stream.job_id), fence)

    def forget(self, stream: JobStream) -> None:
        """Drop the stream of a job that was committed or is no longer ours."""
        if self._streams.get(stream.job_id) is stream:
            del self._streams[stream.job_id], self._names[stream.job_id]

    def seconds_until_due(self, now: float) -> float | None:
        """How long until `flush` has something to do; None: nothing is waiting."""
        if not any(stream.has_unsent for stream in self._streams.values()):
            return None
        return max(0.0, self._retry_at - now)

    def flush(self, now: float, *, force: bool = False) -> list[str]:
        """Append the waiting entries; while Redis is unavailable, only after a backoff, unless forced.

        Returns the ids of the jobs given up (and forgotten): those whose fence another attempt has taken, those whose
        stream key cannot be appended to, and, if Redis stays unavailable until all output no longer fits in memory,
        those with the most output. `now`: seconds of a monotonic clock.
        """
        if now < self._retry_at and not force:
            return []
        given_up: list[str] = []
        batch = [stream for stream in self._streams.values() if stream.has_unsent]
        for _ in range(MAX_ROUNDS):
            if not batch:
                break
            try:
                batch = self._append(batch, given_up)
            except _AWAY_ERRORS as error:
                for stream in batch:
                    stream.commit = None  # the commit may be the part that fails
                self._back_off(now, error)
                return given_up + self._shed()
            self._come_back()
        return given_up

    def _append(self, batch: list[JobStream], given_up: list[str]) -> list[JobStream]:
        """Append for all streams in one round trip; adds to `given_up`, and returns the streams with more to append.

        Raises one of `_AWAY_ERRORS` if some of it was not written.
        """
        appends: dict[JobStream, Append] = {}
        for stream in batch:
            try:
                appends[stream] = self._next_append(stream)
            except Exception as error:  # of any type: only this job's output cannot be encoded
                _logger.exception("action=stream_unwritable job_id=%s", stream.job_id)
                stream.refusal = repr(error)
                given_up.append(self._give_up(stream))
        runs = list(_bounded(appends.values()))
        outcomes = self._send(runs)
        if any(isinstance(outcome, NoScriptError) for outcome in outcomes):
            self._scripts.load_append(self._client)  # Redis was replaced or restarted, and has lost the script
            outcomes = self._send(runs)
        replies: list[Any] = []
        for run, outcome in zip(runs, outcomes, strict=True):
            replies += [outcome] * len(run) if isinstance(outcome, Exception) else outcome
        away: Exception | None = None
        more: list[JobStream] = []
        for stream, reply in zip(appends, replies, strict=True):
            if reply == b"OK":  # the usual case, first because it is checked for every token
                stream.acknowledge_sent()
                if stream.has_unsent:
                    more.append(stream)
            elif isinstance(reply, _AWAY_ERRORS):
                away = reply
            elif not self._settle(stream, reply):
                given_up.append(self._give_up(stream))
            elif stream.has_unsent:
                more.append(stream)
        if away is not None:
            raise away
        return more

    def _next_append(self, stream: JobStream) -> Append:
        stream.encode_pending()
        expected, entries, is_end = stream.unsent()
        names, publish = self._names[stream.job_id], stream.publish
        if not is_end:
            return Append(*names, expected, entries, publish)
        return Append(*names, expected, entries, publish, is_end, stream.commit, stream.record_key)

    def _send(self, runs: list[list[Append]]) -> list[Any]:
        with self._client.pipeline(transaction=False) as pipe:
            for run in runs:
                self._scripts.append(pipe, run)
            return pipe.execute(raise_on_error=False)

    def _settle(self, stream: JobStream, reply: Any) -> bool:
        """Handle a reply other than OK: note what is stored now. False: this attempt can store nothing more."""
        if isinstance(reply, ResponseError):
            _logger.error("action=stream_refused job_id=%s error=%s", stream.job_id, reply)
            stream.refusal = str(reply)
            return False
        if isinstance(reply, Exception):
            raise reply
        if reply == b"contested":
            stream.unseal()
            return True
        if reply.startswith(b"OK "):
            _logger.error("action=commit_refused_in_part job_id=%s error=%s", stream.job_id, reply[3:].decode())
            stream.acknowledge_sent()
            return True
        if reply == b"fenced" or not stream.acknowledge(EntryId.parse(reply) if reply else None):
            _logger.warning("action=stream_fenced job_id=%s attempt=%d", stream.job_id, stream.attempt)
            return False
        return True

    def _back_off(self, now: float, error: Exception) -> None:
        if not self.is_redis_away:
            _logger.warning("action=stream_redis_away error=%s", error)
        self._backoff_seconds = min(max(2 * self._backoff_seconds, MIN_BACKOFF_SECONDS), MAX_BACKOFF_SECONDS)
        self._retry_at = now + self._backoff_seconds

    def _come_back(self) -> None:
        if self.is_redis_away:
            _logger.info("action=stream_redis_back num_streams=%d", len(self._streams))
        self._backoff_seconds = self._retry_at = 0.0

    def _shed(self) -> list[str]:
        """Give up the jobs with most unsent output until the rest fits; another attempt will run them."""
        sizes = sorted(
            ((stream.num_unsent_bytes, stream) for stream in self._streams.values()), key=lambda pair: pair[0]
        )
        total = sum(size for size, _ in sizes)
        given_up = []
        while total > self._max_unsent_bytes:
            size, stream = sizes.pop()
            total -= size
            _logger.error("action=stream_given_up job_id=%s unsent_bytes=%d", stream.job_id, size)
            given_up.append(self._give_up(stream))
        return given_up

    def _give_up(self, stream: JobStream) -> str:
        self.forget(stream)
        return stream.job_id


_AWAY_ERRORS = (*REDIS_AWAY, NoScriptError)


def _bounded(appends: Iterable[Append]) -> Iterator[list[Append]]:
    """Splits appends so that each script call stays short, because Redis serves no other client meanwhile."""
    some: list[Append] = []
    num_commands = 0
    for append in appends:
        num_new = len(append.entries) // 2 + (len(append.commit.commands) if append.commit is not None else 0)
        if some and num_commands + num_new > MAX_ENTRIES_PER_APPEND:
            yield some
            some, num_commands = [], 0
        some.append(append)
        num_commands += num_new
    if some:
        yield some
