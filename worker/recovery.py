"""Jobs on their way back: leases that ended, what a worker gives back, and what their streams hold.

Every worker sweeps. A sweep is one script, so that any number of sweepers put a job back once.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import redis

from producer.contract import keys
from worker.claim import Claim
from worker.outlet.stored_stream import StoredStream
from worker.redis_client import REDIS_AWAY, execute_each
from worker.scripts import Scripts

MAX_SWEPT = 1000  # jobs of one queue in one pass
MAX_GIVEN_BACK = 256  # jobs in one script run
MAX_INTERVAL_SECONDS = 1.0
SWEEPS_PER_LEASE = 5
SWEEP_KEY = "promptmill:sweep"  # STRING: what is written to learn whether Redis takes anything
SWEEP_KEY_SECONDS = 60

_log = logging.getLogger(__name__)


class Sweeper:
    """Puts jobs whose lease has ended back to the front of their queues. One thread.

    `on_orphan` is given jobs that were cancelled or deleted while their worker died: this worker owes them an outcome.
    """

    def __init__(
        self,
        client: redis.Redis,
        scripts: Scripts,
        *,
        queues: Sequence[str],
        lease_seconds: float,
        on_orphan: Callable[[Claim], None],
    ) -> None:
        self._client = client
        self._scripts = scripts
        self._queues = list(queues)
        self._lease_seconds = lease_seconds
        self._on_orphan = on_orphan
        self.interval_seconds = min(MAX_INTERVAL_SECONDS, lease_seconds / SWEEPS_PER_LEASE)
        self._last_pass_at = -math.inf
        self._last_time_there = -math.inf  # by Redis' clock, as the leases are
        self._blind_until = 0.0

    def sweep(self, now: float) -> None:
        """`now`: monotonic seconds. Raises what Redis raises; the next pass then waits, as after any gap.

        After a gap (Redis was away or took no writes, this worker slept, or Redis' clock was put forward, as behind a
        fail-over) leases look ended whose holders only could not renew them: they get one full lease to come back.
        """
        there = self._write()
        if max(now - self._last_pass_at, there - self._last_time_there) > self._lease_seconds / 2:
            self._blind_until = now + self._lease_seconds
        self._last_pass_at, self._last_time_there = now, there
        if now < self._blind_until:
            return
        self._sweep_all()

    def _write(self) -> float:
        """Renewing a lease takes a write. A Redis that is full, or has too few replicas, answers to all but that.

        Returns Redis' time, in epoch seconds.
        """
        with self._client.pipeline(transaction=False) as pipe:
            pipe.set(SWEEP_KEY, 1, ex=SWEEP_KEY_SECONDS)
            pipe.time()
            _, (seconds, microseconds) = pipe.execute()
        return float(seconds + microseconds / 1e6)

    def _sweep_all(self) -> None:
        """One round trip, however many queues there are: a pass that takes longer than half a lease is itself a gap."""
        with self._client.pipeline(transaction=False) as pipe:
            for queue in self._queues:
                self._scripts.sweep(
                    pipe,
                    queue=queue,
                    lease_seconds=self._lease_seconds,
                    max_jobs=MAX_SWEPT,
                    execution_id=uuid4().hex,
                )
            replies = pipe.execute(raise_on_error=False)
        for queue, reply in zip(self._queues, replies, strict=True):
            if not isinstance(reply, Exception):
                self._note_swept(queue, *reply)
        if failed := [reply for reply in replies if isinstance(reply, Exception)]:
            raise failed[0]

    def _note_swept(self, queue: str, returned: Sequence[bytes], orphans: Sequence[Any]) -> None:
        for job_id in returned:
            _log.warning("action=job_returned job_id=%s queue=%s reason=lease_ended", job_id.decode(), queue)
        for orphan in orphans:
            claim = Claim.parse(orphan, time.time())
            _log.warning("action=orphan_adopted job_id=%s queue=%s", claim.job_id, queue)
            self._on_orphan(claim)


def give_back(client: redis.Redis, scripts: Scripts, claims: Sequence[Claim], *, resumable: bool = True) -> int:
    """Put jobs that are still ours back to the front of their queues, in the order of `claims`. Returns how many.

    Not `resumable`: they start over.
    """
    num_given = 0
    for end in range(len(claims), 0, -MAX_GIVEN_BACK):  # the newest first: each goes before those already there
        part = claims[max(0, end - MAX_GIVEN_BACK) : end]
        flat = [text for claim in part for text in (claim.queue, claim.job_id, claim.fence)]
        num_given += len(scripts.hand_over(client, jobs=flat, resumable=resumable))
    return num_given


def read_stored(client: redis.Redis, job_id: str) -> StoredStream:
    """A key that is no stream holds nothing; that it takes nothing either shows when its job is begun."""
    try:
        rows: list[Any] = client.xrange(keys.stream_key(job_id)) or []
    except redis.ResponseError as error:
        if not str(error).startswith("WRONGTYPE"):
            raise
        rows = []
    return StoredStream(rows)


def read_ahead(client: redis.Redis, claims: Sequence[Claim]) -> dict[str, Any]:
    """By fence, the rows of jobs that came back: one round trip for all. What cannot be read is left out, to be read by
    itself."""
    resumable = [claim for claim in claims if claim.is_resumable]
    if not resumable:
        return {}
    try:
        with client.pipeline(transaction=False) as pipe:
            for claim in resumable:
                pipe.xrange(keys.stream_key(claim.job_id))
            found = execute_each(pipe)
    except REDIS_AWAY:
        return {}
    return {claim.fence: rows for claim, rows in zip(resumable, found, strict=True) if isinstance(rows, list)}
