"""The worker's heartbeat: keeps its leases, RQ's records and its own entry alive, and learns what became of its jobs.

A thread of its own with a connection of its own, so that a long tokenisation or a slow commit loses no job; but it
renews only while the service's loop is turning, so that a hung worker loses all of them.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import redis

from producer.contract import WorkerInfo, keys
from worker.claim import Claim
from worker.held_jobs import HeldJobs
from worker.redis_client import REDIS_AWAY
from worker.redis_clock import RedisClock
from worker.rq_bridge import RqBridge
from worker.scripts import Scripts

MAX_INTERVAL_SECONDS = 1.0  # a cancel by plain RQ is noticed within this time
BEATS_PER_LEASE = 5
MAX_LOOP_SILENCE_SECONDS = 5.0
INFO_TTL_SECONDS = 15

_log = logging.getLogger(__name__)

Verdict = Callable[[Claim, str], None]


class LeaseKeeper:
    """`on_verdict` is told, on the keeper's thread, of each job that is no longer simply running: `lost`, or RQ's
    status (empty: the job was deleted)."""

    def __init__(
        self,
        client: redis.Redis,
        scripts: Scripts,
        bridge: RqBridge,
        clock: RedisClock,
        *,
        lease_seconds: float,
        held: HeldJobs,
        describe: Callable[[], WorkerInfo],
        is_suspended: Callable[[], bool],
        on_verdict: Verdict,
    ) -> None:
        self._client = client
        self._scripts = scripts
        self._bridge = bridge
        self._clock = clock
        self._lease_seconds = lease_seconds
        self._interval = min(MAX_INTERVAL_SECONDS, lease_seconds / BEATS_PER_LEASE)
        self._held = held
        self._describe = describe
        self._is_suspended = is_suspended
        self._on_verdict = on_verdict
        self._ticked_at = time.monotonic()
        self._was_away = False  # Redis, since the last beat that it took
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def start(self) -> None:
        self._try_beat()  # the first one here: a worker that is up is seen to be up
        self._thread.start()

    def tick(self) -> None:
        """The service's loop turns."""
        self._ticked_at = time.monotonic()

    def stop(self, timeout_seconds: float) -> None:
        """No beat begins after this; one that hangs is left behind."""
        self._is_stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def beat(self) -> None:
        """One pipeline for everything. Raises what Redis raises."""
        held, lost = self._held.claims(), self._held.lost()
        claims = [*held, *lost]
        info = self._describe()
        with self._client.pipeline(transaction=False) as pipe:
            self._bridge.add_beat(pipe, num_jobs=len(held), is_suspended=self._is_suspended())
            pipe.set(keys.worker_key(info.name), info.model_dump_json(), ex=INFO_TTL_SECONDS)
            pipe.time()
            self._scripts.beat(
                pipe,
                worker=self._bridge.name,
                entry_seconds=INFO_TTL_SECONDS,
                lease_seconds=self._lease_seconds,
                models=info.models,
                jobs=[part for claim in claims for part in self._parts(claim)],
                was_away=self._was_away,
            )
            replies = pipe.execute()
        seconds, microseconds = replies[-2]
        self._clock.set(seconds + microseconds / 1e6)
        self._was_away = False
        self._held.forget_lost(len(lost))
        if 1 in replies[:2]:
            self._bridge.register_again()
        self._tell(claims, replies[-1])

    def _parts(self, claim: Claim) -> tuple[str, ...]:
        return (claim.queue, claim.job_id, claim.fence, "1" if self._held.is_committing(claim) else "0")

    def _tell(self, claims: Sequence[Claim], verdicts: Sequence[bytes]) -> None:
        for claim, verdict in zip(claims, verdicts, strict=True):
            if verdict not in (b"started", b"queued"):
                self._on_verdict(claim, verdict.decode())

    def _run(self) -> None:
        while not self._is_stopping.wait(self._interval):
            silence = time.monotonic() - self._ticked_at
            if silence > MAX_LOOP_SILENCE_SECONDS:
                _log.error("action=beat_withheld silence_seconds=%.1f", silence)
                continue
            self._try_beat()

    def _try_beat(self) -> None:
        try:
            self.beat()
        except REDIS_AWAY as error:
            self._was_away = True
            _log.warning("action=beat_failed error=%s", error)
        except Exception:  # of any type: without beats every job would be lost
            _log.exception("action=beat_failed")
