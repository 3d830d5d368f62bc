"""The worker's heartbeat: renews its leases, RQ's records and its own entry, and learns when a job was taken away.

It runs on its own thread with its own connection, so that a long tokenisation or a slow commit loses no job. But it
renews leases only while the worker's loop is turning, so that a hung worker loses all its jobs to others.
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

MAX_INTERVAL_SECONDS = 1.0  # the longest until a cancel by plain RQ is noticed
BEATS_PER_LEASE = 5
MAX_LOOP_SILENCE_SECONDS = 5.0
INFO_TTL_SECONDS = 15

_log = logging.getLogger(__name__)

Verdict = Callable[[Claim, str], None]


class LeaseKeeper:
    """Calls `on_verdict`, on its own thread, for each job that is no longer simply running, with `lost` or RQ's status
    (empty: the job was deleted)."""

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
        self._was_away = False  # whether Redis was unavailable since the last beat that it accepted
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def start(self) -> None:
        self._try_beat()  # the first beat here, so that a started worker is listed at once
        self._thread.start()

    def tick(self) -> None:
        """Called by the worker's loop in every turn."""
        self._ticked_at = time.monotonic()

    def stop(self, timeout_seconds: float) -> None:
        """No beat begins after this; one that hangs is not waited for."""
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
        except Exception:  # of any type: without heartbeats the worker would lose every job
            _log.exception("action=beat_failed")
